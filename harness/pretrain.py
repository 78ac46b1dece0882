"""The training loop, used for pretraining and, lent to evaluators, for fine-tuning.

The order of images, their views and the dropout masks are functions of (seed, step) alone, so a run that was killed
and resumed from its last state gives the bits of an undisturbed one (same machine type, device type and threads).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import checkpoint
from harness import optim as optimisers
from harness.batches import Batches
from harness.contracts import Method
from harness.step import Mode, Step, StepConfig


@dataclass(frozen=True)
class Plan:
    """How long, how and with what rhythm to train. log_every and checkpoint_seconds never change a number."""

    steps: int
    seed: int
    optim: optimisers.OptimConfig
    schedule: optimisers.ScheduleConfig
    bf16: bool
    checkpoint_seconds: float = 10.0
    accumulate: int = 1
    mode: Mode = "off"

    @property
    def log_every(self) -> int:
        return max(10, self.steps // 200)


@dataclass
class State:
    """Everything that moves during training, beside the module and the optimiser."""

    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    epoch_sum: float = 0.0
    failed_at: int | None = None


@dataclass(frozen=True)
class Finished:
    """curve: [{"step": n, "loss": mean, ...monitors}]; seconds over all attempts; executed steps of this process;
    mode: how the steps were made, after any fall-back."""

    curve: list[dict[str, float]]
    seconds: float
    executed: int
    failed_at: int | None
    mode: Mode = "off"


LogFunction = Callable[[int, dict[str, float], int], None]
EpochFunction = Callable[[int], None]


def train(
    module: nn.Module,
    data: Batches,
    plan: Plan,
    folder: Path | None,
    on_log: LogFunction,
    note: Callable[[str], None] = lambda _: None,
    on_epoch: EpochFunction | None = None,
) -> Finished:
    """Optimise `module.loss(batch, step)["loss"]` in place; resume from `folder` if it holds a state.

    `on_log(step, means, executed)` is called once per log interval, with the means since the last call, and is the
    only place where the loop waits for the device. A non-finite loss ends training with the weights before it
    (`failed_at`): they are had by going back to the last state and repeating the good steps. `note` hears of it when
    steps cannot be compiled or captured as planned. `on_epoch(epochs)` is called after each whole epoch but the last;
    it may look at the module, must not change it or a generator, and what it raises ends training. Its time is not
    counted as training's.
    """
    session = _Session(module, data, plan, folder, on_log, note, on_epoch)
    try:
        session.restore()
        start = session.state.step
        session.run(plan.steps)
        executed = session.state.step - start
        if session.state.failed_at is None and executed and not session._finite():
            session.state.failed_at = session.state.step - 1  # a bad gradient at the very last step
        if session.state.failed_at is not None:
            session.go_back(session.state.failed_at)
        session.save()
        state = session.state
        return Finished(state.curve, state.seconds, executed, state.failed_at, session.step.mode)
    finally:  # a capture's memory, gradients and reading threads end with the training
        session.step.reset()
        session.optimizer.zero_grad(set_to_none=True)
        data.close()


class _Session:
    """One attempt at one training."""

    def __init__(
        self,
        module: nn.Module,
        data: Batches,
        plan: Plan,
        folder: Path | None,
        on_log: LogFunction,
        note: Callable[[str], None] = lambda _: None,
        on_epoch: EpochFunction | None = None,
    ) -> None:
        self.on_epoch = on_epoch
        self.module, self.data, self.plan, self.folder, self.on_log = module, data, plan, folder, on_log
        groups = module.parameter_groups() if isinstance(module, Method) else [{"params": list(module.parameters())}]
        self.optimizer = optimisers.build(plan.optim, groups)
        self.plateau = optimisers.Plateau(plan.schedule)
        config = StepConfig(plan.bf16, plan.optim.clip_norm, plan.accumulate, plan.mode)
        self.step = Step(module, self.optimizer, config, data.device, plan.seed, note)
        self.state = State()
        self._initial = copy.deepcopy(self._snapshot())

    def _snapshot(self) -> dict[str, Any]:
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "plateau": self.plateau.state(),
            "state": vars(self.state).copy(),
        }

    def restore(self) -> None:
        """Go back to the last saved state, or to the start."""
        saved = (checkpoint.load_state(self.folder) if self.folder else None) or copy.deepcopy(self._initial)
        self.module.load_state_dict(saved["module"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step.reset()
        self.plateau.load(saved["plateau"])
        self.state = State(**saved["state"])

    def go_back(self, bad: int) -> None:
        """Repeat the good steps only: all before `bad`, and one less where the step before it had a bad gradient."""
        for stop in (bad, bad - 1):
            self.restore()
            self.run(stop, watch=False)
            self.state.failed_at = stop
            if stop <= 0 or self._finite():
                return

    def _finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.step.parameters)

    def save(self) -> None:
        if self.folder:
            checkpoint.save_state(self.folder, self.state.step, self._snapshot())
        self._saved_at = time.monotonic()

    def run(self, until: int, watch: bool = True) -> None:
        """The loop. `watch` False repeats steps known to be good without logging or saving."""
        plan, state, epoch_steps = self.plan, self.state, self.data.steps_per_epoch
        self.module.train()
        self._saved_at, began, before = time.monotonic(), time.monotonic(), state.seconds
        counted = executed = 0
        while state.step < until:
            if state.step % epoch_steps == 0 and isinstance(self.module, Method):
                self.module.on_epoch_start(self.data, state.step // epoch_steps)
            factor = optimisers.schedule_factor(plan.schedule, state.step, plan.steps) * self.plateau.factor
            batch, done = self.data.at(state.step), (state.step + 1) / plan.steps
            self.step(batch, state.step, done, plan.optim.lr * factor)
            state.step, counted, executed = state.step + 1, counted + 1, executed + 1
            if watch and self.on_epoch and state.step % epoch_steps == 0 and state.step < plan.steps:
                paused = time.monotonic()
                self.on_epoch(state.step // epoch_steps)
                began += time.monotonic() - paused
            epoch_ended = plan.schedule.name == "plateau" and state.step % epoch_steps == 0
            if state.step % plan.log_every and state.step < until and not epoch_ended:
                continue
            sums, bad = self.step.read()  # one read of the device per interval
            state.seconds = before + time.monotonic() - began
            if watch and bad >= 0:
                state.failed_at = bad
                return
            self._interval_ended(sums, counted, epoch_ended, executed if watch else None)
            counted = executed = 0

    def _interval_ended(self, sums: dict[str, float], counted: int, epoch_ended: bool, executed: int | None) -> None:
        state = self.state
        means = {name: value / counted for name, value in sums.items()}
        state.curve.append({"step": float(state.step), **means})
        state.epoch_sum += sums["loss"]
        if epoch_ended:
            self.plateau.epoch_ended(state.epoch_sum / self.data.steps_per_epoch)
            state.epoch_sum = 0.0
        if executed is not None:
            if time.monotonic() - self._saved_at >= self.plan.checkpoint_seconds and self._finite():
                self.save()  # never a state that a bad gradient has spoilt: going back needs a good one
            self.on_log(state.step, means, executed)
