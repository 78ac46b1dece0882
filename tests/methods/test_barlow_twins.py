"""Barlow Twins: the criterion against lightly and a slow loop over eqs. 1 and 2, and what collapse costs."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.methods.barlow_twins import BarlowTwins, barlow_twins_loss, cross_correlation

STEP = torch.tensor(0)


def pair(count: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    first = torch.randn(count, width, generator=generator) * 2 + 1
    second = first + torch.randn(count, width, generator=generator)
    return [first.to(dtype).requires_grad_(), second.to(dtype).requires_grad_()]


def literal_eq_1(first: Tensor, second: Tensor, redundancy: float) -> Tensor:
    """Eqs. 1 and 2 word by word, on embeddings whose mean over the batch is removed, in float64."""
    a, b = first.double() - first.double().mean(0), second.double() - second.double().mean(0)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(a.shape[1]):
        for j in range(a.shape[1]):
            correlation = (a[:, i] * b[:, j]).sum() / (a[:, i].square().sum().sqrt() * b[:, j].square().sum().sqrt())
            total = total + ((1 - correlation) ** 2 if i == j else redundancy * correlation**2)
    return total


@pytest.mark.parametrize("redundancy", [5e-3, 0.5])
@pytest.mark.parametrize(("count", "width"), [(4, 3), (50, 8)])
def test_value_and_gradient_of_eq_1(count: int, width: int, redundancy: float, assert_agree: Any) -> None:
    for dtype in (torch.float64, torch.float32):
        points = pair(count, width, dtype)
        found = barlow_twins_loss(points[0], points[1], redundancy)
        assert found.dtype == dtype
        # the printed fraction has nothing below its root to keep it finite: 1e-5 of a variance of 4 and more
        assert_agree(found, literal_eq_1(points[0], points[1], redundancy), points, 5e-5)


@pytest.mark.parametrize("redundancy", [5e-3, 0.5])
@pytest.mark.parametrize(("count", "width"), [(4, 3), (64, 128)])
def test_agrees_with_lightly(count: int, width: int, redundancy: float, assert_agree: Any) -> None:
    os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"
    loss = pytest.importorskip("lightly.loss").BarlowTwinsLoss(redundancy)
    points = pair(count, width)
    assert_agree(barlow_twins_loss(points[0], points[1], redundancy), loss(points[0], points[1]), points)


def test_terms_and_collapse() -> None:
    """White outputs that agree cost nothing; outputs that all say the same cost their redundancy; constant ones the rest."""
    hadamard = torch.tensor([[1.0]])
    for _ in range(3):
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
    white = hadamard[:, 1:]  # seven outputs over eight images
    assert float(barlow_twins_loss(white, white, 1.0)) == pytest.approx(0, abs=1e-6)
    assert float(barlow_twins_loss(white, -white, 1.0)) == pytest.approx(7 * 4, rel=1e-4)
    same = white[:, :1].expand(8, 5)
    assert float(barlow_twins_loss(same, same, 0.1)) == pytest.approx(0.1 * 20, rel=1e-4)
    constant = torch.ones(8, 5)
    assert float(barlow_twins_loss(constant, constant, 0.1)) == pytest.approx(5)


def test_float32_under_autocast() -> None:
    first, second = (p.detach() for p in pair(16, 32))
    with torch.autocast("cpu", torch.bfloat16):
        inside = barlow_twins_loss(first, second, 5e-3)
    assert torch.equal(inside, barlow_twins_loss(first, second, 5e-3))


def test_the_mean_over_outputs_is_trained_and_both_views_have_a_gradient(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method(BarlowTwins), make_batch(range(8))
    first, second = (method.projector(method.encoder.pool(method.encoder(v))) for v in method.preview(batch).values())
    out = method.loss(batch, STEP)
    assert torch.allclose(out["loss"], barlow_twins_loss(first, second, 5e-3) / 16)
    assert torch.allclose(out["agreement"], cross_correlation(first, second).diagonal().mean())
    weight = method.projector[0].weight
    (trained,) = torch.autograd.grad(out["loss"], weight)
    (stopped,) = torch.autograd.grad(barlow_twins_loss(first, second.detach(), 5e-3) / 16, weight)
    assert (trained - stopped).norm() > 0.1 * trained.norm()  # no stop-gradient anywhere (section 2.1)


def test_step_is_one_graph(make_method: Any, make_batch: Any, assert_one_graph: Any) -> None:
    assert_one_graph(make_method(BarlowTwins), make_batch(range(6)))
