"""VICReg: the three terms against lightly and slow loops over eqs. 1 to 6, and what each does about collapse."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.methods.vicreg import VICReg, vicreg_loss, vicreg_terms

STEP = torch.tensor(0)


def pair(count: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    first = torch.randn(count, width, generator=generator)
    second = first + 0.5 * torch.randn(count, width, generator=generator)
    return [first.to(dtype).requires_grad_(), second.to(dtype).requires_grad_()]


def literal_terms(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s, v + v' and c + c' as eqs. 1 to 5 print them, in float64, gamma 1, epsilon 1e-4."""
    first, second = first.double(), second.double()
    count, width = first.shape
    invariance = sum((first[i] - second[i]).square().sum() for i in range(count)) / count
    variance = covariance = torch.zeros((), dtype=torch.float64)
    for z in (first, second):
        mean = sum(z[i] for i in range(count)) / count
        c = sum(torch.outer(z[i] - mean, z[i] - mean) for i in range(count)) / (count - 1)
        for j in range(width):
            variance = variance + (1 - (z[:, j].var() + 1e-4).sqrt()).clamp_min(0) / width
            for k in range(width):
                covariance = covariance + (c[j, k] ** 2 / width if j != k else 0)
    return torch.as_tensor(invariance), variance, covariance


@pytest.mark.parametrize(("count", "width"), [(2, 3), (20, 6)])
def test_terms_are_the_printed_ones_up_to_the_stated_scales(count: int, width: int, assert_agree: Any) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        points = pair(count, width, dtype)
        terms, (s, v, c) = vicreg_terms(points[0], points[1]), literal_terms(points[0], points[1])
        for found, expected in zip(terms, (s / width, v / 2, c), strict=True):
            assert found.dtype == dtype
            assert_agree(found, expected, points, tolerance)


@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (1.0, 0.5, 3.0)])
@pytest.mark.parametrize(("count", "width"), [(4, 3), (64, 128)])
def test_agrees_with_lightly(count: int, width: int, weights: tuple[float, float, float], assert_agree: Any) -> None:
    os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"
    loss = pytest.importorskip("lightly.loss").VICRegLoss(*weights)
    points = pair(count, width)
    assert_agree(vicreg_loss(points[0], points[1], *weights), loss(points[0], points[1]), points)


def test_each_term_answers_for_its_collapse() -> None:
    constant = torch.ones(8, 5)
    terms = vicreg_terms(constant, constant)
    assert terms.invariance == 0 and terms.covariance == 0
    assert float(terms.variance) == pytest.approx(1 - 1e-2)  # sqrt(1e-4) is left of the deviation
    wide = 3 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)).expand(4000, 5)
    terms = vicreg_terms(wide, wide)  # spread enough, and all outputs say the same
    assert terms.invariance == 0 and terms.variance == 0
    assert float(terms.covariance) == pytest.approx(2 * 4 * 81, rel=0.1)
    shifted = vicreg_terms(wide, wide + 2)
    assert float(shifted.invariance) == pytest.approx(4) and shifted.variance == 0


def test_gradient_is_finite_at_collapse() -> None:
    constant = torch.ones(8, 5, requires_grad=True)
    (slope,) = torch.autograd.grad(vicreg_loss(constant, constant), constant)
    assert torch.isfinite(slope).all()


def test_float32_under_autocast() -> None:
    first, second = (p.detach() for p in pair(16, 32))
    with torch.autocast("cpu", torch.bfloat16):
        inside = vicreg_loss(first, second)
    assert torch.equal(inside, vicreg_loss(first, second))


def test_the_weighted_mean_is_trained(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method(VICReg, covariance=4.0), make_batch(range(8))
    first, second = (method.projector(method.encoder.pool(method.encoder(v))) for v in method.preview(batch).values())
    out = method.loss(batch, STEP)
    assert torch.allclose(out["loss"], vicreg_loss(first, second, 25, 25, 4) / 54)
    assert torch.allclose(out["invariance"], vicreg_terms(first, second).invariance)
    weight = method.projector[0].weight
    (trained,) = torch.autograd.grad(out["loss"], weight)
    (stopped,) = torch.autograd.grad(vicreg_loss(first, second.detach(), 25, 25, 4) / 54, weight)
    assert (trained - stopped).norm() > 0.1 * trained.norm()  # no stop-gradient anywhere (section 4.1)


def test_step_is_one_graph(make_method: Any, make_batch: Any, assert_one_graph: Any) -> None:
    assert_one_graph(make_method(VICReg), make_batch(range(6)))
