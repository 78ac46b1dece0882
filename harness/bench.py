"""bench: carry out a grid with an engine until nothing of it is missing.

Any number of commands, on any number of machines that share the workspace, may carry out grids at the same time: each
takes the cells that nobody else is at work on, and comes back for the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from harness import durable, journal, records
from harness.contracts import HarnessError, Row, Status
from harness.costs import Timings
from harness.engines import CellOutcome, Engine
from harness.grid import RETRIED, Cell, Standing, standing

BUSY_SECONDS = 2.0  # between two looks at cells that others are at work on


class BenchWatcher(Protocol):
    """What a bench tells whoever watches."""

    def started(self, cell: Cell) -> None: ...
    def progress(self, cell: Cell, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def finished(self, cell: Cell, outcome: CellOutcome, remaining: float | None, unknown: int) -> None: ...
    def waiting(self, count: int) -> None: ...


@dataclass
class Report:
    """Every cell of the grid and how it ended. problems: pretrain_id -> one line; steps_executed: in this command."""

    cells: list[Cell]
    standings: dict[str, Standing] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    steps_executed: int = 0

    def status(self, cell: Cell) -> Status | None:
        """FINISHED, the status of a failure, or None for what was not run."""
        found = self.standings[cell.pretrain_id]
        return "FINISHED" if found.state == "finished" else found.status

    @property
    def failed(self) -> list[Cell]:
        return [cell for cell in self.cells if self.standings[cell.pretrain_id].state != "finished"]

    def rows(self) -> list[Row]:
        """Every row of the grid, in its order."""
        out: list[Row] = []
        for cell in self.cells:
            workspace = cell.requests[0].workspace
            for eval_id in cell.eval_ids:
                found = records.read(records.rows_path(workspace, cell.pretrain_id, eval_id)) or []
                out += [row for row in found if row.metric != "status" or row.status != "FINISHED"]
        return out


def carry_out(
    cells: Sequence[Cell],
    workspace: Path,
    engine: Engine,
    watcher: BenchWatcher,
    *,
    retry_failed: bool = False,
    follow: Callable[[str], None] = lambda _: None,
    jobs: int = 1,
) -> Report:
    """Run every cell that the workspace lacks; failed ones only with `retry_failed`, a non-finite loss never.

    follow: hears each pretrain_id before it is begun; jobs: how many cells run at the same time, for the estimate
    """
    report = Report(list(cells), {cell.pretrain_id: standing(workspace, cell) for cell in cells})
    by_id = {cell.pretrain_id: cell for cell in cells}
    timings = Timings(records.read_all(workspace))
    todo = [cell for cell in cells if _wanted(report.standings[cell.pretrain_id], retry_failed)]
    for cell in report.failed:
        if cell not in todo:
            report.problems[cell.pretrain_id] = _known_failure(report.standings[cell.pretrain_id])
    left = {cell.pretrain_id for cell in todo}
    while todo:
        busy: list[Cell] = []
        for cell in todo:
            follow(cell.pretrain_id)
        for outcome in engine.outcomes(todo, watcher):
            cell = by_id[outcome.pretrain_id]
            if outcome.status == "BUSY":
                busy.append(cell)
                continue
            _note(report, cell, outcome, workspace)
            left.discard(cell.pretrain_id)
            for eval_id in cell.eval_ids:
                timings.add(records.read(records.rows_path(workspace, cell.pretrain_id, eval_id)) or [])
            seconds, unknown = timings.total(
                (by_id[name] for name in left), lambda other: report.standings[other.pretrain_id].missing
            )
            watcher.finished(cell, outcome, None if seconds is None else seconds / jobs, unknown)
        todo = _still_missing(busy, report, workspace, watcher, left)
    return report


def _wanted(found: Standing, retry_failed: bool) -> bool:
    return found.state == "missing" or (found.state == "failed" and retry_failed and found.status in RETRIED)


def _known_failure(found: Standing) -> str:
    if found.status == "NONFINITE":
        return "NONFINITE: the loss was not finite; it would not be with the same settings, so it is not run again"
    return f"{found.status} in an earlier command; --retry-failed runs it again"


def _note(report: Report, cell: Cell, outcome: CellOutcome, workspace: Path) -> None:
    report.steps_executed += outcome.steps_executed
    found = standing(workspace, cell)
    if found.state == "missing" and outcome.status != "FINISHED":  # without a row: what failed can be mended
        found = Standing("failed", found.missing, "FAILED")
    report.standings[cell.pretrain_id] = found
    if found.state != "finished":
        report.problems[cell.pretrain_id] = outcome.problem or f"{found.status}"


def _still_missing(
    busy: list[Cell], report: Report, workspace: Path, watcher: BenchWatcher, left: set[str]
) -> list[Cell]:
    """Of the cells that others were at work on, those that nobody has finished; waits until one of them is free."""
    told = False
    while busy:
        still = []
        for cell in busy:
            found = report.standings[cell.pretrain_id] = standing(workspace, cell)
            if found.state == "missing":
                still.append(cell)
                continue
            left.discard(cell.pretrain_id)
            if found.state == "failed":
                report.problems[cell.pretrain_id] = f"{found.status} in another process"
            watcher.finished(
                cell, CellOutcome(cell.pretrain_id, found.status or "FINISHED", "elsewhere"), None, len(left)
            )
        busy = still
        if not busy or any(not journal.is_alive(journal.lock_path(workspace, c.pretrain_id)) for c in busy):
            return busy
        if not told:
            watcher.waiting(len(busy))
            told = True
        time.sleep(BUSY_SECONDS)
    return []


def write_study(workspace: Path, name: str, cells: Iterable[Cell]) -> Path:
    """Add the cells' eval_ids to `results/studies/<name>/study.json`; they are listed before they are measured, so that
    what fails is missed. Raises HarnessError for a name that is no plain file name."""
    return list_in_study(workspace, name, (eval_id for cell in cells for eval_id in cell.eval_ids))


def list_in_study(workspace: Path, name: str, eval_ids: Iterable[str]) -> Path:
    """Add eval_ids to `results/studies/<name>/study.json`. Raises HarnessError for a name that is no plain file name."""
    if not name or name != Path(name).name or name.startswith("."):
        raise HarnessError(f"--study '{name}' must be a plain name: it is a folder under results/studies")
    path = workspace / "results" / "studies" / name / "study.json"
    with durable.locked(workspace / ".harness" / "locks" / f"study-{name}.lock"):
        known = durable.read_sealed(path) if path.exists() else None
        document = {"name": name, "eval_ids": sorted({*eval_ids, *(known or {}).get("eval_ids", ())})}
        if document != known:
            durable.write_sealed(path, document)
    return path


__all__ = ["BenchWatcher", "Report", "carry_out", "list_in_study", "write_study"]
