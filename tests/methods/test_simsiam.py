"""SimSiam: the criterion against lightly, and where the gradient stops."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.methods.simsiam import SimSiam, negative_cosine_similarity

STEP = torch.tensor(0)


def pair(count: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(count, width, generator=generator).to(dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize(("count", "width"), [(1, 3), (7, 9)])
def test_value_and_gradient_of_eq_1(count: int, width: int, assert_agree: Any) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        points = pair(count, width, dtype)
        p, z = points[0].double(), points[1].double()
        literal = -sum(p[i] / p[i].norm() @ (z[i] / z[i].norm()) for i in range(count)) / count
        found = negative_cosine_similarity(points[0], points[1])
        assert found.dtype == dtype
        assert_agree(found, torch.as_tensor(literal), points, tolerance)


@pytest.mark.parametrize(("count", "width"), [(2, 3), (32, 64)])
def test_agrees_with_lightly(count: int, width: int, assert_agree: Any) -> None:
    os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"
    loss = pytest.importorskip("lightly.loss").NegativeCosineSimilarity()
    points = pair(count, width)
    assert_agree(negative_cosine_similarity(points[0], points[1]), loss(points[0], points[1]), points)


def embedded(method: SimSiam, batch: Any) -> list[Tensor]:
    return [method.projector(method.encoder.pool(method.encoder(view))) for view in method.preview(batch).values()]


def test_gradient_stops_at_the_targets(make_method: Any, make_batch: Any) -> None:
    """What is trained has the gradient of eq. 4 with constant targets, and another one than without the stop."""
    method, batch = make_method(SimSiam), make_batch(range(8))
    weight = method.projector[0].weight

    def slope(stop: bool) -> Tensor:
        first, second = embedded(method, batch)
        targets = [z.detach() if stop else z for z in (second, first)]
        loss = sum(
            negative_cosine_similarity(method.predictor(z), target) / 2
            for z, target in zip((first, second), targets, strict=True)
        )
        found: Tensor = torch.autograd.grad(torch.as_tensor(loss), weight)[0]
        return found

    (trained,) = torch.autograd.grad(method.loss(batch, STEP)["loss"], weight)
    assert torch.allclose(trained, slope(True), atol=1e-6)
    assert (trained - slope(False)).norm() > 0.1 * trained.norm()


def test_spread_is_one_for_a_sphere_and_none_for_a_point(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method(SimSiam), make_batch(range(8))
    spread = float(method.loss(batch, STEP)["spread"])
    assert 0.5 < spread < 1.5
    same = make_batch([5] * 8)
    assert float(method.loss(same, STEP)["spread"]) < 1e-3


def test_embeddings_have_no_mean_and_unit_variance(make_method: Any, make_batch: Any) -> None:
    first, _ = embedded(make_method(SimSiam), make_batch(range(8)))
    assert first.mean(0).abs().max() < 1e-5
    assert torch.allclose(first.var(0, correction=0), torch.ones(16), atol=1e-2)


def test_step_is_one_graph(make_method: Any, make_batch: Any, assert_one_graph: Any) -> None:
    assert_one_graph(make_method(SimSiam), make_batch(range(6)))
