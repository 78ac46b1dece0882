"""One trial of a search: the ordinary runs of one setting, one per seed, with the test split closed.

A trial is made of runs as `harness run` makes them: same identity, same cache, same rows; nothing in them says that they
belong to a search. While the first seed trains, a cheap probe may look at a copy of the encoder after whole epochs: the
objective's own evaluator on a part of the label budget. It changes no weight and no generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from harness import checkpoint, mirror, records, registry
from harness.arms import Arm, Plan, Request, build_encoder, cells, failure_id, pretext_id
from harness.contracts import Encoder, LabelBudget, Measurement, Row
from harness.evaluation import FeatureCache, Task, private_copy
from harness.grid import Planner
from harness.objectives import COST, Objective, evaluators_of
from harness.runner import ArmRun, Outcome, Reporter, numerics
from harness.search_space import Space

COLLAPSE = registry.DEFAULT_EVALUATORS[-1]  # the label-free evaluator that says whether an encoder has collapsed
QUICK = registry.DEFAULT_EVALUATORS[0]  # what is probed where the objective trains the encoder
PROBED_FIT, PROBED_VALIDATION = 2000, 1000  # images of the label budget that a probe uses at most


@dataclass(frozen=True)
class Search:
    """One method's part of a `tune` command: everything that a worker needs to know.

    request: of the method by default, without a seed and with the test split closed; keys: varied by any method of the
    command; storage: address of the Optuna storage; trials: how many there are to be; compute: device seconds after
    which none is begun, None without a cap
    """

    study: str
    method: str
    request: Request
    objectives: tuple[Objective, ...]
    seeds: tuple[int, ...]
    trials: int
    compute: float | None
    sampler: str
    pruner: str
    space: Space
    keys: tuple[str, ...]
    storage: str

    @property
    def name(self) -> str:
        """Of the Optuna study."""
        return f"{self.study}/{self.method}"

    @property
    def journal(self) -> str:
        """Identity of the study's journal, the parent of its trials in MLflow."""
        return f"study-{self.study}-{self.method}"

    def trial_journal(self, number: int) -> str:
        """Identity of a trial's journal, the parent of its runs in MLflow."""
        return f"{self.journal}-trial-{number}"

    @property
    def evaluators(self) -> tuple[str, ...]:
        """What a trial is measured by."""
        return tuple(dict.fromkeys((*evaluators_of(self.objectives), COLLAPSE)))

    def request_of(self, params: Mapping[str, Any], seed: int, **changes: Any) -> Request:
        """What `harness run` would be asked for one seed of a setting."""
        layers = self.request.layers
        layers = replace(layers, flags={**layers.flags, "seed": seed}, overrides={**layers.overrides, **params})
        return replace(self.request, layers=layers, **changes)


class Pruned(BaseException):
    """Raised by a probe's listener to end a training that is not worth going on with; no failure of the run."""


@dataclass(frozen=True)
class Measured:
    """What one seed of a setting came to. values: one per objective, None where it failed; reason: then its status
    (`NONFINITE`, `OUT_OF_MEMORY`, `FAILED`, `COLLAPSED`); seconds: of the device, cached work included as it was measured
    """

    seed: int
    values: tuple[float, ...] | None
    reason: str | None
    pretrain_ids: tuple[str, ...]
    eval_ids: tuple[str, ...]
    seconds: float
    epochs: int


def measure(
    search: Search,
    request: Request,
    planner: Planner,
    reporter: Reporter,
    look: Callable[[int, float], None] | None = None,
    epochs: Sequence[int] = (),
) -> Measured:
    """Carry out one seed of a setting. Raises HarnessError where it cannot be run, and what `look` raises.

    look: hears (epochs done, value of a probe) after each of `epochs`
    """
    plan = planner.plan(request)
    outcome = Outcome(plan)
    tracker = mirror.Tracking(request.workspace, "none")
    with numerics(plan):
        for arm in plan.arms:
            torch.set_num_threads(arm.config.num_threads or 1)
            run = ArmRun(plan, arm, tracker, reporter, outcome)
            if look is not None:
                run.on_epoch = _probing(plan, arm, search.objectives[0], look, epochs)
            with run.locked():
                try:
                    run.run()
                except Pruned:
                    checkpoint.discard(run.folder / "state")
                    raise
    return _gather(search, plan, outcome.problems)


def _gather(search: Search, plan: Plan, problems: Sequence[str]) -> Measured:
    rows: list[Row] = []
    seconds = cost = 0.0
    eval_ids: list[str] = []
    reason: str | None = None
    for arm in plan.arms:
        names = [pretext_id(arm.pretrain_id), *(cell.eval_id for cell in cells(arm, plan))]
        for eval_id in [*names, failure_id(arm.pretrain_id)]:
            found = records.read(records.rows_path(plan.request.workspace, arm.pretrain_id, eval_id)) or []
            if not found:
                continue
            rows += found
            eval_ids.append(eval_id)
            seconds += found[0].device_seconds or 0.0
            cost += (found[0].device_seconds or 0.0) if eval_id == names[0] else 0.0
            reason = reason or next((row.status for row in found if row.status != "FINISHED"), None)
    if reason is None and any(row.collapsed and arm.plugin.trains for row in rows for arm in plan.arms[:1]):
        reason = "COLLAPSED"
    values = [cost if one.evaluator is None else one.value(row for row in rows if row.evaluator == one.evaluator)
              for one in search.objectives]  # fmt: skip
    whole = [value for value in values if value is not None]
    if reason is None and len(whole) < len(values):
        reason = "FAILED"
    if reason == "FAILED" and problems:
        reason = f"FAILED: {problems[0]}"
    arm = plan.arms[0]
    return Measured(plan.seed, tuple(whole) if reason is None else None, reason,
                    tuple(arm.pretrain_id for arm in plan.arms), tuple(eval_ids), seconds,
                    arm.config.epochs if arm.plugin.trains else 0)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the probe


def _probing(
    plan: Plan, arm: Arm, objective: Objective, look: Callable[[int, float], None], epochs: Sequence[int]
) -> Callable[[Encoder, int], None]:
    def on_epoch(encoder: Encoder, epoch: int) -> None:
        if epoch in epochs:
            value = objective.value(probe(plan, arm, objective, encoder))
            look(epoch, math.nan if value is None else value)

    return on_epoch


def probe(plan: Plan, arm: Arm, objective: Objective, encoder: Encoder) -> list[Measurement]:
    """What an objective's evaluator says of an encoder, on a part of the label budget; linear probing stands in for one
    that trains the encoder. Neither the encoder nor any generator is changed."""
    assert objective.evaluator is not None
    stands_in = registry.load_evaluator(objective.evaluator).trains_encoder
    plugin = registry.load_evaluator(QUICK if stands_in else objective.evaluator)
    config = arm.config.eval.get(plugin.name) or plugin.Config()
    devices = [plan.device] if plan.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        copy = private_copy(encoder)
        if stands_in:
            copy.readouts = copy.readouts[:1]
        elif objective.readout in copy.readouts:
            copy.readouts = (objective.readout,)
        task = Task(copy, plan.material.info, arm.config.seed, plan.device, plan.material, _part(arm.budgets[0]),
                    FeatureCache(), arm.config.precision == "bf16", plan.request.workspace, lambda *_: None, math.inf,
                    trains_encoder=False)  # fmt: skip
        found = plugin(config).evaluate(task).measurements
    if stands_in:  # of its network fine-tuning says one number, and so does its stand-in
        return [replace(one, readout=None) for one in found]
    return found


def _part(budget: LabelBudget) -> LabelBudget:
    """The first images of the first validation round; budget order is a random order."""
    if not budget.rounds:
        return budget
    fit, held_out = (np.sort(part) for part in budget.rounds[0])
    fit, held_out = fit[:PROBED_FIT], held_out[:PROBED_VALIDATION]
    kept = np.concatenate([fit, held_out])
    rounds = ((np.arange(len(fit)), np.arange(len(fit), len(kept))),)
    return replace(budget, indices=budget.indices[kept], rounds=rounds, fold=None, sha256=f"{budget.sha256}/part")


def known_values(plan: Plan, objective: Objective) -> list[str]:
    """What an objective's evaluator measures on validation, as objectives: asked of the untrained encoder."""
    arm = plan.arms[0]
    encoder = build_encoder(arm.method, arm.config, plan.material.info).to(plan.device).eval()
    found = probe(plan, arm, objective, encoder)
    names = [".".join(str(w) for w in (objective.evaluator, m.readout, m.metric) if w) for m in found
             if m.split == "validation" and m.value is not None]  # fmt: skip
    return list(dict.fromkeys(names))


__all__ = ["COST", "Measured", "Pruned", "Search", "known_values", "measure", "probe"]
