"""Where cells of a grid are executed. An engine takes cells and yields what became of each, in any order.

`harness.engines.local` runs them in processes of this machine. Another engine (a cluster's) needs nothing but `run_cell`
on its side and a folder that all of its workers see: rows are content-addressed, so no engine has to be trusted with
doing a cell once only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from harness import journal, mirror
from harness.arms import Arm, Plan
from harness.contracts import HarnessError, Status
from harness.grid import Cell, Planner, standing
from harness.runner import ArmRun, Outcome, Reporter, Silent, numerics


@dataclass(frozen=True)
class CellOutcome:
    """What became of a cell. status: BUSY where another process is at work on it.

    problem: one line of a cell that did not finish; seconds: of this process's work; steps_executed: of training
    """

    pretrain_id: str
    status: Status | Literal["BUSY"]
    problem: str | None = None
    seconds: float = 0.0
    steps_executed: int = 0


class Watcher(Protocol):
    """Hears what an engine is doing."""

    def started(self, cell: Cell) -> None: ...
    def progress(self, cell: Cell, text: str) -> None: ...
    def note(self, text: str) -> None: ...


class Engine(Protocol):
    """Executes cells. `outcomes` may be called again with those that were busy; `close` ends what is still at work."""

    def outcomes(self, cells: Sequence[Cell], watcher: Watcher) -> Iterator[CellOutcome]: ...
    def close(self) -> None: ...


def run_cell(cell: Cell, planner: Planner, reporter: Reporter | None = None, lost: str | None = None) -> CellOutcome:
    """Do what a cell's workspace lacks of it, here and now.

    planner: of this process, so that neighbouring cells open their data once
    lost: why an earlier process was lost with this cell; then that is recorded and nothing is run
    A HarnessError becomes a FAILED outcome without a row: what it speaks of can be mended.
    """
    workspace = cell.requests[0].workspace
    with journal.hold(journal.lock_path(workspace, cell.pretrain_id)) as mine:
        if not mine:
            return CellOutcome(cell.pretrain_id, "BUSY")
        if lost is None and standing(workspace, cell).state == "finished":  # another process was quicker
            return CellOutcome(cell.pretrain_id, "FINISHED")
        try:
            return _run(cell, planner, reporter or Silent(), lost)
        except HarnessError as error:
            return CellOutcome(cell.pretrain_id, "FAILED", str(error))


def _run(cell: Cell, planner: Planner, reporter: Reporter, lost: str | None) -> CellOutcome:
    began = time.monotonic()
    plan, arm = find_arm(cell, planner)
    outcome = Outcome(plan)
    run = ArmRun(plan, arm, mirror.Tracking(plan.request.workspace, "none"), reporter, outcome)
    with numerics(plan):
        torch.set_num_threads(arm.config.num_threads or 1)
        if lost is not None:
            run.record_loss(lost)
        else:
            run.run()
    found = standing(plan.request.workspace, cell)
    status: Status = "FINISHED" if found.state == "finished" else found.status or "FAILED"
    problem = outcome.problems[-1] if outcome.problems else None
    return CellOutcome(cell.pretrain_id, status, problem, time.monotonic() - began, outcome.steps_executed)


def find_arm(cell: Cell, planner: Planner) -> tuple[Plan, Arm]:
    """The cell's arm with every label budget that the grid wants of it, and a plan that holds it.

    Raises HarnessError when the code or the data is not what it was when the cell was planned.
    """
    plan: Plan | None = None
    for request in cell.requests:
        other = planner.plan(request)
        for place, arm in enumerate(other.arms):
            if arm.pretrain_id != cell.pretrain_id:
                continue
            if plan is None:
                plan, at = other, place
            else:
                known = {(budget.spec, budget.fold) for budget in plan.arms[at].budgets}
                new = tuple(b for b in arm.budgets if (b.spec, b.fold) not in known)
                plan.arms[at] = replace(plan.arms[at], budgets=plan.arms[at].budgets + new)
    if plan is None:
        raise HarnessError(f"{cell}: code or data has changed since the grid was planned; run the command again")
    return plan, plan.arms[at]


__all__ = ["CellOutcome", "Engine", "Watcher", "find_arm", "run_cell"]
