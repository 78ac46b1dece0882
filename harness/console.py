"""What a run looks like in a terminal: progress bars there, plain lines elsewhere; rich tables; one-line errors."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from harness.arms import Arm, Cell
    from harness.contracts import Row
    from harness.report.summary import Summary


def console(stderr: bool = False) -> Console:
    """The terminal, or a plain stream wide enough not to cut a table."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 160, highlight=False)


class TerminalReporter:
    """Implements runner.Reporter on stderr, so that stdout stays free for tables and `--json`."""

    def __init__(self) -> None:
        self.console = console(stderr=True)
        self.live = self.console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.fields[facts]}"), TimeRemainingColumn(),
            console=self.console, transient=True, disable=not self.live,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._last_line = 0.0

    def __enter__(self) -> TerminalReporter:
        self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.stop()

    def _clear(self) -> None:
        for task in self._tasks.values():
            self.progress.remove_task(task)
        self._tasks.clear()

    def arm_started(self, arm: Arm, number: int, total: int) -> None:
        self._clear()
        self.console.print(
            f"[{number}/{total}] {arm.method} ({arm.role}) seed {arm.config.seed}, id {arm.pretrain_id}", markup=False
        )

    def evaluating(self, arm: Arm, cell: Cell) -> None:
        self._clear()
        budget = "" if cell.budget is None else f", labels {cell.budget.spec}"
        fold = "" if cell.budget is None or cell.budget.fold is None else f", fold {cell.budget.fold}"
        self.console.print(f"      {cell.evaluator}{budget}{fold}", markup=False)

    def training(self, label: str, step: int, steps: int, means: Mapping[str, float], images_per_second: float) -> None:
        monitors = " ".join(f"{name} {value:.4g}" for name, value in means.items())
        facts = f"{step}/{steps} {images_per_second:,.0f} images/s {monitors}"
        if self.live:
            if label not in self._tasks:
                self._clear()
                self._tasks[label] = self.progress.add_task(escape(label), total=steps, facts="")
            self.progress.update(self._tasks[label], completed=step, facts=escape(facts))
        elif step == steps or time.monotonic() - self._last_line > 10:
            self._last_line = time.monotonic()
            self.console.print(f"      {label} {facts}", markup=False)

    def note(self, text: str) -> None:
        self.console.print(f"      note: {text}", markup=False)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "", numeric: Iterable[str] = ()
) -> None:
    """A table on stdout; every cell is shown as text, never read as markup."""
    table = Table(title=escape(title) or None, title_justify="left", header_style="bold")
    right = set(numeric)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else escape(str(cell)) for cell in row))
    console().print(table)


def print_summary(summary: Summary, dataset: str, method: str, seed: int) -> None:
    """The closing table of `harness run`: accuracies, then differences to random_init in points of accuracy."""
    split = summary.split
    readouts = summary.readouts
    columns = ["method", *readouts, "headline", "kNN", "fine-tune", "Δ headline", "Δ fine-tune"]
    rows = []
    for line in summary.lines:
        headline = "" if line.headline is None else f"{line.headline:.4f} ({line.readout})"
        tuned = _number(line.fine_tune) + ("" if line.fine_tune_converged in (None, True) else " !")
        rows.append([line.method, *(_number(line.readouts.get(name)) for name in readouts), headline, _number(line.knn),
                     tuned, _points(line.gain), _points(line.gain_fine_tune)])  # fmt: skip
    title = f"{dataset}, seed {seed}, labels {summary.labels}: top-1 on the {split} split"
    print_table(columns, rows, title, numeric=columns[1:])
    out = console()
    out.print(
        "headline: the readout chosen on validation. Δ: paired difference to random_init, same seed and labels.",
        markup=False,
    )
    if verdict := summary.verdict(method):
        out.print(verdict, markup=False)
    if any(line.fine_tune_converged is False for line in summary.lines):
        out.print("! not converged: a comparison with this arm is not valid", markup=False)


def print_pretext(rows: Iterable[Row]) -> None:
    """What the method says of its own pretext task."""
    for row in rows:
        if row.evaluator == "pretext" and row.value is not None:
            console().print(f"  {row.method} {row.metric} = {row.value:.4g}", markup=False)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _points(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.2f} pt"
