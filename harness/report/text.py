"""Boards as tables of plain words, and those in Markdown, LaTeX and for a terminal.

Every text of a row (method titles, data sets, settings, errors) is a stranger's: it is cleaned of control characters here
and escaped by each writer, so that it stays text. Numbers are points of accuracy (per cent), two digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite

from harness.report.boards import Board, Difference, Entry

ABOUT = (
    "Test top-1 in per cent. mean: over seeds, with Student's t 95% interval from 3 seeds on; the readout is the one that",
    "validation chose, run by run. Differences are paired seed by seed. Verdicts exist for the declared family only (ranked",
    "methods against the baseline, Holm-adjusted); everything else is exploratory. Bold: a gain by verdict. p: after Holm.",
    "sign-flip p and the least value it can take with so many seeds decide nothing. detects: the least true difference that so",
    "many seeds would probably have shown. Works: the interval of the difference to the best floor lies above 0.",
)


APART = "Each by its own protocol; none is part of an average, and none of these networks and budgets is ours."


@dataclass(frozen=True)
class Table:
    """Words in columns. numeric: columns to set right; bold: (row, column) places."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()
    bold: frozenset[tuple[int, int]] = field(default_factory=frozenset)


def tables(board: Board) -> list[Table]:
    """The comparison with the baseline, the other comparisons, readouts and cost; without empty columns."""
    return [_without_empty(table) for table in (_comparison(board), _others(board), _readouts(board), _cost(board))
            if table.rows]  # fmt: skip


def notes(board: Board) -> list[str]:
    """What must be read beside the tables: facts, flags, verdicts' reasons, warnings."""
    out = [clean("; ".join(f"{name}: {value}" for name, value in board.facts.items()))]
    if board.best_floor is not None:
        out.append(clean(f"best floor: {board.best_floor}, {percent(board.entry(board.best_floor).mean)}"))
    for entry in board.entries:
        if entry.control is not None and entry.control.primary:
            out.append(clean(f"{entry.key}: {entry.control.verdict}: {entry.control.reason}"))
        out += [clean(f"{entry.key}: {flag}") for flag in entry.flags]
    return out + [clean(f"warning: {text}") for text in board.warnings]


def published(board: Board) -> Table:
    """Numbers of others on the same data set, each with its protocol and source."""
    rows = []
    for number in board.published:
        value = number.value + (f" ± {number.deviation}" if number.deviation else "")
        remark = "; ".join(word for word in ("best epoch on test" * number.best_epoch_on_test, number.note) if word)
        rows.append((number.method, number.metric, value, number.backbone, number.pretrain_data, number.pretrain_epochs,
                     number.protocol, f"{number.source}{', ' + number.year if number.year else ''}", remark))  # fmt: skip
    columns = ("method", "metric", "value", "network", "unlabelled data", "epochs", "protocol", "source", "remark")
    return _without_empty(Table("published numbers", columns, tuple(tuple(map(clean, row)) for row in rows)))


def _comparison(board: Board) -> Table:
    columns = ("method", "readout", "n", "mean", "95% interval", "each seed", f"minus {board.baseline}", "95% interval",
               "verdict", "p", "sign-flip p (floor)", "detects")  # fmt: skip
    rows = []
    for entry in board.entries:
        own = (_named(entry), entry.readout, str(entry.n), percent(entry.mean), _interval(entry.low, entry.high),
               ", ".join(percent(entry.values[seed]) for seed in entry.seeds))  # fmt: skip
        rows.append((*own, *_against(entry.control)))
    bold = {(place, column) for place, entry in enumerate(board.entries) if entry.bold for column in (3, 6)}
    return Table("", columns, tuple(tuple(map(clean, row)) for row in rows), frozenset((2, 3, 4, 6, 7, 9, 10, 11)),
                 frozenset(bold))  # fmt: skip


def _against(gap: Difference | None) -> tuple[str, ...]:
    if gap is None:
        return ("",) * 6
    flips = f"{_short(gap.sign_flip_p)} ({_short(gap.sign_flip_floor)})"
    detects = "" if gap.detectable is None else percent(gap.detectable)
    return (
        points(gap.mean),
        _interval(gap.low, gap.high, sign=True),
        gap.verdict,
        _short(gap.adjusted_p),
        flips,
        detects,
    )


def _others(board: Board) -> Table:
    columns = ("method", "minus its null control", "minus the best other", "minus the best floor", "works")
    rows = []
    for entry in board.entries:
        gaps = [_gap(entry.null, named=True), _gap(entry.best_other, named=True), _gap(entry.floor, named=False)]
        if any(gaps):
            rows.append((_named(entry), *gaps, _works(entry)))
    return Table("", columns, tuple(tuple(map(clean, row)) for row in rows))


def _gap(gap: Difference | None, named: bool) -> str:
    if gap is None:
        return ""
    interval = f" [{_interval(gap.low, gap.high, sign=True)}]" if gap.low is not None else ""
    invalid = " invalid" if gap.verdict == "invalid" else ""
    return f"{points(gap.mean)}{interval}{invalid}" + (f" ({gap.other})" if named else "")


def _works(entry: Entry) -> str:
    if entry.floor is None or entry.floor.verdict == "invalid":
        return "" if entry.floor is None else "invalid"
    if entry.works is None:
        return f"{'above' if entry.above_floor else 'not above'} the best floor, too few seeds"
    return "yes" if entry.works else "above, within noise" if entry.above_floor else "no"


def _readouts(board: Board) -> Table:
    metrics = sorted({name for entry in board.entries for name in entry.metrics})
    columns = ("method", *board.readouts, *metrics)
    rows = []
    for entry in board.entries:
        means = [entry.readouts.get(name, {}) for name in board.readouts]
        words = [percent(sum(m.values()) / len(m)) if m else "" for m in means]
        others = [f"{entry.metrics[name]:.4f}" if name in entry.metrics else "" for name in metrics]
        rows.append(tuple(map(clean, (_named(entry), *words, *others))))
    if len(columns) == 1:
        rows = []
    return Table("", tuple(map(clean, columns)), tuple(rows), frozenset(range(1, len(columns))))


def _cost(board: Board) -> Table:
    columns = ("method", "images seen", "views seen", "pretraining s", "evaluation s", "images/s", "peak MiB")
    rows = []
    for entry in board.entries:
        cost = entry.cost
        peak = None if cost.peak_memory_bytes is None else cost.peak_memory_bytes / 2**20
        numbers = (cost.images_seen, cost.views_seen, cost.pretrain_seconds, cost.evaluation_seconds,
                   cost.images_per_second, peak)  # fmt: skip
        rows.append(
            (clean(_named(entry)), *("" if not n else f"{n:,.1f}" if n < 100 else f"{n:,.0f}" for n in numbers))
        )
    return Table("", columns, tuple(rows), frozenset(range(1, 7)))


def _without_empty(table: Table) -> Table:
    keep = [c for c in range(len(table.columns)) if any(row[c] for row in table.rows)]
    place = {column: number for number, column in enumerate(keep)}
    return Table(
        table.title, tuple(table.columns[c] for c in keep), tuple(tuple(row[c] for c in keep) for row in table.rows),
        frozenset(place[c] for c in table.numeric if c in place),
        frozenset((row, place[c]) for row, c in table.bold if c in place),
    )  # fmt: skip


def _named(entry: Entry) -> str:
    return entry.key if entry.role == "method" else f"{entry.key} [{entry.role}]"


def percent(value: float) -> str:
    """0.93456 -> 93.46."""
    return f"{100 * value:.2f}"


def points(value: float) -> str:
    """0.01234 -> +1.23."""
    return f"{100 * value:+.2f}"


def _interval(low: float | None, high: float | None, sign: bool = False) -> str:
    if low is None or high is None:
        return ""
    write = points if sign else percent
    return f"{write(low)} to {write(high)}"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def clean(text: str) -> str:
    """One line without control or invisible characters."""
    if text.isprintable():  # nearly all are
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """At most `width` bars of even height steps, each the mean of its stretch; not finite values are `x`."""
    count = min(width, len(values))
    cuts = [len(values) * i // count for i in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    finite = [mean for mean in means if isfinite(mean)]
    low, span = (min(finite), max(finite) - min(finite)) if finite else (0.0, 0.0)
    bars = "▁▂▃▄▅▆▇█"
    return "".join(
        bars[round((mean - low) / span * (len(bars) - 1)) if span else 0] if isfinite(mean) else "x" for mean in means
    )


# ----------------------------------------------------------------------------------------------------------- writers


def markdown(boards: Sequence[Board]) -> str:
    """A document with every board, its notes, and once per data set the published numbers."""
    lines = [
        "# Measured results",
        "",
        "Made from rows by `harness report --markdown`; no number in it is typed.",
        "",
        *ABOUT,
    ]
    told: set[str] = set()
    for board in boards:
        lines += ["", f"## {in_markdown(clean(board.title))}", ""]
        for table in tables(board):
            lines += [*_markdown_table(table), ""]
        lines += [f"- {in_markdown(note)}" for note in notes(board)]
    for board in boards:
        if board.published and board.dataset not in told:
            told.add(board.dataset)
            lines += ["", f"## Published numbers: {in_markdown(clean(board.dataset_title))}", "", APART, ""]
            lines += _markdown_table(published(board))
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> list[str]:
    out = ["| " + " | ".join(map(in_markdown, table.columns)) + " |",
           "|" + "|".join("---:" if c in table.numeric else "---" for c in range(len(table.columns))) + "|"]  # fmt: skip
    for number, row in enumerate(table.rows):
        words = [in_markdown(word) for word in row]
        words = [f"**{word}**" if (number, c) in table.bold else word for c, word in enumerate(words)]
        out.append("| " + " | ".join(words) + " |")
    return out


def in_markdown(text: str) -> str:
    """Text that Markdown shows as it is; an underscore inside a word needs no escape."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~#!{}$])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def latex(boards: Sequence[Board]) -> str:
    """One booktabs table per board (with \\usepackage{booktabs}), then one of published numbers per data set."""
    parts = ["% made from rows by `harness report --latex`; needs \\usepackage{booktabs}"]
    told: set[str] = set()
    for board in boards:
        first, *_ = tables(board)
        parts.append(_latex_table(first, [board.title, *notes(board)]))
    for board in boards:
        if board.published and board.dataset not in told:
            told.add(board.dataset)
            parts.append(
                _latex_table(published(board), [f"Published numbers, {board.dataset_title}: each by its own protocol."])
            )
    return "\n\n".join(parts) + "\n"


def _latex_table(table: Table, caption: Iterable[str]) -> str:
    alignment = "".join("r" if c in table.numeric else "l" for c in range(len(table.columns)))
    body = []
    for number, row in enumerate(table.rows):
        words = [in_latex(word) for word in row]
        words = [rf"\textbf{{{word}}}" if (number, c) in table.bold else word for c, word in enumerate(words)]
        body.append("  " + " & ".join(words) + r" \\")
    said = " ".join(in_latex(clean(line)).rstrip(".") + "." for line in caption)
    return "\n".join([r"\begin{table}", rf"\caption{{{said}}}", rf"\begin{{tabular}}{{{alignment}}}", r"\toprule",
                      "  " + " & ".join(map(in_latex, table.columns)) + r" \\", r"\midrule", *body, r"\bottomrule",
                      r"\end{tabular}", r"\end{table}"])  # fmt: skip


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
          ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", '"': r"\textquotedbl{}",
          **{c: "\\" + c for c in "{}$&#%_"}}  # fmt: skip


def in_latex(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return "".join(_LATEX.get(c, c) for c in text)


def show(boards: Sequence[Board]) -> None:
    """Print every board to the terminal."""
    from harness.console import console, print_table

    out = console()
    for board in boards:
        out.print(clean(board.title), markup=False)
        for table in tables(board):
            print_table(table.columns, table.rows, numeric=[table.columns[c] for c in table.numeric])
        for note in notes(board):
            out.print(f"  {note}", markup=False)
        if board.published:
            out.print(f"  {len(board.published)} published numbers: --markdown and --html show them", markup=False)
    if boards:
        for line in ABOUT:
            out.print(line, markup=False)
