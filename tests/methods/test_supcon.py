"""SupCon: the criterion against a slow loop over eq. 2, its limits, and that it is a ceiling and not everyone's control."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.contracts import HarnessError
from harness.encoders import build
from harness.methods.simclr import nt_xent_loss
from harness.methods.supcon import SupCon, supcon_loss

STEP = torch.tensor(0)


def pair(count: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(count, width, generator=generator).to(dtype).requires_grad_() for _ in range(2)]


def literal_eq_2(first: Tensor, second: Tensor, labels: list[int], temperature: float) -> Tensor:
    """L_out of section 3.2.2 word by word: the mean over positives outside the logarithm, in float64."""
    z = [v.double() / v.double().norm() for v in (*first, *second)]
    classes = labels * 2
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        below = sum((z[i] @ z[a] / temperature).exp() for a in others)
        positives = [p for p in others if classes[p] == classes[i]]
        for p in positives:
            total = total - torch.log((z[i] @ z[p] / temperature).exp() / below) / len(positives)
    return total / len(z)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("labels", [[0, 1], [2, 0, 2, 1, 0, 2, 1], [1, 1, 1]])
def test_value_and_gradient_of_eq_2(labels: list[int], temperature: float, assert_agree: Any) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        points = pair(len(labels), 9, dtype)
        found = supcon_loss(points[0], points[1], torch.tensor(labels), temperature)
        assert found.dtype == dtype
        assert_agree(found, literal_eq_2(points[0], points[1], labels, temperature), points, tolerance)


def test_all_labels_different_is_simclr(assert_agree: Any) -> None:
    points = pair(9, 5)
    assert_agree(
        supcon_loss(points[0], points[1], torch.arange(9), 0.2), nt_xent_loss(points[0], points[1], 0.2), points
    )


def test_it_is_declared_supervised_and_no_control() -> None:
    assert SupCon.supervised and SupCon.role is None


def test_labels_decide(make_method: Any, make_batch: Any, toy_info: Any) -> None:
    method = make_method(SupCon)
    labels = [0, 1, 2, 0, 1, 2]
    batch = make_batch(range(6), labels)
    views = torch.cat(tuple(method.preview(batch).values()))
    embeddings = method.projector(method.encoder.pool(method.encoder(views)))
    expected = supcon_loss(embeddings[:6], embeddings[6:], torch.tensor(labels), 0.1)
    assert torch.allclose(method.loss(batch, STEP)["loss"], expected)
    assert not torch.allclose(method.loss(make_batch(range(6), [0] * 3 + [1] * 3), STEP)["loss"], expected)
    with pytest.raises(HarnessError, match="without labels"):
        method.loss(make_batch(range(6)), STEP)
    unlabelled = replace(toy_info, classes=None)
    with pytest.raises(HarnessError, match="at least 2 classes; toy has 0"):
        SupCon(build("convnet_small", unlabelled), SupCon.Config(), unlabelled)


def test_step_is_one_graph(make_method: Any, make_batch: Any, assert_one_graph: Any) -> None:
    assert_one_graph(make_method(SupCon), make_batch(range(6), [0, 1, 2, 0, 1, 2]))
