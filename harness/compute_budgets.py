"""`--budget`: how long a method may train, said in images, epochs or seconds; the one that allows least binds.

images=5e6 is passes over the pretraining images, rounded; seconds=600 is turned into epochs by a short probe of the very
training. Epochs are part of a run's identity, so what a probe said is written down once (`.harness/budgets/`) and used by
every later command on the workspace: otherwise a restart would train something else.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from harness import durable, fingerprint, mirror, pretrain
from harness.arms import Arm, Plan
from harness.config import dotted
from harness.contracts import HarnessError
from harness.runner import ArmRun, Outcome, Silent, numerics

PARTS = ("images", "epochs", "seconds")
WARM_UP_LOGS = 1  # of the probe: the first steps allocate, compile and fill caches
PROBE_LOGS, PROBE_SECONDS = 8, 5.0  # it ends after so many further logs of 10 steps, or so long


@dataclass(frozen=True)
class Budget:
    """Limits of one pretraining; None: not limited."""

    images: float | None = None
    epochs: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Bound:
    """What a budget came to for one setup. binds: the part that did, as typed; images_per_second: of a probe."""

    epochs: int
    binds: str
    images: int
    images_per_second: float | None = None

    def __str__(self) -> str:
        speed = "" if self.images_per_second is None else f" (measured: {self.images_per_second:,.0f} images/s)"
        return f"{self.epochs} epochs, {self.images:,} images: {self.binds} binds{speed}"


def parse_budget(text: str) -> Budget:
    """`images=5e6`, `epochs=50`, `seconds=600` or several, comma-separated. Raises HarnessError for anything else."""
    values: dict[str, float] = {}
    for word in text.split(","):
        key, _, number = (part.strip() for part in word.partition("="))
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if key not in PARTS or key in values or not 0 < value < 1e15 or (key == "epochs" and value != int(value)):
            raise HarnessError(
                f"--budget '{text}' is not understood; write images=5e6, epochs=50 or seconds=600, or several"
            )
        values[key] = value
    epochs = values.get("epochs")
    return Budget(values.get("images"), None if epochs is None else int(epochs), values.get("seconds"))


def resolve_budget(budget: Budget, plan: Plan, workspace: Path, record: bool = True) -> Bound:
    """The epochs that a budget allows the first arm of `plan` that trains.

    record: keep what a probe measured for later commands; without it (a dry run) nothing is written
    """
    arm = next((arm for arm in plan.arms if arm.plugin.trains), plan.arms[0])
    count = len(plan.material.pretrain_images)
    per_epoch = count // arm.config.batch_size * arm.config.batch_size
    allowed: dict[str, int] = {}
    if budget.images is not None:
        allowed[f"images={budget.images:g}"] = max(1, round(budget.images / count))
    if budget.epochs is not None:
        allowed[f"epochs={budget.epochs}"] = budget.epochs
    speed = None
    if budget.seconds is not None:
        speed = _speed(plan, arm, workspace, record)
        allowed[f"seconds={budget.seconds:g}"] = max(1, int(budget.seconds * speed / per_epoch))
    binds = min(allowed, key=lambda part: allowed[part])
    return Bound(allowed[binds], binds, allowed[binds] * per_epoch, speed)


def _speed(plan: Plan, arm: Arm, workspace: Path, record: bool) -> float:
    """Images per second of an arm's training: what was written down, else measured now."""
    settings = {
        k: v for k, v in dotted(arm.config).items() if k not in ("epochs", "seed") and not k.startswith("eval.")
    }
    kind: dict[str, Any] = {
        "settings": settings,
        "device": plan.device.type,
        "images": len(plan.material.pretrain_images),
    }
    path = workspace / ".harness" / "budgets" / f"{fingerprint.short_id(kind)}.json"
    with durable.locked(path.with_suffix(".lock")) if record else contextlib.nullcontext():
        known = durable.read_sealed(path) if path.exists() else None
        if known is None:
            known = {**kind, "images_per_second": measure(plan, arm)}
            if record:
                durable.write_sealed(path, known)
    return float(known["images_per_second"])


class _Enough(Exception):
    """The probe has seen what it needs."""


def measure(plan: Plan, arm: Arm) -> float:
    """Images per second of the first steps of an arm, its optimiser and schedule included; nothing is kept."""
    run = ArmRun(plan, arm, mirror.Tracking(plan.request.workspace, "none"), Silent(), Outcome(plan))
    logs: list[tuple[float, int]] = []

    def on_log(step: int, means: dict[str, float], executed: int) -> None:
        logs.append((time.monotonic(), step))
        measured = len(logs) - WARM_UP_LOGS
        if measured >= PROBE_LOGS or (measured > 0 and logs[-1][0] - logs[0][0] > PROBE_SECONDS):
            raise _Enough

    with numerics(plan):
        torch.set_num_threads(arm.config.num_threads or 1)
        method, _ = run.prepared()
        steps = 10 * (WARM_UP_LOGS + PROBE_LOGS)
        with contextlib.suppress(_Enough):
            pretrain.train(method, run.training_data(), replace(run.training_plan(), steps=steps), None, on_log)
    seconds, steps = logs[-1][0] - logs[0][0], logs[-1][1] - logs[0][1]
    return steps * arm.batch_size / seconds


__all__ = ["Bound", "Budget", "measure", "parse_budget", "resolve_budget"]
