"""W-MSE: the criterion against lightly and a slow loop, and the covariance that whitening leaves."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.methods.w_mse import WMSE, w_mse_loss, whitened

STEP = torch.tensor(0)


def pair(count: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    mixing = torch.eye(width) + 0.2 * torch.randn(width, width, generator=generator)
    return [(torch.randn(count, width, generator=generator) @ mixing + 1).to(dtype).requires_grad_() for _ in range(2)]


def literal_w_mse(first: Tensor, second: Tensor, shrinkage: float) -> Tensor:
    """Section 3 in float64, the Cholesky factor by its own recurrence and its inverse by substitution."""
    total, z = torch.zeros((), dtype=torch.float64), []
    for view in (first.double(), second.double()):
        centred = view - view.mean(0)
        width = centred.shape[1]
        sigma = (1 - shrinkage) * centred.T @ centred / (len(view) - 1) + shrinkage * torch.eye(
            width, dtype=torch.float64
        )
        factor: list[list[Any]] = [[0.0] * width for _ in range(width)]
        for i in range(width):
            for j in range(i + 1):
                rest = sigma[i, j] - sum(factor[i][k] * factor[j][k] for k in range(j))
                factor[i][j] = rest**0.5 if i == j else rest / factor[j][j]
        rows = []
        for v in centred:
            out: list[Tensor] = []
            for i in range(width):
                out.append((v[i] - sum(factor[i][k] * out[k] for k in range(i))) / factor[i][i])
            rows.append(torch.stack(out))
        z.append(rows)
    for a, b in zip(*z, strict=True):
        total = total + (a / a.norm() - b / b.norm()).square().sum()
    return total / len(first)


@pytest.mark.parametrize("shrinkage", [0.0, 0.1])
@pytest.mark.parametrize(("count", "width"), [(6, 2), (12, 4)])
def test_value_and_gradient_of_section_3(count: int, width: int, shrinkage: float, assert_agree: Any) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        points = pair(count, width, dtype)
        found = w_mse_loss(points[0], points[1], shrinkage)
        assert found.dtype == dtype
        assert_agree(found, literal_w_mse(points[0], points[1], shrinkage), points, tolerance)


@pytest.mark.parametrize("shrinkage", [0.0, 0.05])
@pytest.mark.parametrize(("count", "width"), [(16, 4), (128, 32)])
def test_agrees_with_lightly(count: int, width: int, shrinkage: float, assert_agree: Any) -> None:
    """Lightly shuffles images before whitening them in parts; one part holds all of them here, in any order. In float64:
    in float32 both lose some of 1e-5 to the covariance's condition."""
    os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"
    loss = pytest.importorskip("lightly.loss").WMSELoss(
        embedding_dim=width, eps=shrinkage, w_size=count, track_running_stats=False
    )
    points = pair(count, width, torch.float64)
    assert_agree(w_mse_loss(points[0], points[1], shrinkage), loss(torch.cat(points)), points)


def test_whitening_leaves_the_identity_and_no_mean() -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        white = whitened(pair(200, 16, dtype)[0])
        assert white.mean(0).abs().max() < tolerance
        assert (torch.cov(white.T) - torch.eye(16)).abs().max() < tolerance


def test_collapse_is_not_cheap() -> None:
    """Scaling everything towards a point changes nothing; agreeing views cost nothing whatever their spread."""
    first, second = (p.detach().double() for p in pair(40, 8))
    assert float(w_mse_loss(first * 1e-3 + 5, second * 1e-3 + 5)) == pytest.approx(float(w_mse_loss(first, second)))
    assert float(w_mse_loss(first, second)) > 1
    assert float(w_mse_loss(first, first)) == pytest.approx(0, abs=1e-12)


def test_fewer_images_than_outputs_need_the_identity() -> None:
    first, second = pair(6, 16)
    loss = w_mse_loss(first, second, 1e-2)
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, [first, second]))


def test_float32_under_autocast() -> None:
    first, second = (p.detach() for p in pair(64, 16))
    with torch.autocast("cpu", torch.bfloat16):
        inside = w_mse_loss(first, second, 1e-3)
    assert torch.equal(inside, w_mse_loss(first, second, 1e-3))


def test_gradient_flows_into_both_views(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method(WMSE, out=4), make_batch(range(16))
    first, second = (method.projector(method.encoder.pool(method.encoder(v))) for v in method.preview(batch).values())
    out = method.loss(batch, STEP)["loss"]
    assert torch.allclose(out, w_mse_loss(first, second, 1e-3))
    weight = method.projector[0].weight
    (trained,) = torch.autograd.grad(out, weight)
    (stopped,) = torch.autograd.grad(w_mse_loss(first, second.detach(), 1e-3), weight)
    assert (trained - stopped).norm() > 0.1 * trained.norm()  # no stop-gradient anywhere (section 3)


def test_step_is_one_graph(make_method: Any, make_batch: Any, assert_one_graph: Any) -> None:
    assert_one_graph(make_method(WMSE, out=4), make_batch(range(8)))
