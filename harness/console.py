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
from rich.text import Text

if TYPE_CHECKING:
    from harness.arms import Arm, Cell
    from harness.contracts import Row
    from harness.profiling import Profile
    from harness.report.summary import SeedSummary, Summary


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
    columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "", numeric: Iterable[str] = (),
    grouped: bool = False,
) -> None:  # fmt: skip
    """A table on stdout; every cell is shown as text, never read as markup. grouped: a rule where the first column changes."""
    table = Table(title=escape(title) or None, title_justify="left", header_style="bold")
    right = set(numeric)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    before: Any = None
    for number, row in enumerate(rows):
        if grouped and number and row[0] != before:
            table.add_section()
        before = row[0]
        table.add_row(*("" if cell is None else Text(str(cell)) for cell in row))
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


MOST_SEEDS_SHOWN = 5  # each seed's value is shown while a line of them stays readable


def print_seeds(summary: SeedSummary, dataset: str, method: str) -> None:
    """The closing table over several seeds: one line per arm and evaluation."""
    each = summary.seeds if len(summary.seeds) <= MOST_SEEDS_SHOWN else ()
    shown = [f"seed {seed}" for seed in each]
    columns = ["method", "evaluation", "n", "mean", "sd", *shown, "Δ", "95% interval", "n Δ"]
    rows = []
    for line in summary.lines:
        value, gain = line.value, line.gain
        interval = gain.interval if gain else None
        rows.append([
            line.method, line.evaluation, value.n, _number(value.mean) + ("" if line.converged else " !"),
            _number(value.deviation), *(_number(value.values.get(seed)) for seed in each),
            _points(gain.mean if gain else None),
            "" if interval is None else f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}", gain.n if gain else "",
        ])  # fmt: skip
    title = f"{dataset}, {len(summary.seeds)} seeds, labels {summary.labels}: top-1 on the {summary.split} split"
    print_table(columns, rows, title, numeric=columns[2:])
    out = console()
    out.print("headline: the readout chosen on validation, seed by seed. Δ: mean of the paired differences to random_init,",
              markup=False)  # fmt: skip
    out.print("same seed and labels, with Student's t interval from 3 seeds on.", markup=False)
    if verdict := summary.verdict(method):
        out.print(verdict, markup=False)
    if any(not line.converged for line in summary.lines):
        out.print("! not converged in some seed: a comparison with this arm is not valid", markup=False)


def print_pretext(rows: Iterable[Row]) -> None:
    """What the method says of its own pretext task, averaged over seeds."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.evaluator == "pretext" and row.value is not None:
            found.setdefault(f"{row.method} {row.metric}", []).append(row.value)
    for name, values in found.items():
        over = "" if len(values) == 1 else f" (mean of {len(values)} seeds)"
        console().print(f"  {name} = {sum(values) / len(values):.4g}{over}", markup=False)


def print_profile(profile: Profile) -> None:
    """Phases of a training step, its speed and its floor."""
    rows = [
        [phase.name, f"{phase.milliseconds:.3f}", f"{100 * phase.share:.1f}%",
         "" if phase.peak_bytes is None else f"{phase.peak_bytes / 2**20:,.1f}"]
        for phase in profile.phases
    ]  # fmt: skip
    threads = f", {profile.num_threads} threads" if profile.device == "cpu" else ""
    columns = ["phase", "ms per step", "share", "peak MiB"]
    title = (f"{profile.method} on {profile.dataset}, {profile.encoder}, batch {profile.batch_size}, {profile.precision} on "
             f"{profile.device}{threads}: median of {profile.steps} steps")  # fmt: skip
    print_table(columns, rows, title, columns[1:])
    lines = [f"{profile.step_milliseconds:.3f} ms per step, {profile.images_per_second:,.0f} images/s"]
    if (least := profile.floor) is not None and profile.share_of_floor is not None:
        lines += [
            f"{100 * profile.share_of_floor:.1f}% of the floor: {least.flops / 1e9:.4g} GFLOP and {least.bytes / 1e6:.4g} MB "
            f"per image, at {least.rates.flops / 1e9:,.0f} GFLOP/s (measured) and {least.rates.bytes / 1e9:,.1f} GB/s "
            f"(copy) allow {1 / least.seconds:,.0f} images/s, {1 / least.seconds_without_overlap:,.0f} without overlap",
        ]
    lines += [f"memory: {profile.memory}, the highest of each phase", f"trace: {profile.trace} (chrome://tracing)"]
    for line in lines:
        console().print(line, markup=False, soft_wrap=True)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _points(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.2f} pt"
