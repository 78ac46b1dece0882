"""The tables of Hoffer, Hubara & Ailon 2016 ("Deep unsupervised learning through spatial contrasting"), measured.

A table is a shipped grid (harness/recipes/grids/paper-*.toml), the published numbers (results/reference/) and what is
known to differ between the two; everything measured here comes from rows.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from harness import records, registry
from harness.bench import Report
from harness.contracts import HarnessError, Row
from harness.report.summary import BASELINE, FINE_TUNE, PROBE, SVM, Spread

Scale = Literal["quick", "full"]
METHOD = "sc"
PUBLISHED_ROWS = {"Spatial contrasting initialization": METHOD, "Same model without initialization": BASELINE}

_ALWAYS = (
    "Not stated in the paper and chosen here: batch size, epochs, momentum, weight decay, the plateau's patience, the size "
    "of a shift, the patch in cells.",
    "Published: mean and +- of an unstated number of runs. Measured: mean and standard deviation over seeds; a seed fixes "
    "initialisation, order of images and, where there are fewer labels than images, which ones.",
    "A label budget pays for its own validation (20%), then the network is trained again on all of it; the paper names no "
    "validation set. Whether it chose when to stop on the test images is not stated; here the last step counts.",
)
_QUICK = (
    "NOT the table's own budget: {count} unlabelled images, 4 epochs of pretraining, the small network `convnet_small` and the "
    "recipe `quick`; fine-tuning takes its learning rate from validation, not 0.01 divided by ten on a plateau.",
)


@dataclass(frozen=True)
class PaperTable:
    """One published table. differs: what is not as in the paper at full scale, beside what never is."""

    name: str
    title: str
    reference: str
    differs: tuple[str, ...]

    def grid(self, scale: Scale) -> str:
        """The shipped grid that measures it."""
        return f"paper-{self.name}" + ("-quick" if scale == "quick" else "")

    def differences(self, scale: Scale) -> tuple[str, ...]:
        """Everything that a reader must know before comparing the two columns."""
        own = self.differs if scale == "full" else tuple(text.format(count="8,000") for text in _QUICK)
        return (*own, *_ALWAYS)


TABLES = {
    table.name: table
    for table in (
        PaperTable("table1", "Table 1, STL-10, all 5,000 labels", "paper_table1_stl10.csv", (
            "The network is a reconstruction: the paper's appendix is not readable in the copies at hand.",
        )),
        PaperTable("table2", "Table 2, CIFAR-10, 4,000 labels", "paper_table2_cifar10_4000.csv", (
            "The network is that of an independent replication, which says it is the paper's.",
            "Pretrained on the 50,000 training images; whether the paper's 'entire dataset' holds the test images is not stated.",
        )),
        PaperTable("table3", "Table 3, MNIST", "paper_table3_mnist.csv", (
            "The network is a reconstruction: the paper's appendix is not readable in the copies at hand.",
            "At 0.34 against 0.63 the whole published effect is 29 test images.",
        )),
    )
}  # fmt: skip


@dataclass(frozen=True)
class PublishedRow:
    """One line of a published table, in its own unit."""

    name: str
    value: float
    deviation: float | None
    of_paper: bool  # False: a row of somebody else's that stands in the same file


@dataclass(frozen=True)
class TableLine:
    """One line beside its published number. measured: label budget -> values per seed in the table's unit.

    unconverged: budgets at which some seed's fine-tuning had not converged; extra: the paper has no such line
    """

    name: str
    published: PublishedRow | None
    measured: dict[str, Spread]
    unconverged: tuple[str, ...] = ()
    extra: bool = False


@dataclass(frozen=True)
class Comparison:
    """Published and measured side by side. unit: `accuracy` or `error`, in per cent; gains: paired differences."""

    table: PaperTable
    scale: Scale
    unit: Literal["accuracy", "error"]
    labels: tuple[str, ...]
    lines: tuple[TableLine, ...]
    gains: dict[str, Spread]


def published(table: PaperTable) -> tuple[Literal["accuracy", "error"], list[PublishedRow]]:
    """The rows of results/reference and the unit that they are in."""
    text = files("harness.results.reference").joinpath(table.reference).read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    unit: Literal["accuracy", "error"] = "error" if rows[0]["metric"] == "test_error_pct" else "accuracy"
    out = [
        PublishedRow(row["method"], float(row["value"]), float(row["stddev"]) if row["stddev"] else None,
                     row["source"].startswith("arXiv:1610.00243"))
        for row in rows
    ]  # fmt: skip
    return unit, out


def compare(table: PaperTable, scale: Scale, rows: Iterable[Row]) -> Comparison:
    """Put measured rows beside the published ones."""
    unit, reference = published(table)
    found = [row for row in rows if row.split == "test" and row.metric == "top1" and row.value is not None]
    labels = tuple(dict.fromkeys(str(row.labels) for row in found))
    lines = [
        TableLine(row.name, row, *(_values(found, unit, PUBLISHED_ROWS[row.name], FINE_TUNE, None)
                                   if row.name in PUBLISHED_ROWS else ({}, ())))
        for row in reference
    ]  # fmt: skip
    named = set(PUBLISHED_ROWS.values())
    for method in dict.fromkeys(row.method for row in found):
        for evaluator, readout in dict.fromkeys((row.evaluator, row.readout) for row in found if row.method == method):
            if evaluator in (PROBE, SVM) or (evaluator == FINE_TUNE and method not in named):
                words = {PROBE: f"linear probe, {readout}", SVM: "kernel machine", FINE_TUNE: "fine-tuned"}[evaluator]
                values = _values(found, unit, method, evaluator, readout)
                lines.append(TableLine(f"{method}, {words}", None, *values, extra=True))
    return Comparison(table, scale, unit, labels, tuple(lines), _gains(lines, labels))


def _values(
    rows: Sequence[Row], unit: str, method: str, evaluator: str, readout: str | None
) -> tuple[dict[str, Spread], tuple[str, ...]]:
    out: dict[str, dict[int, float]] = {}
    bad: list[str] = []
    for row in rows:
        if (row.method, row.evaluator, row.readout) != (method, evaluator, readout) and not (
            readout is None and (row.method, row.evaluator) == (method, evaluator)
        ):
            continue
        assert row.value is not None
        out.setdefault(str(row.labels), {})[row.seed] = 100 * (1 - row.value if unit == "error" else row.value)
        if row.converged is False and str(row.labels) not in bad:
            bad.append(str(row.labels))
    return {label: Spread(values) for label, values in out.items()}, tuple(bad)


def _gains(lines: Sequence[TableLine], labels: Sequence[str]) -> dict[str, Spread]:
    """Paired differences, seed by seed, of the pretrained network to the same one without; none from unconverged arms."""
    by_name = {PUBLISHED_ROWS[line.name]: line for line in lines if line.name in PUBLISHED_ROWS}
    out: dict[str, Spread] = {}
    if len(by_name) < 2:
        return out
    mine, base = by_name[METHOD], by_name[BASELINE]
    for label in labels:
        if label in mine.unconverged + base.unconverged or label not in mine.measured or label not in base.measured:
            continue
        other = base.measured[label].values
        paired = {seed: value - other[seed] for seed, value in mine.measured[label].values.items() if seed in other}
        if paired:
            out[label] = Spread(paired)
    return out


# ------------------------------------------------------------------------------------------------------------ words


def header(comparison: Comparison) -> list[str]:
    """Column names of `cells`."""
    return [f"test {comparison.unit} in %", "published", *(f"measured, labels {label}" for label in comparison.labels)]


def cells(comparison: Comparison) -> list[list[str]]:
    """The table's cells as text; extras come last."""
    out = []
    for line in sorted(comparison.lines, key=lambda line: line.extra):
        reference = ""
        if line.published is not None:
            spread = "" if line.published.deviation is None else f" ± {line.published.deviation:g}"
            reference = f"{line.published.value:g}{spread}"
        name = line.name if line.published is None or line.published.of_paper else f"{line.name} (not the paper's)"
        out.append([name, reference, *(_measured(line, label) for label in comparison.labels)])
    return out


def _measured(line: TableLine, label: str) -> str:
    found = line.measured.get(label)
    if found is None:
        return ""
    spread = "" if found.deviation is None else f" ± {found.deviation:.2f}"
    return f"{found.mean:.2f}{spread} (n = {found.n}){' !' if label in line.unconverged else ''}"


def remarks(comparison: Comparison) -> list[str]:
    """What is printed below the table: the paired difference, and what differs from the paper."""
    out = []
    names = {PUBLISHED_ROWS[line.name]: line for line in comparison.lines if line.name in PUBLISHED_ROWS}
    for label in comparison.labels:
        gain = comparison.gains.get(label)
        if gain is not None:
            interval = gain.interval
            bounds = (
                f", 95% interval {interval[0]:+.2f} to {interval[1]:+.2f}"
                if interval
                else ", no interval below 3 seeds"
            )
            few = "; below 6 seeds no winner" if gain.n < 6 else ""
            out.append(f"Labels {label}: pretrained minus not pretrained, paired over {gain.n} seeds: {gain.mean:+.2f} points of "
                       f"{comparison.unit}{bounds}{few}.")  # fmt: skip
        elif any(label in line.unconverged for line in names.values()):
            out.append(f"Labels {label}: fine-tuning had not converged in some seed (!), so no difference is claimed.")
        else:
            out.append(f"Labels {label}: the pair is not measured in any seed, so no difference is claimed.")
    out += comparison.table.differences(comparison.scale)
    floors = registry.methods_with_role("floor")
    out.append(f"Lines below the published ones are extras: frozen features by readout, the null control, and floors without "
               f"any network ({', '.join(floors)}).")  # fmt: skip
    return out


def title(comparison: Comparison) -> str:
    """Of the table; the quick scale says what it is not."""
    own = "" if comparison.scale == "full" else "; quick scale, NOT the table's own budget"
    return f"{comparison.table.title}{own}"


def markdown(comparison: Comparison, rows: Sequence[Row], missing: Sequence[str]) -> str:
    """A study's README. missing: one line per cell of the grid that is not finished."""
    first = rows[0]
    columns = header(comparison)
    seeds = ", ".join(str(seed) for seed in sorted({row.seed for row in rows}))
    name, scale = comparison.table.name, comparison.scale
    data = "published files" if all(row.data_verified for row in rows) else "NOT the published files"
    lines = [
        f"# {title(comparison)}", "",
        f"Made by `harness reproduce {name} --scale {scale} --publish DIR`; every measured number comes from the rows in "
        "`rows/`, none is typed. Published numbers: Hoffer, Hubara & Ailon 2016, as in `results/reference/`.", "",
        f"Conditions: grid `{comparison.table.grid(scale)}`, seeds {seeds}, encoder {_encoder(rows)}, {first.device}, "
        f"{first.precision}, torch {first.torch_version}, NUMBERS_VERSION {first.numbers_version}, {data}.", "",
        "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|",
        *("| " + " | ".join(row) + " |" for row in cells(comparison)), "",
        *(f"- {text}" for text in remarks(comparison)), "",
    ]  # fmt: skip
    if missing:
        lines += ["Not finished, so not in the table:", "", *(f"- {text}" for text in missing), ""]
    return "\n".join(lines)


def _encoder(rows: Sequence[Row]) -> str:
    return next((row.encoder for row in rows if row.method == METHOD), rows[0].encoder)


def publish(folder: Path, comparison: Comparison, report: Report) -> None:
    """Copy the rows of a comparison to `folder`/rows and write its README. Raises HarnessError when there are none."""
    rows = report.rows()
    if not rows:
        raise HarnessError("nothing is measured yet, so there is nothing to publish")
    shutil.rmtree(folder / "rows", ignore_errors=True)
    for pretrain_id, eval_id in sorted({(row.pretrain_id, row.eval_id) for row in rows}):
        target = folder / "rows" / pretrain_id / f"{eval_id}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(records.rows_path(report.cells[0].requests[0].workspace, pretrain_id, eval_id), target)
    missing = [f"{cell}: {report.problems.get(cell.pretrain_id, 'not run')}" for cell in report.failed]
    (folder / "README.md").write_text(markdown(comparison, rows, missing), encoding="utf-8")


__all__ = ["TABLES", "Comparison", "PaperTable", "TableLine", "cells", "compare", "header", "markdown", "publish", "published",
           "remarks", "title"]  # fmt: skip
