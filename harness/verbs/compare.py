"""`harness compare`: two runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.verbs.options import DataDir, Json, Plugins, Workspace, add_plugins

if TYPE_CHECKING:
    from harness.report.comparison import Comparison

Word = Annotated[str, typer.Argument(metavar="RUN", help="`latest` or the first letters of a pretrain_id.")]


def compare(
    one: Word,
    other: Word,
    workspace: Workspace = Path("."),
    data_dir: DataDir = None,
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """Put two runs side by side: settings, numbers with test-set intervals, curves."""
    add_plugins(plugins)
    from harness import runs
    from harness.report import comparison

    folder = workspace.resolve()
    found = comparison.compare(runs.find(folder, one), runs.find(folder, other), data_dir)
    if as_json:
        typer.echo(found.json())
    else:
        _show(found)


def _show(found: Comparison) -> None:
    from harness.console import console, print_table
    from harness.report.text import percent, points, sparkline

    out = console()
    names = [found.one, found.other]
    facts = [(name, *pair) for name, pair in found.facts.items() if pair != (None, None)]
    print_table(["fact", *names], facts)
    if found.settings:
        print_table(["setting", *names], [(name, *map(_word, pair)) for name, pair in found.settings.items()],
                    "settings that differ")  # fmt: skip
    else:
        out.print("no setting differs")
    rows = []
    for r in found.readings:
        top1 = r.metric.startswith("top1")
        write = percent if top1 else "{:.4g}".format
        gap = "" if r.difference is None else points(r.difference) if top1 else f"{r.difference:+.4g}"
        interval = "" if r.low is None or r.high is None else f"{points(r.low)} to {points(r.high)}"
        what = " ".join(str(word) for word in (r.evaluator, r.readout) if word)
        where = ", ".join(filter(None, (r.labels, None if r.fold is None else f"fold {r.fold}",
                                        None if r.label_seed is None else f"label seed {r.label_seed}")))  # fmt: skip
        rows.append((what, where, r.split, r.metric, *("" if v is None else write(v) for v in (r.one, r.other)),
                     gap + (" !" if r.invalid else ""), interval, "" if r.p is None else f"{r.p:.2g}"))  # fmt: skip
    columns = ["evaluation", "labels", "split", "metric", *names, "difference", "95% interval", "McNemar p"]
    print_table(columns, rows, f"{found.scope}; top1 in per cent", columns[4:])
    if any(r.invalid for r in found.readings):
        out.print("! not converged: the comparison is not valid", markup=False)
    curves = [(name, run, *_ends(curve), sparkline([value for _, value in curve]))
              for name, pair in found.curves.items() for run, curve in zip(names, pair, strict=True) if curve]  # fmt: skip
    if curves:
        print_table(["monitor", "run", "first", "last", "curve"], curves, "while pretraining")
    for note in found.notes:
        out.print(f"note: {note}", markup=False)


def _ends(curve: list[tuple[float, float]]) -> tuple[str, str]:
    return f"{curve[0][1]:.4g}", f"{curve[-1][1]:.4g}"


def _word(value: Any) -> str:
    return "" if value is None else str(value)
