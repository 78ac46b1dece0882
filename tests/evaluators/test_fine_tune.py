"""Fine-tuning: it learns, chooses on validation only, extends its grid, says when it did not converge."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from harness.contracts import HarnessError, TrainingOutcome
from harness.evaluators import fine_tune
from harness.evaluators.fine_tune import FineTune, Network
from harness.optim import ScheduleConfig


def _config(**settings: Any) -> FineTune.Config:
    """Two short trainings instead of a grid."""
    quick = {"learning_rates": (0.1, 0.3), "max_extensions": 0, "max_doublings": 0, "min_steps": 60, "epochs": 0.1}
    return FineTune.Config(**(quick | settings))


def test_rows_order_of_events_and_repeatability(make_task: Any) -> None:
    task = make_task("300")
    task.encoder.eval().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in task.encoder.state_dict().items()}
    generator = torch.get_rng_state()
    result = FineTune(_config()).evaluate(task)
    assert [(m.split, m.metric) for m in result.measurements] == [
        ("validation", "top1"), ("validation", "fit_loss"), ("test", "top1"), ("test", "nll"), ("test", "fit_loss"),
    ]  # fmt: skip
    assert all(m.readout is None and math.isfinite(m.value) for m in result.measurements)
    assert result.measurements[2].value > 0.3 and result.steps_executed == 180  # 60 steps of 16: chance is 0.1
    assert len(result.predictions["network"]) == 500
    best = result.chosen["learning_rate"]
    keys = ["round0/lr0.1", "round0/lr0.3", f"refit/lr{best:g}"]
    trained = [event for event in task.events if event.startswith("train")]
    assert trained == [f"train fine_tune/steps60/{key}" for key in keys]
    assert [event for event in task.events if "test" in event] == task.events[-2:] == ["images test", "labels test"]
    after = task.encoder.state_dict()
    assert not task.encoder.training and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in task.encoder.parameters())
    assert torch.equal(generator, torch.get_rng_state())
    assert FineTune(_config()).evaluate(make_task("300")).measurements == result.measurements


def test_without_a_test_split(make_task: Any) -> None:
    result = FineTune(_config()).evaluate(make_task("300", has_test=False, poison_test=True))
    assert {m.split for m in result.measurements} == {"validation"}


def test_the_head_depends_on_the_seed_alone(make_task: Any) -> None:
    encoder = make_task().encoder
    torch.manual_seed(5)
    first = Network(encoder, 10, False, 7).head.state_dict()
    torch.manual_seed(6)
    second, other = Network(encoder, 10, False, 7).head.state_dict(), Network(encoder, 10, False, 8).head.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def _scripted(monkeypatch: pytest.MonkeyPatch, task: Any, top1: Any, converged: Any = lambda rate, steps: True) -> None:
    """Replace training and measuring by a function of the rate."""

    def validate(arm: fine_tune._Arm, rate: float) -> None:
        task.events.append(f"validate {rate:g} {arm.steps}")
        arm.scores[rate] = top1(rate), 0.0
        arm.fits[rate] = 0.5, converged(rate, arm.steps)

    monkeypatch.setattr(fine_tune._Arm, "_validate", validate)


@pytest.mark.parametrize(
    ("peak", "tried", "at_edge"),
    [
        (0.03, [0.01, 0.03, 0.1, 0.3], False),
        (0.9, [0.01, 0.03, 0.1, 0.3, 0.9, 2.7], False),
        (100.0, [0.01, 0.03, 0.1, 0.3, 0.9, 2.7], True),
        (1e-5, [0.00111111, 0.00333333, 0.01, 0.03, 0.1, 0.3], True),
    ],
)
def test_a_best_rate_at_the_edge_extends_the_grid(
    make_task: Any, monkeypatch: pytest.MonkeyPatch, peak: float, tried: list[float], at_edge: bool
) -> None:
    task = make_task("300", has_test=False)
    _scripted(monkeypatch, task, lambda rate: -abs(math.log(rate / peak)))
    chosen = FineTune(FineTune.Config()).evaluate(task).chosen
    assert chosen["tried"] == pytest.approx(tried) and chosen["at_edge"] is at_edge


def test_steps_double_until_the_chosen_rate_converges(make_task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task("300", has_test=False)
    _scripted(monkeypatch, task, lambda rate: -abs(rate - 0.1), lambda rate, steps: steps >= 1200)
    result = FineTune(FineTune.Config()).evaluate(task)
    assert result.chosen["steps"] == 1200 and all(m.converged for m in result.measurements)
    result = FineTune(FineTune.Config(max_doublings=1)).evaluate(task)
    assert result.chosen["steps"] == 600 and not any(m.converged for m in result.measurements)


@pytest.mark.parametrize("spec", ["1pc", "3pc", "25pc"])
def test_few_labels_leave_no_choice(make_task: Any, spec: str) -> None:
    task = make_task(spec)
    result = FineTune(_config(min_steps=10)).evaluate(task)
    assert result.chosen["tried"] == [FineTune.Config().default_learning_rate]
    assert len([e for e in task.events if e.startswith("train")]) == len(task.budget.rounds) + 1
    assert {m.split for m in result.measurements} == ({"test"} if spec == "1pc" else {"validation", "test"})


def test_steps_of_the_fit_decide_those_of_the_refit(make_task: Any) -> None:
    task = make_task("1000", has_test=False)
    arm = fine_tune._Arm(task, FineTune.Config(epochs=50))
    assert (arm.batch_size, arm.steps) == (32, 1250)  # 800 images to fit


def test_an_untrained_network_has_not_converged(make_task: Any) -> None:
    result = FineTune(_config(min_steps=2)).evaluate(make_task("300"))
    assert not any(m.converged for m in result.measurements)


def test_divergence_becomes_a_status_and_is_never_chosen(make_task: Any) -> None:
    task = make_task("300")
    plain = type(task).trainer

    def diverge(key: str, *args: Any, **settings: Any) -> TrainingOutcome:
        done = plain(task, key, *args, **settings)
        bad = settings["optim"].lr > 0.2
        return TrainingOutcome(math.nan if bad else done.final_loss, done.losses, done.executed, not bad)

    task.trainer = diverge
    result = FineTune(_config()).evaluate(task)
    assert result.chosen["learning_rate"] == 0.1
    result = FineTune(_config(learning_rates=(0.3, 0.9))).evaluate(task)
    assert [(m.split, m.metric, m.value, m.status) for m in result.measurements] == [
        ("validation", "status", None, "NONFINITE"), ("test", "status", None, "NONFINITE"),
    ]  # fmt: skip


@pytest.mark.parametrize("depth", [1, 2])
def test_frozen_layers_keep_their_bits(make_task: Any, depth: int) -> None:
    task = make_task("300")
    network = Network(task.encoder, 10, False, 0)
    network.freeze(depth, task.images("train"))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    task.trainer(
        "x", network, task.images("train"), torch.from_numpy(task.labels("train")), steps=5, batch_size=32, seed=0,
        optim=fine_tune.OptimConfig(), schedule=ScheduleConfig(),
    )  # fmt: skip
    kept = ("encoder.mean", "encoder.std", "encoder.one", "encoder.two")[: 2 + depth]
    for name, tensor in network.state_dict().items():
        assert torch.equal(before[name], tensor) == name.startswith(kept), name


def test_transfer_depth_beyond_the_encoder_is_refused(make_task: Any) -> None:
    with pytest.raises(HarnessError, match="2 layers"):
        FineTune(FineTune.Config(transfer_depth=3)).evaluate(make_task("300"))


def test_head_first_trains_the_head_alone_and_then_all(make_task: Any) -> None:
    task = make_task("10pc")
    result = FineTune(_config(head_first_steps=5, min_steps=7)).evaluate(task)
    trained = [event.rpartition("steps7/")[2] for event in task.events if event.startswith("train")]
    assert trained == ["round0/lr0.03/head", "round0/lr0.03", "refit/lr0.03/head", "refit/lr0.03"]
    assert result.steps_executed == 24


def test_settled_losses() -> None:
    falling = tuple((step, math.exp(-step / 20)) for step in range(1, 101))
    flat = tuple((step, 1.0) for step in range(1, 101))
    assert fine_tune._settled(flat) and not fine_tune._settled(falling) and not fine_tune._settled(flat[:1])


def test_predictions_do_not_depend_on_test_labels(make_task: Any) -> None:
    honest, planted = make_task("10pc"), make_task("10pc")
    planted.test_labels = np.zeros_like(planted.test_labels)
    a, b = (FineTune(_config(min_steps=20)).evaluate(task) for task in (honest, planted))
    assert np.array_equal(a.predictions["network"], b.predictions["network"])
