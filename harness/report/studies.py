"""The page's section of searches: history, expected best, what mattered, default against tuned; read from tuning.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from harness import studies, study_slices
from harness.report import charts, study_charts, typography
from harness.report.charts import Look, Series
from harness.report.plots import Looks, Plate, axis_title
from harness.studies import MethodSearch, Study, Trial

MARKED = 16  # points of a curve up to which each has its marker


@dataclass(frozen=True)
class Line:
    """A method's row of the table of a search. strip: its differences, seed by seed, empty without any"""

    found: MethodSearch
    strip: Markup
    trials: str


@dataclass(frozen=True)
class MethodView:
    """A method's own figures. why_no_importance: empty where it is drawn; pareto: (trial, its values) of those that no other
    beats in every objective, empty where there is one objective"""

    found: MethodSearch
    why_no_importance: str
    pareto: Sequence[tuple[int, Sequence[str]]]
    plates: Sequence[Plate]


@dataclass(frozen=True)
class View:
    """A search as the page shows it."""

    study: Study
    facts: Mapping[str, str]
    warnings: Sequence[str]
    axis: Markup
    lines: Sequence[Line]
    plates: Sequence[Plate]
    methods: Sequence[MethodView]


def views(workspace: Path, styles: Looks, datasets: Collection[str]) -> list[View]:
    """The searches of a workspace that chose or judged settings on one of `datasets`; all of them where there are none.

    Raises HarnessError for a tuning.json that was changed.
    """
    found = [studies.read(studies.read_search(workspace, name)) for name in studies.searches(workspace)]
    return [view(study, styles) for study in found if not datasets or {study.dataset, study.report_on} & set(datasets)]


def view(study: Study, styles: Looks) -> View:
    """One search; its methods look as they do on the rest of the page."""
    new = [one.method for one in study.methods if one.method not in styles]
    looks = {**styles, **{method: charts.look(len(styles) + place) for place, method in enumerate(new)}}
    warnings = [
        warning for one in study.methods for warning in studies.agreement_warnings(one.method, one.rank_agreement)
    ]
    axis, lines = _table(study)
    plates = [plate for plate in (_history(study, looks), _expected(study, looks)) if plate.svg]
    methods = [_method(one, study, looks[one.method]) for one in study.methods]
    return View(study, _facts(study), warnings, axis, lines, plates, methods)


def _facts(study: Study) -> dict[str, str]:
    pruners = dict.fromkeys(one.pruner for one in study.methods)
    judged = {} if study.report_on == study.dataset else {"judged on": study.report_on}
    return {
        "objective": ", ".join(study.objectives), "chosen on": f"validation of {study.dataset}", **judged,
        "labels": study.labels, "validation seeds": ", ".join(map(str, study.seeds)), "trials of each method": str(study.trials),
        "sampler": study.sampler, "pruner": ", ".join(pruners),
        "device time": typography.seconds(sum(one.seconds for one in study.methods)),
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------- default and tuned


def _table(study: Study) -> tuple[Markup, list[Line]]:
    gaps = {one.method: _gaps(one, study.metric) for one in study.methods}
    every = [value for found in gaps.values() for value in found.values()]
    done = [one.confirmed.gap for one in study.methods if one.confirmed is not None and one.confirmed.gap is not None]
    scale = _scale(study.metric)
    intervals = [(scale * gap.low, scale * gap.high) for gap in done if gap.low is not None and gap.high is not None]
    span = charts.span(every, intervals, zero=True) if every else (0.0, 1.0)
    lines = [Line(one, _strip(one, gaps[one.method], span, study.metric), _trials(one)) for one in study.methods]
    return charts.strip_axis(span) if every else Markup(""), lines


def _gaps(one: MethodSearch, metric: str) -> dict[int, float]:
    done = one.confirmed
    return {} if done is None else {s: _scale(metric) * (done.tuned[s] - done.default[s]) for s in done.seeds}


def _strip(one: MethodSearch, gaps: Mapping[int, float], span: tuple[float, float], metric: str) -> Markup:
    if one.confirmed is None or one.confirmed.gap is None:
        return Markup("")
    gap, scale = one.confirmed.gap, _scale(metric)
    interval = None if gap.low is None or gap.high is None else (scale * gap.low, scale * gap.high)
    dots = [(f"seed {seed}: {charts.number(value)}", value) for seed, value in gaps.items()]
    name = f"{one.method}: tuned minus default {typography.points(gap.mean, metric)}, {gap.n} seeds"
    return charts.strip(
        dots, scale * gap.mean, interval, span, name=name, reference=0.0, emphasis=gap.verdict == "gain"
    )


def _trials(one: MethodSearch) -> str:
    words = dict(zip(studies.STATES, ("complete", "pruned", "failed", "running", "waiting"), strict=True))
    failures = ", ".join(f"{reason} {count}" for reason, count in one.failures.items())
    counts = ", ".join(f"{count} {words[state]}" for state, count in one.counts.items() if count)
    return f"{counts} ({failures})" if failures else counts


# ------------------------------------------------------------------------------------------------- of all its methods


def _history(study: Study, looks: Looks) -> Plate:
    series, rows = [], []
    scale = _scale(study.metric)
    for one in study.methods:
        steps: list[tuple[float, float]] = []
        for trial, best in one.history:
            if best is not None:
                steps += [(float(trial.number), steps[-1][1])] if steps else []
                steps.append((float(trial.number), scale * best))
            rows.append([one.method, str(trial.number), trial.state.lower(), typography.value(trial.value, study.metric),
                         typography.value(best, study.metric), trial.reason or ""])  # fmt: skip
        cloud = [(float(trial.number), scale * (trial.value or 0.0)) for trial in one.complete]
        series.append(Series(one.method, steps, cloud, looks[one.method]))
    svg = charts.lines(series, f"Optimisation history of {study.name}", "trial", _axis(study), markers=False)
    caption = "Dots are completed trials, steps the best so far; pruned and failed trials have no value and no dot."
    return Plate(
        "Optimisation history", caption, svg, ["method", "trial", "state", "value", "best so far", "reason"], rows
    )


def _expected(study: Study, looks: Looks) -> Plate:
    curves = {one.method: one.expected_best for one in study.methods}
    most = max(map(len, curves.values()), default=0)
    scale = _scale(study.metric)
    series = [Series(method, [(float(n), scale * value) for n, value in enumerate(curve, 1)], look=looks[method])
              for method, curve in curves.items()]  # fmt: skip
    svg = charts.lines(series, f"Expected best of {study.name}", "trials", _axis(study), markers=most <= MARKED)
    rows = [[str(n), *(typography.value(curve[n - 1] if n <= len(curve) else None, study.metric) for curve in curves.values())]
            for n in range(1, most + 1)]  # fmt: skip
    caption = ("Best validation value to expect of so many of the trials, in any order (Dodge et al., 2019, without "
               "replacement). A pruned or failed trial was paid for: it counts as the worst completed one.")  # fmt: skip
    return Plate("Expected best against trials", caption, svg, ["trials", *curves], rows)


# ------------------------------------------------------------------------------------------------------ of one method


def _method(one: MethodSearch, study: Study, style: Look) -> MethodView:
    scale, count = _scale(study.metric), len(one.complete)

    def value(trial: Trial) -> float:
        return scale * (trial.value or 0.0)

    order = [part.key for part in study_slices.slices(one)]
    named = f"{one.method} in {study.name}"
    plates = [
        Plate("Importance", f"PED-ANOVA over {count} completed trials: what set the best of them apart.",
              study_charts.bars(one.importance, f"Importance: {named}", style), ["setting", "share"],
              [[key, f"{100 * portion:.1f}%"] for key, portion in one.importance.items()]),
        Plate("Parallel coordinates", "One line per completed trial, the best quarter strong, the best one in another colour.",
              study_charts.parallel(one, value, f"{_axis(study)}, validation", f"Parallel coordinates: {named}", style),
              ["trial", _axis(study), *one.space],
              [[str(t.number), typography.value(t.value, study.metric),
                *(study_slices.written(t.params.get(key)) for key in one.space)]
               for t in sorted(one.complete, key=lambda t: (-(t.value or 0.0), t.number))]),
        Plate("Slices", "Validation value against each varied setting; the large dot is the best trial.",
              study_charts.slices(one, order, value, _axis(study), f"Slices: {named}", style),
              ["setting", "part of its range", "trials", "best", "mean"],
              [[part.key, each.name, str(each.count), typography.value(each.best, study.metric),
                typography.value(each.mean, study.metric)]
               for part in study_slices.slices(one) for each in part.parts]),
    ]  # fmt: skip
    why = ""
    if not one.importance:
        few = count < studies.LEAST_FOR_IMPORTANCE
        need = f"too few, {studies.LEAST_FOR_IMPORTANCE} are needed" if few else "nothing varied in them"
        why = f"{count} completed trials: {need}"
    front = [
        (t.number, _values(t, study)) for t in one.complete if t.number in one.pareto and len(study.objectives) > 1
    ]
    return MethodView(one, why, front, [plate for plate in plates if plate.svg])


def _values(trial: Trial, study: Study) -> list[str]:
    metrics = [objective.rpartition(".")[2] for objective in study.objectives]
    return [typography.value(value, metric) for value, metric in zip(trial.values or (), metrics, strict=True)]


def _scale(metric: str) -> int:
    return 100 if typography.is_share(metric) else 1


def _axis(study: Study) -> str:
    return axis_title(study.metric)


__all__ = ["View", "view", "views"]
