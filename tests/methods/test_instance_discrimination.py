"""Instance discrimination: the criterion against a slow loop over eq. 2, and what the bank holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.batches import Batches
from harness.heads import unit_rows
from harness.methods.instance_discrimination import InstanceDiscrimination, instance_discrimination_loss

STEP = torch.tensor(0)


def literal_eq_2(features: Tensor, bank: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """Eqs. 2 and 3 word by word, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for v, i in zip(features.double(), indices.tolist(), strict=True):
        shares = [(row.double() / row.double().norm() @ v / v.norm() / temperature).exp() for row in bank]
        total = total - torch.log(shares[i] / sum(shares))
    return total / len(features)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize(("count", "rows", "width"), [(3, 6, 3), (5, 30, 8)])
def test_value_and_gradient_of_eq_2(count: int, rows: int, width: int, temperature: float, assert_agree: Any) -> None:
    generator = torch.Generator().manual_seed(rows)
    indices = torch.randperm(rows, generator=generator)[:count]
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        features = torch.randn(count, width, generator=generator).to(dtype).requires_grad_()
        bank = torch.randn(rows, width, generator=generator).to(dtype)
        found = instance_discrimination_loss(features, bank, indices, temperature)
        assert found.dtype == dtype
        assert_agree(found, literal_eq_2(features, bank, indices, temperature), [features], tolerance)


def test_chance_and_autocast() -> None:
    equal = torch.ones(9, 4)
    assert float(instance_discrimination_loss(equal[:3], equal, torch.arange(3), 0.07)) == pytest.approx(math.log(9))
    features, bank = torch.randn(2, 16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = instance_discrimination_loss(features, bank, torch.arange(16), 0.07)
    assert torch.equal(inside, instance_discrimination_loss(features, bank, torch.arange(16), 0.07))


def prepared(make_method: Any, make_batch: Any, count: int = 24, **settings: Any) -> InstanceDiscrimination:
    method: InstanceDiscrimination = make_method(InstanceDiscrimination, **settings)
    images = make_batch(range(count)).images
    method.prepare(Batches(images, None, batch_size=8, seed=0, device=torch.device("cpu")))
    return method


def test_the_bank_has_one_feature_per_image_of_the_untrained_network(make_method: Any, make_batch: Any) -> None:
    assert make_method(InstanceDiscrimination).bank.shape == (64, 16)  # what the data set says, before the data is seen
    method = prepared(make_method, make_batch)
    assert method.bank.shape == (24, 16)
    third = make_batch(range(16, 24))
    assert torch.allclose(method.bank[16:], unit_rows(method.features(third.images)), atol=1e-5)
    assert torch.allclose(method.bank.norm(dim=1), torch.ones(24))


def test_only_the_batch_s_rows_change_and_after_the_loss(make_method: Any, make_batch: Any) -> None:
    method, batch = prepared(make_method, make_batch, kept=0.25), make_batch([3, 20, 7, 11])
    before, place = method.bank.clone(), method.bank.data_ptr()
    features = method.features(method.preview(batch)["view"])
    expected = instance_discrimination_loss(features, before, batch.indices, 0.07)
    loss = method.loss(batch, STEP)["loss"]
    assert torch.allclose(loss, expected)
    loss.backward()  # would raise if what it saved had been overwritten
    assert method.bank.data_ptr() == place and not method.bank.requires_grad
    untouched = torch.ones(24, dtype=torch.bool)
    untouched[batch.indices] = False
    assert torch.equal(method.bank[untouched], before[untouched])
    mixed = unit_rows(0.25 * before[batch.indices] + 0.75 * unit_rows(features.detach()))
    assert torch.allclose(method.bank[batch.indices], mixed, atol=1e-5)


def test_gradient_reaches_the_encoder_and_not_the_bank(make_method: Any, make_batch: Any) -> None:
    method = prepared(make_method, make_batch)
    method.loss(make_batch(range(8)), STEP)["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.encoder.parameters())
    assert "bank" in method.state_dict() and method.bank.grad is None


def test_step_is_one_graph(make_method: Any, make_batch: Any, assert_one_graph: Any) -> None:
    assert_one_graph(prepared(make_method, make_batch), make_batch(range(6)))
