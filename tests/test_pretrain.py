"""The training loop: resuming gives the bits of an undisturbed run, a bad loss keeps the weights before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import checkpoint, pretrain
from harness.augment import uniform
from harness.batches import Batches
from harness.contracts import Batch
from harness.optim import OptimConfig, Plateau, ScheduleConfig, schedule_factor

CPU = torch.device("cpu")


class Toy(nn.Module):
    """Batch norm, dropout and view noise: everything that resuming could lose."""

    def __init__(self, bad_step: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 3)
        )
        self.bad_step = bad_step

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        noise = uniform(batch.seeds, "noise", (1, 8, 8))
        out = self.net(batch.images.float() / 255 + 0.1 * noise)
        loss = (out - noise[:, 0, :3, 0]).square().mean()
        if self.bad_step is not None:
            loss = loss + torch.where(step >= self.bad_step, torch.inf, 0.0)
        return {"loss": loss, "first": out[:, 0].mean()}


def data(seed: int = 1) -> Batches:
    images = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return Batches(images, None, batch_size=8, seed=seed, device=CPU)


def plan(steps: int = 40, **changes: Any) -> pretrain.Plan:
    optim = OptimConfig(lr=0.05, **changes.pop("optim", {}))
    schedule = ScheduleConfig(**changes.pop("schedule", {}))
    return pretrain.Plan(steps, 1, optim, schedule, bf16=changes.pop("bf16", False), **changes)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([t.flatten().double() for t in module.state_dict().values()])


def train(
    module: nn.Module, p: pretrain.Plan, folder: Path | None = None, stop_at: int | None = None
) -> pretrain.Finished:
    class Stop(Exception):
        pass

    def log(step: int, means: dict[str, float], executed: int) -> None:
        if stop_at is not None and step >= stop_at:
            raise Stop

    try:
        return pretrain.train(module, data(), p, folder, log)
    except Stop:
        return pretrain.Finished([], 0.0, 0, None)


@pytest.mark.parametrize(
    "schedule", [{"name": "cosine"}, {"name": "plateau", "patience": 1}, {"name": "step", "warmup_fraction": 0.2}]
)
@pytest.mark.parametrize("optim", [{"name": "sgd"}, {"name": "adamw"}, {"name": "lars"}])
@pytest.mark.parametrize("bf16", [False, True])
def test_resume_is_bit_identical(tmp_path: Path, schedule: dict[str, Any], optim: dict[str, Any], bf16: bool) -> None:
    p = plan(schedule=schedule, optim=optim, bf16=bf16, checkpoint_seconds=0.0)
    straight = Toy()
    done = train(straight, p)
    for stop in (10, 20, 30):
        train(Toy(), p, tmp_path, stop_at=stop)
    resumed = Toy()
    again = train(resumed, p, tmp_path)
    assert torch.equal(weights(straight), weights(resumed))
    assert [{**point} for point in again.curve] == done.curve
    assert again.executed <= 40 - 20  # the state of the interval before the last stop was used


def test_a_finished_training_runs_no_step(tmp_path: Path) -> None:
    module = Toy()
    assert train(module, plan(), tmp_path).executed == 40
    other = Toy()
    assert train(other, plan(), tmp_path).executed == 0
    assert torch.equal(weights(module), weights(other))


@pytest.mark.parametrize("bad_step", [0, 7, 25, 39])
@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e9])
def test_non_finite_loss_keeps_the_weights_before_it(tmp_path: Path, bad_step: int, checkpoint_seconds: float) -> None:
    p = plan(checkpoint_seconds=checkpoint_seconds)
    module = Toy(bad_step)
    done = train(module, p, tmp_path)
    assert done.failed_at == bad_step
    expected = Toy()
    session = pretrain._Session(expected, data(), p, None, lambda *_: None)
    session.run(bad_step)
    assert torch.isfinite(weights(module)).all()
    assert torch.equal(weights(module), weights(expected))


def test_a_bad_gradient_under_a_good_loss_goes_one_step_further_back() -> None:
    class BadGradient(Toy):
        def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
            losses = super().loss(batch, step)
            if int(step) == 6:  # sqrt has an infinite slope at 0
                losses["loss"] = losses["loss"] + (0 * self.net[0].weight).sum().sqrt() * 1.0
            return losses

    module = BadGradient()
    assert train(module, plan()).failed_at == 6
    assert torch.isfinite(weights(module)).all()


def test_damaged_state_is_refused(tmp_path: Path) -> None:
    train(Toy(), plan(), tmp_path)
    file = next(tmp_path.glob("*.pt"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(Exception, match="does not match"):
        train(Toy(), plan(), tmp_path)


def test_log_covers_every_step_once() -> None:
    total = []
    pretrain.train(Toy(), data(), plan(), None, lambda step, means, executed: total.append((step, executed)))
    assert sum(executed for _, executed in total) == 40
    assert total[-1][0] == 40


def test_order_is_each_image_once_per_epoch_and_independent_of_batch_size() -> None:
    images = torch.arange(48, dtype=torch.uint8).reshape(48, 1, 1, 1)
    small, large = (Batches(images, None, batch_size=b, seed=5, device=CPU) for b in (4, 16))
    first = torch.cat([small.at(s).indices for s in range(12)])
    assert torch.equal(first.sort().values, torch.arange(48))
    assert torch.equal(first, torch.cat([large.at(s).indices for s in range(3)]))
    batch = small.at(2)
    assert torch.equal(batch.images.flatten().long(), batch.indices)
    seeds = dict(zip(first.tolist(), torch.cat([small.at(s).seeds for s in range(12)]).tolist(), strict=True))
    for step in range(3):
        for index, seed in zip(large.at(step).indices.tolist(), large.at(step).seeds.tolist(), strict=True):
            assert seeds[index] == seed
    assert not torch.equal(small.at(12).indices, small.at(0).indices)


def test_schedules_by_hand() -> None:
    step = ScheduleConfig(name="step", milestones=(0.6, 0.85), gamma=0.1)
    assert [round(schedule_factor(step, s, 100), 6) for s in (0, 59, 60, 84, 85, 99)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    cosine = ScheduleConfig(name="cosine", warmup_fraction=0.1)
    assert schedule_factor(cosine, 0, 100) == pytest.approx(0.1)
    assert schedule_factor(cosine, 10, 100) == pytest.approx(1.0)
    assert schedule_factor(cosine, 55, 100) == pytest.approx(0.5)
    plateau = Plateau(ScheduleConfig(name="plateau", patience=2, gamma=0.1))
    for loss in (1.0, 0.9, 0.9, 0.9):
        plateau.epoch_ended(loss)
    assert plateau.factor == pytest.approx(0.1)
    plateau.epoch_ended(0.5)
    assert (plateau.best, plateau.waited) == (0.5, 0)


def test_lars_against_a_plain_loop() -> None:
    from harness.optim import Lars

    torch.manual_seed(0)
    w, b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
    optimizer = Lars([w, b], lr=0.5, momentum=0.9, weight_decay=0.01, trust=0.02)
    expected = [w.detach().clone(), b.detach().clone()]
    speed = [torch.zeros(4, 3), torch.zeros(4)]
    for _ in range(3):
        gradients = [torch.randn(4, 3), torch.randn(4)]
        w.grad, b.grad = (g.clone() for g in gradients)
        optimizer.step()
        for i, gradient in enumerate(gradients):
            update = gradient + 0.01 * expected[i]
            if i == 0:
                update = update * 0.02 * expected[i].norm() / update.norm()
            speed[i] = 0.9 * speed[i] + update
            expected[i] = expected[i] - 0.5 * speed[i]
    assert torch.allclose(w, expected[0], atol=1e-6)
    assert torch.allclose(b, expected[1], atol=1e-6)


def test_biases_and_norms_are_not_decayed() -> None:
    from harness.optim import build

    groups = build(OptimConfig(weight_decay=0.1), [{"params": list(Toy().parameters())}]).param_groups
    assert {p.ndim > 1 for p in groups[0]["params"]} == {True}
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]


def test_checkpoint_holds_plain_values(tmp_path: Path) -> None:
    train(Toy(), plan(), tmp_path)
    state = checkpoint.load_state(tmp_path)
    assert state is not None
    assert state["state"]["step"] == 40
