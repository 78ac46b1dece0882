"""NNCLR: neighbours and criterion against slow loops over section 3.2, and which images may be neighbours."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.batches import Batches
from harness.heads import unit_rows
from harness.methods.nnclr import NNCLR, nearest, nnclr_loss

STEP = torch.tensor(0)


def pair(count: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(count, width, generator=generator).to(dtype).requires_grad_() for _ in range(2)]


def literal_nnclr(neighbours: Tensor, predictions: Tensor, temperature: float) -> Tensor:
    """The loss of section 3.2 word by word, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for i, neighbour in enumerate(neighbours.double()):
        scores = [(neighbour @ p / neighbour.norm() / p.norm() / temperature).exp() for p in predictions.double()]
        total = total - torch.log(scores[i] / sum(scores))
    return total / len(neighbours)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize(("count", "width"), [(3, 4), (7, 9)])
def test_value_and_gradient_of_the_loss(count: int, width: int, temperature: float, assert_agree: Any) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        points = pair(count, width, dtype)
        found = nnclr_loss(points[0], points[1], temperature)
        assert found.dtype == dtype
        assert_agree(found, literal_nnclr(points[0], points[1], temperature), points, tolerance)


def test_chance_and_autocast() -> None:
    equal = torch.ones(8, 4)
    assert float(nnclr_loss(equal, equal, 0.1)) == pytest.approx(math.log(8))
    first, second = (p.detach() for p in pair(16, 32))
    with torch.autocast("cpu", torch.bfloat16):
        inside = nnclr_loss(first, second, 0.1)
        chosen = nearest(first, second)
    assert torch.equal(inside, nnclr_loss(first, second, 0.1)) and torch.equal(chosen, nearest(first, second))


def test_nearest_is_the_least_distant() -> None:
    embeddings, support = (p.detach() for p in (pair(6, 5)[0], pair(9, 5)[0]))
    unit = unit_rows(support)
    for excluded in (None, torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.5):
        for i, found in enumerate(nearest(embeddings, unit, excluded)):
            allowed = [j for j in range(9) if excluded is None or not excluded[i, j]]
            distances = {j: float((embeddings[i] / embeddings[i].norm() - unit[j]).norm()) for j in allowed}
            assert torch.equal(found, unit[min(distances, key=lambda j: distances[j])])


def test_an_image_is_never_its_own_neighbour(make_method: Any, make_batch: Any) -> None:
    """The same batch twice, without any augmentation: its embeddings are in the queue and are the nearest by far."""
    method = make_method(NNCLR, crop_scale=1.0, mirror=False)
    batch = make_batch(range(6))
    method.loss(batch, STEP)
    views = torch.cat(tuple(method.preview(batch).values()))
    embeddings = method.projector(method.encoder.pool(method.encoder(views)))
    queue, predictions = method.queue.embeddings.clone(), method.predictor(embeddings)
    own = torch.zeros(6, 16, dtype=torch.bool)
    own[torch.arange(6), torch.arange(6)] = True  # the queue was empty: image i went to row i
    expected = [
        (
            nnclr_loss(nearest(a, queue, out), predictions[6:], 0.1)
            + nnclr_loss(nearest(b, queue, out), predictions[:6], 0.1)
        )
        / 2
        for a, b in [embeddings.chunk(2)]
        for out in (own, None)
    ]
    found = method.loss(batch, STEP)["loss"]
    assert torch.allclose(found, expected[0], atol=1e-5)
    assert (expected[0] - expected[1]).abs() > 1e-3


def test_each_view_s_neighbour_goes_with_the_other_view(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method(NNCLR), make_batch(range(6))
    views = torch.cat(tuple(method.preview(batch).values()))
    embeddings = method.projector(method.encoder.pool(method.encoder(views)))
    first, second = method.predictor(embeddings).chunk(2)
    queue = method.queue.embeddings.clone()
    there, back = nearest(embeddings[:6], queue), nearest(embeddings[6:], queue)
    expected = (nnclr_loss(there, second, 0.1) + nnclr_loss(back, first, 0.1)) / 2
    assert torch.allclose(method.loss(batch, STEP)["loss"], expected, atol=1e-5)


def test_first_view_enters_the_queue_after_the_loss(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method(NNCLR), make_batch(range(6))
    views = torch.cat(tuple(method.preview(batch).values()))
    before = method.queue.embeddings.clone()
    embeddings = unit_rows(method.projector(method.encoder.pool(method.encoder(views))))
    method.loss(batch, STEP)["loss"].backward()
    assert torch.allclose(method.queue.embeddings[:6], embeddings[:6], atol=1e-5)
    assert torch.equal(method.queue.embeddings[6:], before[6:])
    assert not method.queue.embeddings.requires_grad and method.queue.images[:6].tolist() == list(range(6))


def test_no_gradient_through_the_neighbour(make_method: Any, make_batch: Any) -> None:
    embeddings, support = pair(6, 5)[0], pair(9, 5)[0]
    assert not nearest(embeddings, support).requires_grad
    method = make_method(NNCLR)
    method.loss(make_batch(range(6)), STEP)["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.encoder.parameters())


def test_gradient_through_the_neighbour_would_be_another_one(make_method: Any, make_batch: Any) -> None:
    """As if the neighbour moved with the embedding that found it."""
    method, batch = make_method(NNCLR), make_batch(range(6))
    views, queue = torch.cat(tuple(method.preview(batch).values())), method.queue.embeddings.clone()
    weight = method.projector[0].weight

    def slope(stop: bool) -> Tensor:
        embeddings = method.projector(method.encoder.pool(method.encoder(views)))
        predictions = method.predictor(embeddings).chunk(2)
        total = torch.zeros(())
        for each, prediction in zip(embeddings.chunk(2), reversed(predictions), strict=True):
            found = nearest(each, queue)
            moving = found + unit_rows(each) - unit_rows(each).detach()
            total = total + nnclr_loss(found if stop else moving, prediction, 0.1) / 2
        grad: Tensor = torch.autograd.grad(total, weight)[0]
        return grad

    stopped, flowing = slope(True), slope(False)
    (trained,) = torch.autograd.grad(method.loss(batch, STEP)["loss"], weight)
    assert (trained - stopped).norm() < 1e-4 * stopped.norm()
    assert (trained - flowing).norm() > 0.1 * stopped.norm()


def test_prepare_shortens_the_queue(make_method: Any, make_batch: Any) -> None:
    method = make_method(NNCLR)
    method.prepare(Batches(make_batch(range(24)).images, None, batch_size=8, seed=0, device=torch.device("cpu")))
    assert len(method.queue.images) == 6


def test_step_is_one_graph(make_method: Any, make_batch: Any, assert_one_graph: Any) -> None:
    assert_one_graph(make_method(NNCLR), make_batch(range(6)))
