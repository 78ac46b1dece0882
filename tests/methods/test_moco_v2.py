"""MoCo v2: the criterion against lightly and a slow loop, the queue's order, and what must not reach the keys."""

from __future__ import annotations

import copy
import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.batches import Batches
from harness.contracts import HarnessError
from harness.heads import Queue, rising_momentum, unit_rows
from harness.methods.moco_v2 import MoCoV2, info_nce_loss

STEP = torch.tensor(0)


def points(*shapes: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def literal_eq_1(q: Tensor, k: Tensor, queue: Tensor, temperature: float, excluded: Tensor | None = None) -> Tensor:
    """Eq. 1 of He et al. word by word, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(q)):
        query = q[i].double() / q[i].double().norm()
        scores = [(query @ key.double() / key.double().norm() / temperature).exp() for key in (k[i], *queue)]
        kept = [s for j, s in enumerate(scores) if j == 0 or excluded is None or not excluded[i, j - 1]]
        total = total - torch.log(scores[0] / sum(kept))
    return total / len(q)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
@pytest.mark.parametrize(("count", "rows", "width"), [(1, 3, 4), (6, 17, 9)])
def test_value_and_gradient_of_eq_1(count: int, rows: int, width: int, temperature: float, assert_agree: Any) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        q, k, queue = points((count, width), (count, width), (rows, width), seed=rows, dtype=dtype)
        excluded = torch.rand(count, rows, generator=torch.Generator().manual_seed(1)) < 0.3
        for out in (None, excluded):
            found = info_nce_loss(q, k, queue, temperature, out)
            assert found.dtype == dtype
            assert_agree(found, literal_eq_1(q, k, queue, temperature, out), [q, k, queue], tolerance)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize(("count", "rows", "width"), [(4, 8, 16), (32, 128, 64)])
def test_agrees_with_lightly(count: int, rows: int, width: int, temperature: float, assert_agree: Any) -> None:
    os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"
    loss = pytest.importorskip("lightly.loss").NTXentLoss(temperature, memory_bank_size=(rows, width))
    q, k, queue = points((count, width), (count, width), (rows, width))
    loss.memory_bank.bank = unit_rows(queue.detach())
    assert_agree(info_nce_loss(q, k, queue.detach(), temperature), loss(q, k), [q, k])


def test_chance_and_autocast() -> None:
    equal = torch.ones(3, 4)
    assert float(info_nce_loss(equal, equal, equal[:1].expand(7, 4), 0.2)) == pytest.approx(math.log(8))
    q, k, queue = points((8, 16), (8, 16), (32, 16))
    with torch.autocast("cpu", torch.bfloat16):
        inside = info_nce_loss(q, k, queue, 0.1)
    assert torch.equal(inside, info_nce_loss(q, k, queue, 0.1))


def test_queue_is_first_in_first_out(toy_info: Any) -> None:
    queue = Queue(5, 2, toy_info)
    place = queue.embeddings.data_ptr()
    written: list[tuple[int, float]] = []
    for first in (0, 3, 6, 9):
        images = torch.arange(first, first + 3)
        queue.push(images[:, None].expand(3, 2).float(), images)
        written += [(int(i), float(i)) for i in images]
        held = {(int(i), float(e[0])) for i, e in zip(queue.images, queue.embeddings, strict=True) if i >= 0}
        assert held == set(written[-5:])
    assert queue.embeddings.data_ptr() == place  # written where it is: a captured step reads this place
    assert int(queue.pointer) == 12 % 5
    queue.push(torch.arange(9.0)[:, None].expand(9, 2), torch.arange(9))  # more than it holds: the last ones stay
    assert sorted(queue.images.tolist()) == [4, 5, 6, 7, 8]


def test_queue_knows_the_size_of_the_data(toy_info: Any) -> None:
    assert len(Queue("auto", 2, toy_info).images) == 16  # a quarter of 64
    with pytest.raises(HarnessError, match=r"33 embeddings are more than half of the 64 pretraining images"):
        Queue(33, 2, toy_info)
    queue = Queue("auto", 2, toy_info)
    queue.fit(20)
    assert queue.embeddings.shape == (5, 2) and len(queue.images) == 5
    with pytest.raises(HarnessError, match="half of the 20"):
        Queue(32, 2, toy_info).fit(20)


def test_prepare_shortens_the_queue(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method(MoCoV2), make_batch(range(24))
    method.prepare(Batches(batch.images, None, batch_size=8, seed=0, device=torch.device("cpu")))
    assert len(method.queue.images) == 6


def test_an_image_is_never_its_own_negative(make_method: Any, make_batch: Any) -> None:
    """The same batch twice: the keys of the first time are in the queue, and count for other images only."""
    method, batch = make_method(MoCoV2), make_batch(range(6))
    method.loss(batch, STEP)
    queue = method.queue.embeddings.clone()
    assert method.queue.of_images(batch.indices).sum(1).tolist() == [1] * 6
    query, key = (v for v in method.preview(batch).values())
    q, k = method.projector(method.encoder.pool(method.encoder(query))), method.teacher(key)
    own = torch.zeros(6, 16, dtype=torch.bool)
    own[torch.arange(6), torch.arange(6)] = True  # the queue was empty: image i went to row i
    found = method.loss(batch, STEP)["loss"]
    assert torch.allclose(found, info_nce_loss(q, k, queue, 0.2, own))
    assert not torch.allclose(found, info_nce_loss(q, k, queue, 0.2), atol=1e-3)


def test_keys_enter_after_the_loss_and_leave_the_gradient_alone(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method(MoCoV2), make_batch(range(6))
    before, key = method.queue.embeddings.clone(), list(method.preview(batch).values())[1]
    keys = unit_rows(copy.deepcopy(method.teacher)(key))
    method.loss(batch, STEP)["loss"].backward()  # would raise if a saved negative had been overwritten
    assert torch.allclose(method.queue.embeddings[:6], keys, atol=1e-6)
    assert torch.equal(method.queue.embeddings[6:], before[6:])
    assert not method.queue.embeddings.requires_grad


def test_teacher_gets_no_gradient_and_follows(make_method: Any, make_batch: Any) -> None:
    method = make_method(MoCoV2, momentum=0.9)
    method.loss(make_batch(range(6)), STEP)["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.encoder.parameters())
    optimised = {id(p) for group in method.parameter_groups() for p in group["params"]}
    assert optimised == {id(p) for p in [*method.encoder.parameters(), *method.projector.parameters()]}
    with torch.no_grad():
        for parameter in (*method.encoder.parameters(), *method.projector.parameters()):
            parameter.add_(1.0)
    start = [p.clone() for p in method.teacher.parameters()]
    method.after_step(torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(start, method.teacher.parameters(), strict=True))
    method.after_step(torch.tensor(0.0))
    for old, now in zip(start, method.teacher.parameters(), strict=True):
        assert torch.allclose(now - old, torch.full_like(now, 0.1), atol=1e-6)


def test_momentum_end_points_and_middle() -> None:
    found = [float(rising_momentum(torch.tensor(p, dtype=torch.float64), 0.99)) for p in (0.0, 0.5, 1.0)]
    assert found == pytest.approx([0.99, 0.995, 1.0], abs=1e-12)


def test_gradient_into_the_keys_would_be_another_one(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method(MoCoV2), make_batch(range(6))
    query, key = method.preview(batch).values()
    queue = method.queue.embeddings.clone()

    def embed(view: Tensor) -> Tensor:
        embedded: Tensor = method.projector(method.encoder.pool(method.encoder(view)))
        return embedded

    weight = method.projector[0].weight
    (stopped,) = torch.autograd.grad(info_nce_loss(embed(query), embed(key).detach(), queue, 0.2), weight)
    (flowing,) = torch.autograd.grad(info_nce_loss(embed(query), embed(key), queue, 0.2), weight)
    (trained,) = torch.autograd.grad(method.loss(batch, STEP)["loss"], weight)
    assert (trained - stopped).norm() < 1e-4 * stopped.norm()  # the teacher still equals the network
    assert (trained - flowing).norm() > 0.1 * stopped.norm()


def test_step_is_one_graph(make_method: Any, make_batch: Any, assert_one_graph: Any) -> None:
    assert_one_graph(make_method(MoCoV2), make_batch(range(6)))
