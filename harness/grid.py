"""Which pretrainings and evaluations a grid consists of, and which of them a workspace still lacks.

Every combination of a grid (harness.grid_setups) is planned as `harness run` plans it; arms that several combinations share
(controls, floors, a pretraining under several label budgets) are one cell. Nothing here trains or writes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from harness import floor, records
from harness.arms import Arm, Plan, Request, build_method, cells, failure_id, make_plan, pretext_id
from harness.compute_budgets import Bound
from harness.config import dotted
from harness.contracts import HarnessError, Status
from harness.grid_setups import Grid, Setup, request_of, settings_of, setups


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a cell."""

    evaluator: str
    labels: str | None
    fold: int | None
    eval_id: str


@dataclass(frozen=True)
class Cell:
    """One pretraining and every evaluation that the grid wants of it.

    role: `method`, `null control`, `control` or `floor`; requests: each leads to a plan that holds it, one per budget
    images: drawn in training; flops_per_image: of a training step, None where it was not counted
    """

    pretrain_id: str
    method: str
    role: str
    dataset: str
    encoder: str
    seed: int
    point: tuple[tuple[str, Any], ...]
    steps: int
    batch_size: int
    device: str
    precision: str
    num_threads: int
    requests: tuple[Request, ...]
    evaluations: tuple[Evaluation, ...]
    flops_per_image: float | None = None

    @property
    def images(self) -> int:
        return self.steps * self.batch_size

    @property
    def eval_ids(self) -> list[str]:
        """Of the pretraining's own rows and of every evaluation."""
        return [pretext_id(self.pretrain_id), *(e.eval_id for e in self.evaluations)]

    def __str__(self) -> str:
        point = "".join(f", {key}={value}" for key, value in self.point)
        return f"{self.method} on {self.dataset}, seed {self.seed}{point}"


@dataclass
class Planned:
    """cells: each once, in the order in which they are run; refused: combination -> why it cannot be run; bounds: what
    --budget came to."""

    cells: list[Cell]
    refused: dict[str, str]
    bounds: dict[str, Bound]


class Planner:
    """Plans requests one after the other and opens the data of neighbours once."""

    def __init__(self) -> None:
        self._last: tuple[tuple[Any, ...], Plan] | None = None

    def plan(self, request: Request, fetch: bool = False) -> Plan:
        """See harness.arms.make_plan."""
        data = settings_of(request).data
        key = (request.dataset, request.data_dir, request.allow_test, data.image_size, data.pretrain_split,
               data.num_pretrain_images is None)  # fmt: skip
        beside = self._last[1] if self._last and self._last[0] == key else None
        self._last = None  # the images of another data set must not stay beside the new ones
        plan = make_plan(request, fetch, beside)
        self._last = (key, plan)
        return plan


def plan_cells(
    grid: Grid,
    base: Request,
    *,
    fetch: bool = False,
    flops: bool = False,
    bound_of: Callable[[Plan], Bound] | None = None,
) -> Planned:
    """Plan every combination. A wrong setting ends it with HarnessError; a combination that cannot be run is refused.

    fetch: download missing data first; flops: count the arithmetic of every kind of training step
    bound_of: what --budget allows a setup, said of a plan without it
    Raises HarnessError as well when every combination is refused.
    """
    planner, found = Planner(), Planned([], {}, {})
    gathered: dict[str, Cell] = {}
    counted: dict[str, float | None] = {}
    groups = list(setups(grid))
    for setup in itertools.chain.from_iterable(groups):
        settings_of(request_of(grid, base, setup, grid.seeds[0], grid.labels[0], None))
    for group in groups:
        epochs: dict[Setup, int] = {}
        for seed, setup, labels in itertools.product(grid.seeds, group, grid.labels):
            words = f"{setup}, labels {labels}"
            if words in found.refused:
                continue
            try:
                if bound_of is not None and setup not in epochs:
                    bound = bound_of(planner.plan(request_of(grid, base, setup, seed, labels, None), fetch))
                    found.bounds[str(setup)], epochs[setup] = bound, bound.epochs
                plan = planner.plan(request_of(grid, base, setup, seed, labels, epochs.get(setup)), fetch)
            except HarnessError as error:
                found.refused[words] = str(error)
                continue
            for arm in plan.arms:
                _gather(gathered, arm, plan, setup)
                if flops:
                    _count(gathered, arm, plan, counted)
    if not gathered:
        raise HarnessError(next(iter(found.refused.values())))
    found.cells = list(gathered.values())
    return found


def cells_of(requests: Iterable[Request], planner: Planner) -> list[Cell]:
    """The cells of single requests, each once. Raises HarnessError for a request that cannot be met."""
    gathered: dict[str, Cell] = {}
    for request in requests:
        plan = planner.plan(request)
        for arm in plan.arms:
            _gather(gathered, arm, plan, Setup(request.method, request.dataset, None))
    return list(gathered.values())


def _gather(gathered: dict[str, Cell], arm: Arm, plan: Plan, setup: Setup) -> None:
    """Add an arm to the cells; one that is there already gets the evaluations that are new."""
    wanted = [
        Evaluation(cell.evaluator, cell.budget.spec if cell.budget else None, cell.budget.fold if cell.budget else None,
                   cell.eval_id)
        for cell in cells(arm, plan)
    ]  # fmt: skip
    known = gathered.get(arm.pretrain_id)
    if known is None:
        config = arm.config
        gathered[arm.pretrain_id] = Cell(
            arm.pretrain_id, arm.method, arm.role, config.dataset_name, arm.encoder, config.seed, setup.point, arm.steps,
            arm.batch_size, plan.device.type, config.precision, config.num_threads or 1, (plan.request,), tuple(wanted),
        )  # fmt: skip
        return
    ids = {evaluation.eval_id for evaluation in known.evaluations}
    if new := tuple(e for e in wanted if e.eval_id not in ids):
        gathered[arm.pretrain_id] = replace(
            known, requests=(*known.requests, plan.request), evaluations=known.evaluations + new
        )


def _count(gathered: dict[str, Cell], arm: Arm, plan: Plan, counted: dict[str, float | None]) -> None:
    """Set a cell's flops_per_image; steps that differ in the seed alone are counted once."""
    cell = gathered[arm.pretrain_id]
    if not arm.plugin.trains or cell.flops_per_image is not None:
        return
    settings = {k: v for k, v in dotted(arm.config).items() if k.startswith(("encoder.", "method.", "data.image_size"))}
    key = repr((arm.method, cell.dataset, arm.batch_size, arm.config.precision, sorted(settings.items())))
    if key not in counted:
        info = plan.material.info
        try:
            counted[key] = floor.count(
                build_method(arm.method, arm.config, info), info, arm.batch_size, plan.device
            ).flops
        except Exception:  # a method whose step looks at values has no count, and is listed without
            counted[key] = None
    gathered[arm.pretrain_id] = replace(cell, flops_per_image=counted[key])


# --------------------------------------------------------------------------------------------------------- standing


@dataclass(frozen=True)
class Standing:
    """Where a cell stands in a workspace. missing: eval_ids that have no rows yet; status: of a failure."""

    state: Literal["finished", "missing", "failed"]
    missing: tuple[str, ...] = ()
    status: Status | None = None


RETRIED = ("INTERRUPTED", "OUT_OF_MEMORY", "FAILED")  # by --retry-failed; a loss that is not finite comes again


def standing(workspace: Path, cell: Cell) -> Standing:
    """Read a cell's row files."""
    missing = []
    for eval_id in cell.eval_ids:
        rows = records.read(records.rows_path(workspace, cell.pretrain_id, eval_id))
        if rows is None or rows[0].status in RETRIED:
            missing.append(eval_id)
        elif rows[0].status == "NONFINITE" and eval_id == pretext_id(cell.pretrain_id):
            return Standing("failed", (), "NONFINITE")
    if not missing:
        return Standing("finished")
    failure = records.read(records.rows_path(workspace, cell.pretrain_id, failure_id(cell.pretrain_id)))
    if failure is not None and failure[0].status != "INTERRUPTED":
        return Standing("failed", tuple(missing), failure[0].status)
    return Standing("missing", tuple(missing))


__all__ = ["Cell", "Evaluation", "Planned", "Planner", "Standing", "cells_of", "plan_cells", "standing"]
