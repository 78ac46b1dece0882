"""BYOL: schedule, teacher and stop-gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo
from harness.encoders import build
from harness.heads import momentum_update
from harness.methods.byol import BYOL, byol_loss, teacher_momentum


@pytest.fixture
def method() -> BYOL:
    info = DatasetInfo(
        name="toy", title="Toy", classes=None, image_size=(16, 16), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3,
        counts={}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train",
        mirror_keeps_label=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return BYOL(build("convnet_small", info), BYOL.Config(hidden=32, out=16), info)


@pytest.fixture
def batch() -> Batch:
    indices = torch.arange(6)
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Batch(images, None, indices, hash_seeds(0, 0, indices))


def test_loss_is_eq_2() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    literal = [(a / a.norm() - b / b.norm()).square().sum() for a, b in zip(one, two, strict=True)]
    assert float(byol_loss(one, two)) == pytest.approx(float(torch.stack(literal).mean()), rel=1e-12)
    assert float(byol_loss(one, 3 * one)) == pytest.approx(0)
    assert float(byol_loss(one, -one)) == pytest.approx(4)


def test_schedule_end_points_and_middle() -> None:
    found = [float(teacher_momentum(torch.tensor(p, dtype=torch.float64), 0.99)) for p in (0.0, 0.25, 0.5, 1.0)]
    assert found == pytest.approx([0.99, 1 - 0.01 * (math.cos(math.pi / 4) + 1) / 2, 0.995, 1.0], abs=1e-12)


def test_teacher_follows_and_is_frozen_at_the_end(method: BYOL) -> None:
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.add_(1.0)
    start = [p.clone() for p in method.teacher_encoder.parameters()]
    method.after_step(torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(start, method.teacher_encoder.parameters(), strict=True))
    method.after_step(torch.tensor(0.0))
    for before, now in zip(start, method.teacher_encoder.parameters(), strict=True):
        assert torch.allclose(now - before, torch.full_like(now, 0.01), atol=1e-6)


def test_momentum_update_is_the_weighted_mean() -> None:
    slow, fast = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = [0.7 * a.detach() + 0.3 * b.detach() for a, b in zip(slow.parameters(), fast.parameters(), strict=True)]
    momentum_update(slow, fast, torch.tensor(0.7))
    assert all(torch.allclose(a, b) for a, b in zip(slow.parameters(), expected, strict=True))


def test_teacher_gets_no_gradient_and_is_not_optimised(method: BYOL, batch: Batch) -> None:
    method.loss(batch, torch.tensor(0))["loss"].backward()
    teacher = [*method.teacher_encoder.parameters(), *method.teacher_projector.parameters()]
    assert teacher and all(p.grad is None and not p.requires_grad for p in teacher)
    optimised = {id(p) for group in method.parameter_groups() for p in group["params"]}
    assert not optimised & {id(p) for p in teacher}
    online = [*method.encoder.parameters(), *method.projector.parameters(), *method.predictor.parameters()]
    assert optimised == {id(p) for p in online}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.encoder.parameters())
    assert any(key.startswith("teacher_encoder.") for key in method.state_dict())


def test_the_stop_gradient_is_what_makes_the_gradient() -> None:
    """Targets made by the very weights: same gradient as constant targets, another one if it may flow into them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    first, second = torch.randn(2, 8, 5, generator=generator, dtype=torch.float64)
    (stopped,) = torch.autograd.grad(byol_loss(first @ weight, second @ weight), weight)
    (constant,) = torch.autograd.grad(byol_loss(first @ weight, (second @ weight).detach()), weight)
    flowing_loss = 2 - 2 * functional.cosine_similarity(first @ weight, second @ weight).mean()
    (flowing,) = torch.autograd.grad(flowing_loss, weight)
    assert torch.equal(stopped, constant)
    assert (stopped - flowing).norm() > 0.1 * stopped.norm()


def test_each_view_predicts_the_other(method: BYOL, batch: Batch) -> None:
    first, second = method.preview(batch).values()
    views = torch.cat((first, second))
    predictions = method.predictor(method.projector(method.encoder.pool(method.encoder(views))))
    targets = method.teacher_projector(method.teacher_encoder.pool(method.teacher_encoder(views)))
    expected = byol_loss(predictions[:6], targets[6:]) + byol_loss(predictions[6:], targets[:6])
    assert torch.allclose(method.loss(batch, torch.tensor(0))["loss"], expected, atol=1e-5)
