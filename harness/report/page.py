"""The report as one HTML file that needs no network and no server: boards, figures, pictures, and every run's provenance.

Every number comes from the rows, through the boards or as the row has it; pictures and learning curves come from what the
runs left in the workspace. Text is escaped by the template engine, always; a content security policy lets in nothing
but the page's own style sheet and script, by their hashes, and pictures that lie inside the file.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from harness import durable, runs
from harness.contracts import Row
from harness.report import charts, pictures, plots, rerun, studies, typography
from harness.report.boards import Board, Difference, Entry, Published

if TYPE_CHECKING:
    import pandas as pd

MOST_RUNS = 400  # with their whole provenance on the page
ROLES = {
    "method": "",
    "outside": "outside weights",
    "null control": "null control",
    "control": "control",
    "floor": "floor",
}


def write(boards: Sequence[Board], rows: pd.DataFrame, workspace: Path, file: Path) -> None:
    """Write the page durably. Raises HarnessError when the disk is full.

    rows: those that the boards were made from (as of harness.load_results)
    workspace: where their runs left pictures and training records, if any
    """
    durable.write_bytes(file, render(boards, rows, workspace).encode())


def render(boards: Sequence[Board], frame: pd.DataFrame, workspace: Path) -> str:
    """The page as text."""
    rows = _rows(frame)
    styles = plots.looks(boards)
    facts = _records(workspace, {row.pretrain_id for row in rows})
    methods = [method for method, style in styles.items() if style.colour != "grey"]
    by_run = _by_run(rows, boards)
    shown = list(by_run)[:MOST_RUNS]
    names = {pretrain_id: f"run-{place}-{_plain(pretrain_id)}" for place, pretrain_id in enumerate(shown, 1)}
    css, script = (_resource(name) for name in ("page.css", "page.js"))
    template = _environment().get_template("page.html.j2")
    return template.render(
        css=Markup(css), script=Markup(script), policy=_policy(css, script), overview=_overview(boards, rows),
        warnings=_warnings(boards), boards=[_board_view(place, board) for place, board in enumerate(boards, 1)],
        choices=_choices(boards), first_evaluation=boards[0].evaluator if boards else "",
        efficiency=plots.label_efficiency(boards, styles), cost=plots.cost(boards, styles),
        curves=plots.learning_curves(list(facts.values()), styles), robustness=plots.robustness(boards, rows, styles),
        searches=studies.views(workspace, styles, {row.dataset for row in rows}),
        matrices=plots.transfer(rows), albums=[_album_view(a) for a in pictures.albums(rows, workspace, methods)],
        published=_published(boards), names=names, num_runs=len(by_run),
        runs=[_run_view(names[key], by_run[key], facts.get(key)) for key in shown],
    )  # fmt: skip


_WHOLE = {name for name, field in Row.model_fields.items() if field.annotation in (int, int | None)}


def _rows(frame: pd.DataFrame) -> list[Row]:
    """The rows behind a DataFrame, which has turned None into NaN and, in such columns, integers into floats."""
    columns: dict[str, list[Any]] = {}
    for name in Row.model_fields:
        column = frame[name].astype(object)
        values = column.where(column.notna(), None).tolist()
        columns[name] = [None if v is None else int(v) for v in values] if name in _WHOLE else values
    fields = set(columns)  # one for all rows: a set of its own would be half of what each weighs
    return [
        Row.model_construct(fields, **dict(zip(columns, values, strict=True)))
        for values in zip(*columns.values(), strict=True)
    ]


# ------------------------------------------------------------------------------------------------------- page and safety


def _resource(name: str) -> str:
    return files("harness.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _environment() -> Any:
    """The one template environment: everything is escaped, an undefined name is an error."""
    import jinja2

    loader = jinja2.FunctionLoader(_resource)
    made = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader, trim_blocks=True,
                              lstrip_blocks=True)  # fmt: skip
    made.filters.update(
        value=typography.value, points=typography.points, probability=typography.probability, count=typography.count,
        seconds=typography.seconds, memory=typography.memory, raw=typography.raw, words=plots.words,
    )  # fmt: skip
    made.globals.update(interval=typography.interval, axis_title=plots.axis_title, map_side=charts.MAP_SIDE)
    return made


def _policy(css: str, script: str) -> str:
    """Nothing is let in but this style sheet and this script, by SHA-256, and pictures inside the file.

    The template writes both between tags without another character, so that the digests are those of the elements.
    """
    style, code = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (css, script))
    return (
        f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{code}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _plain(text: str) -> str:
    """Only what an anchor may hold."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text)[:60]


# ------------------------------------------------------------------------------------------------------------ overview


def _overview(boards: Sequence[Board], rows: Sequence[Row]) -> dict[str, Any]:
    """What the page is about, from the rows alone: the same rows give the same page."""

    def different(name: str) -> list[str]:
        return sorted({str(getattr(row, name)) for row in rows if getattr(row, name) is not None})

    finished = sorted(row.finished_at for row in rows)
    return {
        "datasets": different("dataset"), "rows": len(rows), "runs": len({row.pretrain_id for row in rows}),
        "methods": len(different("method")), "seeds": sorted({row.seed for row in rows}), "boards": len(boards),
        "first": finished[0][:10] if finished else "", "last": finished[-1][:10] if finished else "",
        "commits": [commit[:12] for commit in different("git_commit")], "versions": different("harness_version"),
        "torch": different("torch_version"), "devices": different("device"), "precision": different("precision"),
        "numbers": different("numbers_version"),
    }  # fmt: skip


def _warnings(boards: Sequence[Board]) -> list[tuple[str, list[str]]]:
    """(warning, titles of its boards): each said once."""
    found: dict[str, list[str]] = {}
    for board in boards:
        for warning in board.warnings:
            found.setdefault(warning, []).append(board.title)
    return list(found.items())


def _choices(boards: Sequence[Board]) -> dict[str, list[str]]:
    """What the filters offer, in the boards' order."""
    return {
        "dataset": list(dict.fromkeys(board.dataset for board in boards)),
        "evaluation": list(dict.fromkeys(board.evaluator for board in boards)),
        "labels": list(dict.fromkeys(board.labels for board in boards)),
    }


def _published(boards: Sequence[Board]) -> dict[str, list[Published]]:
    """{data set: its published numbers, each once}."""
    found: dict[str, dict[Published, None]] = {}
    for board in boards:
        found.setdefault(board.dataset, {}).update(dict.fromkeys(board.published))
    return {dataset: list(numbers) for dataset, numbers in found.items() if numbers}


# -------------------------------------------------------------------------------------------------------------- boards


@dataclass(frozen=True)
class Line:
    """A row of the leaderboard. first: whether its role differs from the row above; text: what the word filter reads."""

    entry: Entry
    role: str
    strip: Markup
    first: bool
    text: str
    pretrain_seconds: float | None


@dataclass(frozen=True)
class Comparison:
    """A row of the table of differences."""

    entry: Entry
    difference: Difference
    strip: Markup
    text: str


def _board_view(place: int, board: Board) -> dict[str, Any]:
    share = typography.is_share(board.metric)
    factor = 100 if share else 1
    values = [factor * v for entry in board.entries for v in entry.values.values()]
    intervals = [(factor * e.low, factor * e.high) for e in board.entries if e.low is not None and e.high is not None]
    span = charts.span(values, intervals) if values else (0.0, 1.0)
    floor = board.entry(board.best_floor) if board.best_floor is not None else None
    lines, role = [], None
    for entry in board.entries:
        strip = charts.strip(
            [(f"seed {seed}: {typography.value(v, board.metric)}", factor * v) for seed, v in sorted(entry.values.items())],
            factor * entry.mean, _scaled(entry.low, entry.high, factor), span,
            name=f"{entry.key}: mean {typography.value(entry.mean, board.metric)}, {entry.n} seeds",
            reference=factor * floor.mean if floor else None, emphasis=entry.bold,
        )  # fmt: skip
        lines.append(
            Line(entry, ROLES[entry.role], strip, entry.role != role, _text(entry), plots.pretrain_seconds(entry))
        )
        role = entry.role
    groups, axis = _comparisons(board, factor)
    return {
        "id": f"board-{place}-{_plain(board.key)}", "board": board, "lines": lines, "axis": charts.strip_axis(span),
        "floor": floor, "groups": groups, "difference_axis": axis,
        "unit": "points" if share else plots.words(board.metric),
    }  # fmt: skip


def _comparisons(board: Board, factor: float) -> tuple[list[tuple[str, list[Comparison]]], Markup]:
    """Differences to the baseline, to the null control and to the best floor, on one axis."""
    kinds = (
        (f"minus {board.baseline}, the same network without pretraining", [(e, e.control) for e in board.entries]),
        ("minus the method's null control, which has no information", [(e, e.null) for e in board.entries]),
        (f"minus the best floor, {board.best_floor}", [(e, e.floor) for e in board.entries if e.role == "method"]),
    )
    found = [(name, [(e, d) for e, d in pairs if d is not None and d.values]) for name, pairs in kinds]
    every = [d for _, pairs in found for _, d in pairs]
    if not every:
        return [], Markup("")
    intervals = [(factor * d.low, factor * d.high) for d in every if d.low is not None and d.high is not None]
    span = charts.span((factor * v for d in every for v in d.values.values()), intervals, zero=True)
    groups = []
    for name, pairs in found:
        lines = [Comparison(e, d, _forest(e, d, factor, span, board.metric), _text(e)) for e, d in pairs]
        if lines:
            groups.append((name, lines))
    return groups, charts.strip_axis(span)


def _forest(entry: Entry, difference: Difference, factor: float, span: tuple[float, float], metric: str) -> Markup:
    dots = [(f"seed {s}: {typography.points(v, metric)}", factor * v) for s, v in sorted(difference.values.items())]
    name = f"{entry.key} minus {difference.other}: {typography.points(difference.mean, metric)}"
    return charts.strip(dots, factor * difference.mean, _scaled(difference.low, difference.high, factor), span, name=name,
                        reference=0.0, emphasis=difference.verdict == "gain")  # fmt: skip


def _scaled(low: float | None, high: float | None, factor: float) -> tuple[float, float] | None:
    return None if low is None or high is None else (factor * low, factor * high)


def _text(entry: Entry) -> str:
    words = (entry.key, entry.title, entry.role, entry.family, entry.tier, entry.encoder, *entry.flags)
    return " ".join(words).lower()


# ------------------------------------------------------------------------------------------------------------ pictures


def _album_view(album: pictures.Album) -> dict[str, Any]:
    """An album with its map drawn; `data` is what the script needs to find the image behind a point."""
    drawn, data = [], None
    if album.map is not None:
        found = album.map
        classes = found.classes
        for kind, plane in found.planes.items():
            name = f"{'t-SNE' if kind == 'tsne' else 'PCA'} of the features of {album.method} on {album.dataset}"
            drawn.append((kind, charts.dots(plane, found.labels, classes, name)))
        names = [classes[label] if 0 <= label < len(classes) else str(label) for label in found.labels]
        data = {
            "side": charts.MAP_SIDE, "margin": charts.MAP_MARGIN, "columns": found.columns, "labels": found.labels,
            "names": names, "planes": [[(round(x, 3), round(y, 3)) for x, y in plane] for plane in found.planes.values()],
        }  # fmt: skip
    return {"album": album, "maps": drawn, "data": data}


# ---------------------------------------------------------------------------------------------------------------- runs


def _records(workspace: Path, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """{pretrain_id: what is recorded beside its weights} of the workspace's runs that the rows speak of."""
    return {run.pretrain_id: run.facts for run in runs.finished(workspace) if run.pretrain_id in wanted}


def _by_run(rows: Sequence[Row], boards: Sequence[Board]) -> dict[str, list[Row]]:
    """{pretrain_id: its rows}: those on the boards first, in the boards' order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.pretrain_id, []).append(row)
    on_boards = [i for b in boards for e in b.entries for ids in e.runs.values() for i in ids]
    order = dict.fromkeys(identity for identity in (*on_boards, *found) if identity in found)
    return {identity: found[identity] for identity in order}


_FACTS = (
    "dataset", "pretrain_data", "data_sha256", "data_verified", "test_overlap", "encoder", "pretrain_id", "seed", "steps",
    "images_seen", "views_seen", "images_per_second", "share_of_floor", "peak_memory_bytes", "device", "precision",
    "num_threads", "deterministic", "torch_version", "harness_version", "git_commit", "git_dirty", "code_sha256",
    "numbers_version", "weights_sha256",
)  # fmt: skip


def _run_view(anchor: str, rows: Sequence[Row], facts: Mapping[str, Any] | None) -> dict[str, Any]:
    """Everything the rows say of one run; a field that differs between its rows is given with all its values."""
    first = rows[0]
    provenance = []
    for name in _FACTS:
        values = dict.fromkeys(getattr(row, name) for row in rows)
        provenance.append((name, ", ".join("not recorded" if v is None else str(v) for v in values)))
    numbers: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda r: (r.evaluator, r.labels or "", r.fold or 0)):
        key = (row.evaluator, row.readout or "", row.labels or "", "" if row.fold is None else str(row.fold))
        numbers.setdefault(key, {}).setdefault(row.split, []).append(row)
    config = {key: value for row in rows for key, value in row.config.items()}
    return {
        "id": anchor, "first": first, "provenance": provenance, "numbers": numbers,
        "splits": [split for split in ("validation", "test", "pretrain") if any(split in found for found in numbers.values())],
        "settings": "\n".join(f"{key} = {value}" for key, value in sorted(config.items())),
        "commands": rerun.commands(rows, facts), "finished": max(row.finished_at for row in rows)[:10],
        "subsets": dict.fromkeys((r.labels, r.label_seed, r.label_subset_sha256) for r in rows if r.labels is not None),
        "statuses": ", ".join(dict.fromkeys(row.status for row in rows)),
    }  # fmt: skip


__all__ = ["render", "write"]
