"""DCL: the criterion against lightly and a slow loop over eq. 6, and what decoupling changes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.methods.dcl import DCL, dcl_loss
from harness.methods.simclr import nt_xent_loss

STEP = torch.tensor(0)


def pair(count: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(count, width, generator=generator).to(dtype).requires_grad_() for _ in range(2)]


def literal_eq_6(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """L_DC of view k of image i: -<z_i^1, z_i^2> / t + log sum over l and j != i of exp(<z_i^k, z_j^l> / t), in float64."""
    z = [[v.double() / v.double().norm() for v in view] for view in (first, second)]
    total = torch.zeros((), dtype=torch.float64)
    for k in (0, 1):
        for i in range(len(first)):
            others = sum((z[k][i] @ z[m][j] / temperature).exp() for m in (0, 1) for j in range(len(first)) if j != i)
            total = total - z[0][i] @ z[1][i] / temperature + torch.log(torch.as_tensor(others))
    return total / (2 * len(first))


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("count", [2, 7])
def test_value_and_gradient_of_eq_6(count: int, temperature: float, assert_agree: Any) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        points = pair(count, 9, dtype)
        found = dcl_loss(points[0], points[1], temperature)
        assert found.dtype == dtype
        assert_agree(found, literal_eq_6(points[0], points[1], temperature), points, tolerance)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize(("count", "width"), [(2, 3), (32, 64)])
def test_agrees_with_lightly(count: int, width: int, temperature: float, assert_agree: Any) -> None:
    os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"
    loss = pytest.importorskip("lightly.loss").DCLLoss(temperature)
    points = pair(count, width)
    assert_agree(dcl_loss(points[0], points[1], temperature), loss(points[0], points[1]), points)


def test_an_easy_positive_still_pulls() -> None:
    """Section 3.1: SimCLR's gradient carries the factor 1 - p of the positive, this one does not."""
    generator = torch.Generator().manual_seed(0)
    first = torch.eye(4, 16).requires_grad_()
    second = first.detach() + 0.02 * torch.randn(4, 16, generator=generator)
    coupled, decoupled = (
        torch.autograd.grad(loss(first, second, 0.1), first)[0].norm() for loss in (nt_xent_loss, dcl_loss)
    )
    assert decoupled > 100 * coupled


def test_method_feeds_both_views(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method(DCL), make_batch(range(6))
    views = torch.cat(tuple(method.preview(batch).values()))
    embeddings = method.projector(method.encoder.pool(method.encoder(views)))
    out = method.loss(batch, STEP)
    assert torch.allclose(out["loss"], dcl_loss(embeddings[:6], embeddings[6:], 0.1))
    assert 0 <= out["retrieval"] <= 1


def test_step_is_one_graph(make_method: Any, make_batch: Any, assert_one_graph: Any) -> None:
    assert_one_graph(make_method(DCL), make_batch(range(6)))
