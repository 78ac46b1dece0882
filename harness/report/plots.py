"""The page's figures that gather several boards or runs: label efficiency, cost, learning curves, severity, transfer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from markupsafe import Markup

from harness.contracts import Row
from harness.report import charts, typography
from harness.report.boards import Board, Entry
from harness.report.charts import Look, Series, Spot

Looks = Mapping[str, Look]
_CURVE_POINTS = 80  # more are not to be told apart on 350 pixels
_SEVERITY = re.compile(r"top1_(.+)_([1-9])")  # of evaluator `robustness`


@dataclass(frozen=True)
class Plate:
    """One figure: a drawing, a caption, and the same numbers as a table (head, rows of text)."""

    title: str
    caption: str
    svg: Markup
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def looks(boards: Iterable[Board]) -> dict[str, Look]:
    """{method: how it is drawn}: colours for methods in their order of appearance, grey for controls and floors."""
    roles = {entry.method: entry.role for board in boards for entry in board.entries}
    coloured = [m for m, role in roles.items() if role in ("method", "outside")]
    greys = [m for m, role in roles.items() if role not in ("method", "outside")]
    return {
        **{method: charts.look(place) for place, method in enumerate(coloured)},
        **{method: charts.look(place, grey=True) for place, method in enumerate(greys)},
    }


# --------------------------------------------------------------------------------------------------- label efficiency


def label_efficiency(boards: Sequence[Board], styles: Looks) -> list[Plate]:
    """One figure per data set, network, evaluation and split with more than one label budget."""
    groups: dict[tuple[Any, ...], list[Board]] = {}
    for board in boards:
        key = (board.dataset, board.pretrain_data, board.encoder, board.evaluator, board.split, board.metric,
               board.numbers_version)  # fmt: skip
        groups.setdefault(key, []).append(board)
    return [_efficiency(group, styles) for group in groups.values() if len({b.labels for b in group}) > 1]


def _efficiency(group: Sequence[Board], styles: Looks) -> Plate:
    first = group[0]
    places, log = _budget_axis(dict.fromkeys(board.labels for board in group))
    scale = 100 if typography.is_share(first.metric) else 1
    found: dict[str, list[tuple[float, Board, Entry]]] = {}
    for board in group:
        for entry in board.entries:
            found.setdefault(entry.key, []).append((places[board.labels], board, entry))
    series, rows = [], []
    for key, cells in found.items():
        cells.sort(key=lambda cell: cell[0])
        series.append(Series(
            key, [(x, scale * e.mean) for x, _, e in cells], [(x, scale * v) for x, _, e in cells for v in e.values.values()],
            styles[cells[0][2].method],
        ))  # fmt: skip
        by_labels = {board.labels: entry for _, board, entry in cells}
        rows.append([key, *(_mean(by_labels.get(labels), first.metric) for labels in sorted(places, key=places.get))])  # type: ignore[arg-type]
    title = f"{first.dataset}, {words(first.evaluator)}"
    budgets = sorted(places, key=lambda labels: places[labels])
    svg = charts.lines(
        series, f"Label efficiency: {title}", "label budget", axis_title(first.metric), log_x=log,
        x_ticks=[(places[labels], labels) for labels in budgets],
    )  # fmt: skip
    caption = f"{first.encoder}, pretrained on {first.pretrain_data}; {first.split} split."
    return Plate(title, caption, svg, ["method", *budgets], rows)


def _budget_axis(budgets: Iterable[str]) -> tuple[dict[str, float], bool]:
    """({budget: place}, whether the places are counts on a logarithmic axis).

    Counts, counts per class and fractions are drawn to scale where all budgets are of one kind, else in rising order.
    """
    budgets = list(budgets)
    kinds = [re.fullmatch(r"(\d+)(pc)?|(\d*\.\d+)", budget) for budget in budgets]
    if all(kinds) and len({(k[2], k[3] is None) for k in kinds if k}) == 1:
        return {budget: float(k[1] or k[3]) for budget, k in zip(budgets, kinds, strict=True) if k}, True

    def size(budget: str) -> tuple[float, str]:
        found = re.match(r"\d*\.?\d+", budget)
        return (float(found[0]) if found else float("inf"), budget)

    return {budget: float(place) for place, budget in enumerate(sorted(budgets, key=size))}, False


# --------------------------------------------------------------------------------------------------------------- cost


def cost(boards: Sequence[Board], styles: Looks) -> list[Plate]:
    """Accuracy against images seen and against time, for the largest label budget of each data set and network."""
    chosen: dict[tuple[str, ...], Board] = {}
    for board in boards:  # in rising order of labels
        chosen[board.dataset, board.pretrain_data, board.encoder, str(board.numbers_version)] = board
    for board in boards:
        key = (board.dataset, board.pretrain_data, board.encoder, str(board.numbers_version))
        if board.labels == chosen[key].labels and board.evaluator == boards[0].evaluator:
            chosen[key] = board
    plates = []
    for board in chosen.values():
        for name, unit in (("images seen", images_seen), ("pretraining time, seconds", pretrain_seconds)):
            costs = {entry.key: unit(entry) for entry in board.entries}
            if any(costs.values()):
                plates.append(_cost(board, styles, name, costs))
    return plates


def images_seen(entry: Entry) -> float | None:
    """Data-set images drawn in pretraining, mean over seeds."""
    return entry.cost.images_seen


def pretrain_seconds(entry: Entry) -> float | None:
    """Wall-clock time of pretraining: images seen over images per second; 0 where nothing was trained."""
    seen, rate = entry.cost.images_seen, entry.cost.images_per_second
    return 0.0 if seen == 0 else seen / rate if seen and rate else None


def _cost(board: Board, styles: Looks, name: str, costs: Mapping[str, float | None]) -> Plate:
    scale = 100 if typography.is_share(board.metric) else 1
    spots, rows = [], []
    for entry in board.entries:
        at = costs[entry.key]
        if at is not None:
            cloud = [scale * v for v in entry.values.values()]
            spots.append(Spot(entry.key, at, scale * entry.mean, cloud, styles[entry.method]))
    front = charts.pareto((spot.x, spot.y) for spot in spots)
    for spot in sorted(spots, key=lambda s: (s.x, -s.y)):
        on = "on the front" if (spot.x, spot.y) in front else ""
        rows.append([spot.name, typography.count(spot.x), _mean(board.entry(spot.name), board.metric), on])
    title = f"{board.dataset}, {words(board.evaluator)}, labels {board.labels}"
    svg = charts.scatter(spots, front, f"Accuracy against {name}: {title}", name, axis_title(board.metric))
    devices = sorted({device for entry in board.entries for device in entry.cost.devices})
    caption = f"{board.encoder}; {', '.join(devices)}. What trains nothing stands at 0."
    return Plate(title, caption, svg, ["method", name, axis_title(board.metric), "Pareto front"], rows)


# ------------------------------------------------------------------------------------------------------------- curves


def learning_curves(records: Sequence[Mapping[str, Any]], styles: Looks) -> list[Plate]:
    """Pretraining loss of every seed, one figure per data set and method; records: facts beside finished encoders."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for facts in records:
        if facts.get("curve"):
            config = facts["config"]
            groups.setdefault((config["dataset_name"], facts["method"], config["encoder.name"]), []).append(facts)
    plates = []
    for (dataset, method, encoder), group in groups.items():
        group = sorted(group, key=lambda facts: facts["config"]["seed"])
        series, rows = [], []
        for facts in group:
            curve = [(float(p["step"]), float(p["loss"])) for p in facts["curve"] if "loss" in p]
            if not curve:
                continue
            thin = curve[:: max(1, len(curve) // _CURVE_POINTS)]
            thin = thin if thin[-1] == curve[-1] else [*thin, curve[-1]]
            seed = str(facts["config"]["seed"])
            series.append(Series(f"seed {seed}", thin, look=styles.get(method, Look("grey"))))
            rows.append(
                [seed, typography.count(curve[-1][0]), typography.raw(curve[0][1]), typography.raw(curve[-1][1])]
            )
        title = f"{method} on {dataset}"
        svg = charts.lines(
            series, f"Learning curves: {title}", "optimisation step", "loss", labelled=False, markers=False
        )
        if svg:
            plates.append(Plate(title, f"{encoder}; mean loss per interval, one line per run.", svg,
                                ["seed", "steps", "first loss", "last loss"], rows))  # fmt: skip
    return plates


# --------------------------------------------------------------------------------------------------------- robustness


def robustness(boards: Sequence[Board], rows: Iterable[Row], styles: Looks) -> list[Plate]:
    """Top-1 against severity, the mean over corruptions first, for the entries of each label budget whose runs have it.

    Each run is read at the readout with the best clean validation value; a value is the mean over runs, then over seeds.
    """
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.evaluator == "robustness" and row.value is not None and row.labels is not None:
            found.setdefault((row.dataset, row.labels, row.pretrain_id), []).append(row)
    plates = []
    for board in _primary(boards) if found else ():
        by_entry: dict[str, dict[str, float]] = {}
        for entry in board.entries:
            seeds = []
            for identities in entry.runs.values():
                runs = [found.get((board.dataset, board.labels, identity), []) for identity in identities]
                seeds += [_means(_headline(run) for run in runs if run)]
            if means := _means(seed for seed in seeds if seed):
                by_entry[entry.key] = means
        plates += _severities(board, by_entry, styles)
    return plates


def _primary(boards: Sequence[Board]) -> list[Board]:
    """The boards of the first evaluation: each entry of a label budget once."""
    return [board for board in boards if board.evaluator == boards[0].evaluator]


def _headline(rows: Sequence[Row]) -> dict[str, float]:
    """{metric: test value} at the readout that validation prefers."""
    validation = {r.readout: r.value for r in rows if r.split == "validation" and r.metric == "top1_clean"}
    readouts = dict.fromkeys(r.readout for r in rows if r.split == "test")
    best = max(readouts, key=lambda name: validation.get(name) or 0.0, default=None)
    return {r.metric: r.value for r in rows if r.split == "test" and r.readout == best and r.value is not None}


def _means(measured: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Means of the metrics that all have."""
    every = list(measured)
    return (
        {name: fmean(one[name] for one in every) for name in every[0] if all(name in one for one in every)}
        if every
        else {}
    )


def _severities(board: Board, by_entry: Mapping[str, Mapping[str, float]], styles: Looks) -> list[Plate]:
    found: dict[str, dict[str, dict[int, float]]] = {}
    for key, metrics in by_entry.items():
        for metric, value in metrics.items():
            if match := _SEVERITY.fullmatch(metric):
                curve = found.setdefault(match[1], {}).setdefault(key, {})
                curve[int(match[2])] = value
                if "top1_clean" in metrics:
                    curve[0] = metrics["top1_clean"]
    every = {"mean over corruptions": _mean_curves(found), **found} if found else {}
    return [_severity(board, corruption, curves, styles) for corruption, curves in every.items()]


def _mean_curves(found: Mapping[str, Mapping[str, Mapping[int, float]]]) -> dict[str, dict[int, float]]:
    """Mean over corruptions, of the entries and severities that all corruptions have."""
    first, *others = found.values()
    shared = [key for key in first if all(key in curves for curves in others)]
    return {
        key: {
            level: fmean(curves[key][level] for curves in found.values())
            for level in first[key] if all(level in curves[key] for curves in others)
        }
        for key in shared
    }  # fmt: skip


def _severity(board: Board, corruption: str, curves: Mapping[str, Mapping[int, float]], styles: Looks) -> Plate:
    levels = sorted({level for curve in curves.values() for level in curve})
    series = [
        Series(key, [(float(x), 100 * y) for x, y in sorted(curve.items())], look=styles[board.entry(key).method])
        for key, curve in curves.items()
    ]
    rows = [[key, *(typography.value(curve.get(level)) for level in levels)] for key, curve in curves.items()]
    title = f"{board.dataset}, {words(corruption)}"
    svg = charts.lines(
        series, f"Robustness: {title}", "severity", "top-1, %", x_ticks=[(float(n), str(n)) for n in levels]
    )
    return Plate(title, f"{board.encoder}, labels {board.labels}.", svg, ["method", *map(str, levels)], rows)


# ----------------------------------------------------------------------------------------------------------- transfer


@dataclass(frozen=True)
class Matrix:
    """Mean top-1 of one method, pretrained on `sources` (rows) and evaluated on `targets` (columns), and its heat 0..4."""

    title: str
    sources: Sequence[str]
    targets: Sequence[str]
    cells: Sequence[Sequence[tuple[str, int] | None]]


def transfer(rows: Iterable[Row]) -> list[Matrix]:
    """One matrix per method, evaluator, readout and label budget whose rows cross data sets.

    A row crosses data sets where it was pretrained on another data set than it was evaluated on.
    """
    found: dict[tuple[str, ...], dict[tuple[str, str], list[float]]] = {}
    for row in rows:
        if row.value is not None and row.split == "test" and row.metric == "top1" and row.labels is not None:
            key = (row.method, row.encoder, row.evaluator, row.readout or "", row.labels)
            source = str(row.config.get("dataset_name", row.dataset))
            found.setdefault(key, {}).setdefault((source, row.dataset), []).append(row.value)
    out = []
    for (method, encoder, evaluator, readout, labels), cells in found.items():
        if all(source == target for source, target in cells):
            continue
        sources, targets = (sorted({pair[axis] for pair in cells}) for axis in (0, 1))
        means = {pair: fmean(values) for pair, values in cells.items()}
        table = [[_heat(means, source, target, sources) for target in targets] for source in sources]
        title = f"{method} ({encoder}), {words(evaluator)} {readout}, labels {labels}"
        out.append(Matrix(title, sources, targets, table))
    return out


def _heat(
    means: Mapping[tuple[str, str], float], source: str, target: str, sources: Sequence[str]
) -> tuple[str, int] | None:
    """(text, heat within the column): columns are other tasks, whose numbers do not compare."""
    value = means.get((source, target))
    if value is None:
        return None
    column = [means[s, target] for s in sources if (s, target) in means]
    spread = max(column) - min(column)
    return typography.value(value), round(4 * (value - min(column)) / spread) if spread else 2


# -------------------------------------------------------------------------------------------------------------- words


def words(name: str) -> str:
    """`linear_probe` -> `linear probe`."""
    return name.replace("_", " ")


def axis_title(metric: str) -> str:
    """`top-1, %` for shares, the metric's name else."""
    return "top-1, %" if typography.is_share(metric) else words(metric)


def _mean(entry: Entry | None, metric: str) -> str:
    """A mean with its interval, or with n where there is none."""
    if entry is None:
        return "–"
    bounds = typography.interval(entry.low, entry.high, metric)
    return f"{typography.value(entry.mean, metric)} ({bounds or f'n = {entry.n}'})"
