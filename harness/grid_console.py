"""What a bench looks like: a live table in a terminal, plain lines elsewhere, and the tables at its end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from harness.bench import Report
from harness.console import console, print_table
from harness.costs import Timings
from harness.engines import CellOutcome
from harness.grid import Cell, Planned, Standing

LINE_SECONDS = 30.0  # between plain lines of progress


class BenchConsole:
    """Implements harness.bench.BenchWatcher on stderr, so that stdout stays free for tables and `--json`."""

    def __init__(self, cells: Sequence[Cell], standings: dict[str, Standing]) -> None:
        self._console = console(stderr=True)
        self._cells = cells
        self._done = {name: found.state for name, found in standings.items()}
        self._running: dict[str, str] = {}
        self._remaining = ""
        self._last_line = 0.0
        self._began = time.monotonic()
        self._live = Live(get_renderable=self._table, console=self._console, transient=True, refresh_per_second=2,
                          auto_refresh=True) if self._console.is_terminal else None  # fmt: skip

    def __enter__(self) -> BenchConsole:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def note(self, text: str) -> None:
        self._print(f"note: {text}")

    def started(self, cell: Cell) -> None:
        self._running[cell.pretrain_id] = ""

    def progress(self, cell: Cell, text: str) -> None:
        self._running[cell.pretrain_id] = text
        if self._live is None and time.monotonic() - self._last_line > LINE_SECONDS:
            self._print(f"        {cell}: {text}")

    def finished(self, cell: Cell, outcome: CellOutcome, remaining: float | None, unknown: int) -> None:
        self._running.pop(cell.pretrain_id, None)
        elsewhere = outcome.problem == "elsewhere"
        self._done[cell.pretrain_id] = "finished" if outcome.status == "FINISHED" else "failed"
        if not elsewhere:
            self._remaining = remaining_text(remaining, unknown)
        how = "finished elsewhere" if elsewhere else f"{outcome.seconds:,.1f} s"
        if outcome.status != "FINISHED":
            how = f"{outcome.status}: {outcome.problem}"
        ended = sum(state != "missing" for state in self._done.values())
        rest = f"; {self._remaining}" if self._remaining else ""
        self._print(f"[{ended}/{len(self._cells)}] {cell}: {how}{rest}")

    def waiting(self, count: int) -> None:
        self._print(f"{count} cells are being worked on by other processes; waiting for them")

    def _print(self, text: str) -> None:
        self._last_line = time.monotonic()
        self._console.print(text, markup=False, soft_wrap=True)

    def _table(self) -> Group:
        """Counts per method and setup, what is running, and how long it may take."""
        table = Table(header_style="bold")
        for column in ("method", "data set", "encoder", "finished", "running", "failed"):
            table.add_column(column, justify="left" if column in ("method", "data set", "encoder") else "right")
        groups: dict[tuple[str, str, str], list[Cell]] = {}
        for cell in self._cells:
            point = "".join(f" {key}={value}" for key, value in cell.point)
            groups.setdefault((cell.method, cell.dataset + point, cell.encoder), []).append(cell)
        for words, cells in groups.items():
            states = [self._done[cell.pretrain_id] for cell in cells]
            running = sum(cell.pretrain_id in self._running for cell in cells)
            counts = [f"{states.count('finished')}/{len(cells)}", str(running or ""), str(states.count("failed") or "")]
            table.add_row(*(escape(word) for word in (*words, *counts)))
        by_id = {cell.pretrain_id: cell for cell in self._cells}
        lines = [Text(f"{by_id[name]}: {text or 'starting'}") for name, text in self._running.items()]
        minutes = (time.monotonic() - self._began) / 60
        return Group(table, *lines, Text(f"{minutes:,.1f} min so far; {self._remaining or 'no estimate yet'}"))


def remaining_text(seconds: float | None, unknown: int) -> str:
    """How much longer a bench may take."""
    if seconds is None:
        return f"{unknown} cells left, none like them measured yet" if unknown else ""
    if not seconds and not unknown:
        return ""
    more = f" and {unknown} cells of unknown length" if unknown else ""
    return f"about {duration(seconds)}{more} left"


def duration(seconds: float) -> str:
    """Seconds for a person."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} s"


def print_dry_run(planned: Planned, standings: dict[str, Standing], timings: Timings, jobs: int) -> None:
    """What would run, grouped over seeds, and what it costs."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in planned.cells:
        point = ", ".join(f"{key}={value}" for key, value in cell.point)
        groups.setdefault((cell.method, cell.role, cell.dataset, cell.encoder, point, f"{cell.steps:,}"), []).append(
            cell
        )
    rows: list[list[Any]] = []
    for words, cells in groups.items():
        missing = [cell for cell in cells if standings[cell.pretrain_id].state == "missing"]
        evaluations = sum(
            len(standings[cell.pretrain_id].missing) - _pretraining_missing(cell, standings) for cell in missing
        )
        train = [cell for cell in missing if _pretraining_missing(cell, standings)]
        flops = [cell.flops_per_image for cell in train if cell.steps]
        seconds, unknown = timings.total(missing, lambda cell: standings[cell.pretrain_id].missing)
        rows.append([*words, len(cells), len(missing), evaluations, f"{sum(cell.images for cell in train):,}",
                     _flops(flops, train), "" if not missing else _seconds(seconds, unknown)])  # fmt: skip
    columns = ["method", "role", "data set", "encoder", "axes", "steps", "cells", "to run", "evaluations", "images seen",
               "FLOPs", "time"]  # fmt: skip
    if not any(row[4] for row in rows):
        columns.remove("axes")
        rows = [row[:4] + row[5:] for row in rows]
    print_table(columns, rows, "dry run: nothing was written", columns[4:])
    print_planned(planned)
    todo = [cell for cell in planned.cells if standings[cell.pretrain_id].state == "missing"]
    failed = sum(found.state == "failed" for found in standings.values())
    seconds, unknown = timings.total(todo, lambda cell: standings[cell.pretrain_id].missing)
    out = console()
    out.print(
        f"{len(planned.cells)} cells, {len(todo)} to run"
        + (f", {failed} failed before (--retry-failed)" if failed else "")
    )
    if todo:
        known = "unknown" if seconds is None else f"{duration(seconds / jobs)} with {jobs} job{'s' * (jobs > 1)}"
        rest = (
            f", and {unknown} cells like which none was measured in this workspace"
            if unknown and seconds is not None
            else ""
        )
        out.print(f"time: {known}{rest}", markup=False)
    out.print("FLOPs: of training, views and teachers included, evaluations not; time: from similar cells measured in this "
              "workspace, evaluations included.", markup=False)  # fmt: skip


def _pretraining_missing(cell: Cell, standings: dict[str, Standing]) -> bool:
    return cell.eval_ids[0] in standings[cell.pretrain_id].missing


def _flops(per_image: Sequence[float | None], cells: Sequence[Cell]) -> str:
    if not per_image:
        return ""
    if any(value is None for value in per_image):
        return "unknown"
    return f"{sum((cell.flops_per_image or 0.0) * cell.images for cell in cells):.2e}"


def _seconds(seconds: float | None, unknown: int) -> str:
    if seconds is None:
        return "unknown"
    return duration(seconds) + (f" + {unknown} unknown" if unknown else "")


def print_planned(planned: Planned) -> None:
    """What the budget came to, and what cannot be run."""
    out = console()
    for setup, bound in planned.bounds.items():
        out.print(f"budget of {setup}: {bound}", markup=False)
    for setup, reason in planned.refused.items():
        out.print(f"refused: {setup}: {reason}", markup=False, soft_wrap=True)


def print_report(report: Report) -> None:
    """What a bench has come to."""
    out = console()
    cells = {
        state: sum(found.state == state for found in report.standings.values()) for state in ("finished", "failed")
    }
    out.print(f"{cells['finished']} of {len(report.cells)} cells finished, {cells['failed']} failed; "
              f"{report.steps_executed:,} steps were executed now", markup=False)  # fmt: skip


__all__ = ["BenchConsole", "duration", "print_dry_run", "print_planned", "print_report", "remaining_text"]
