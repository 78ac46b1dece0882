"""The closing table of one command: every arm beside the controls and floors, each at its validation-chosen readout.

Over several seeds: means, spreads and paired differences, with Student's t interval from three seeds on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from harness import registry
from harness.contracts import Row

PROBE, SVM, KNN, FINE_TUNE = "linear_probe", "svm", "knn", "fine_tune"
BASELINE = "random_init"


@dataclass(frozen=True)
class Line:
    """One arm. Values are fractions of 1 on the test split (validation where there is none); None: not measured.

    headline: the better readout as chosen on validation; readout: which one that is
    gain: headline minus random_init's, same seed and labels; gain_fine_tune: likewise after fine-tuning, None where
        either arm has not converged: such a comparison is not valid
    """

    method: str
    readouts: dict[str, float]
    readout: str | None
    headline: float | None
    knn: float | None
    fine_tune: float | None
    fine_tune_converged: bool | None
    gain: float | None
    gain_fine_tune: float | None


@dataclass(frozen=True)
class Summary:
    """One label budget of one command. split: `test`, or `validation` when there is no test split."""

    labels: str
    split: str
    lines: list[Line]

    @property
    def readouts(self) -> list[str]:
        """Readouts that any arm has, those of networks first."""
        seen = {name for line in self.lines for name in line.readouts}
        return sorted(seen, key=lambda n: ["gap", "spatial", "spatial_pca", "cls", "mean", *sorted(seen)].index(n))

    def verdict(self, method: str) -> str:
        """One sentence: whether `method` is above the best floor, which is what `works` means here."""
        by_name = {line.method: line for line in self.lines}
        names = registry.methods_with_role("floor")
        floors = [line for line in self.lines if line.headline is not None and line.method in names]
        mine = by_name.get(method)
        if mine is None or mine.headline is None or not floors:
            return ""
        best = max(floors, key=lambda line: line.headline or 0.0)
        assert best.headline is not None
        side = "above" if mine.headline > best.headline else "not above"
        return (
            f"{method} ({mine.readout}) reads {mine.headline:.4f}, {side} the best floor, {best.method} at {best.headline:.4f}; "
            "one seed: no interval, no winner."
        )


@dataclass(frozen=True)
class Spread:
    """One number per seed, fractions of 1."""

    values: dict[int, float]

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return fmean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds (n - 1 below); None for one seed."""
        return stdev(self.values.values()) if self.n > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's t 95% interval of the mean; None below three seeds."""
        if self.n < 3 or self.deviation is None:
            return None
        from scipy import stats  # half a second to import, at the end of a command only

        half = float(stats.t.ppf(0.975, self.n - 1)) * self.deviation / self.n**0.5
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class SeedLine:
    """One evaluation of one arm over seeds. gain: paired differences to random_init, seed by seed; None where there is
    no such pair, or where an arm of any pair has not converged: leaving such seeds out would choose among them."""

    method: str
    evaluation: str
    value: Spread
    gain: Spread | None
    converged: bool


@dataclass(frozen=True)
class SeedSummary:
    """One label budget of one command over several seeds."""

    labels: str
    split: str
    seeds: tuple[int, ...]
    lines: list[SeedLine]

    def verdict(self, method: str) -> str:
        """One sentence: the paired difference of `method` to the floor with the best mean."""
        heads = {line.method: line.value for line in self.lines if line.evaluation == HEADLINE}
        names = registry.methods_with_role("floor")
        floors = {name: value for name, value in heads.items() if name in names and name != method}
        if method not in heads or not floors:
            return ""
        best = max(floors, key=lambda name: floors[name].mean)
        paired = _difference(heads[method], floors[best])
        if paired is None:
            return ""
        side = "above" if paired.mean > 0 else "not above"
        interval = paired.interval
        bounds = "" if interval is None else f", 95% interval {100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}"
        few = "; below 3 seeds no interval, below 6 no winner" if paired.n < 3 else "; below 6 seeds no winner"
        return (
            f"{method} reads {heads[method].mean:.4f}, {side} the best floor, {best} at {floors[best].mean:.4f}: paired "
            f"{100 * paired.mean:+.2f} pt over {paired.n} seeds{bounds}{few if paired.n < 6 else ''}."
        )


HEADLINE = "headline"


def over_seeds(rows: Iterable[Row]) -> list[SeedSummary]:
    """One SeedSummary per label budget: every seed's own summary, gathered per arm and evaluation."""
    rows = list(rows)
    numbers = tuple(dict.fromkeys(row.seed for row in rows))
    each = {seed: {s.labels: s for s in summarise(r for r in rows if r.seed == seed)} for seed in numbers}
    out = []
    for labels in dict.fromkeys(name for summaries in each.values() for name in summaries):
        mine = {seed: summaries[labels] for seed, summaries in each.items() if labels in summaries}
        found: dict[tuple[str, str], dict[int, float]] = {}
        unconverged: set[str] = set()
        for seed, summary in mine.items():
            for line in summary.lines:
                if line.fine_tune_converged is False:
                    unconverged.add(line.method)
                for evaluation, value in _evaluations(line).items():
                    found.setdefault((line.method, evaluation), {})[seed] = value
        order = {method: place for place, method in enumerate(dict.fromkeys(method for method, _ in found))}
        lines = []
        for (method, evaluation), values in sorted(found.items(), key=lambda item: order[item[0][0]]):
            bad = evaluation == FINE_TUNE and bool({method, BASELINE} & unconverged)
            base = found.get((BASELINE, evaluation))
            paired = None if method == BASELINE or base is None or bad else _difference(Spread(values), Spread(base))
            own = not (evaluation == FINE_TUNE and method in unconverged)
            lines.append(SeedLine(method, evaluation, Spread(values), paired, own))
        splits = {summary.split for summary in mine.values()}
        out.append(SeedSummary(labels, "/".join(sorted(splits)), tuple(mine), lines))
    return out


def _evaluations(line: Line) -> dict[str, float]:
    found = {**line.readouts, HEADLINE: line.headline, KNN: line.knn, FINE_TUNE: line.fine_tune}
    return {name: value for name, value in found.items() if value is not None}


def _difference(one: Spread, other: Spread) -> Spread | None:
    """Seed by seed, of the seeds that both have."""
    values = {seed: value - other.values[seed] for seed, value in one.values.items() if seed in other.values}
    return Spread(values) if values else None


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """One Summary per label budget, arms in the order in which their rows come; folds are averaged."""
    rows = [row for row in rows if row.value is not None and row.labels is not None]
    out = []
    for labels in dict.fromkeys(row.labels for row in rows):
        mine = [row for row in rows if row.labels == labels]
        split = "test" if any(row.split == "test" for row in mine) else "validation"
        lines = [
            _line([row for row in mine if row.method == method], split)
            for method in dict.fromkeys(r.method for r in mine)
        ]
        baseline = next((line for line in lines if line.method == BASELINE), None)
        out.append(Summary(str(labels), split, [_paired(line, baseline) for line in lines]))
    return out


def _mean(rows: Sequence[Row], evaluator: str, readout: str | None, split: str, metric: str = "top1") -> float | None:
    values = [
        row.value for row in rows
        if row.evaluator == evaluator and row.readout == readout and row.split == split and row.value is not None
        and (row.metric == metric or (evaluator == SVM and row.metric.startswith(metric)))
    ]  # fmt: skip
    return fmean(values) if values else None


def _line(rows: Sequence[Row], split: str) -> Line:
    readouts: dict[str, float] = {}
    choice: list[tuple[float, str]] = []
    # an arm without a probe (a kernel machine on pixels or HOG) is read by its own evaluator
    for evaluator in (PROBE,) if any(r.evaluator == PROBE for r in rows) else (SVM,):
        for name in dict.fromkeys(r.readout for r in rows if r.evaluator == evaluator and r.readout):
            value, validation = _mean(rows, evaluator, name, split), _mean(rows, evaluator, name, "validation")
            if value is not None:
                readouts[name] = value
                choice.append((validation if validation is not None else -1.0, name))
    # equal validation values: the readout named first, gap, wins
    readout = max(choice, key=lambda pair: pair[0])[1] if choice else None
    tuned = [r for r in rows if r.evaluator == FINE_TUNE and r.metric == "top1" and r.split == split]
    flags = [r.converged for r in tuned if r.converged is not None]
    knn_readout = next((r.readout for r in rows if r.evaluator == KNN), None)
    return Line(
        rows[0].method, readouts, readout, readouts.get(readout or ""), _mean(rows, KNN, knn_readout, split),
        fmean(r.value for r in tuned if r.value is not None) if tuned else None, all(flags) if flags else None, None, None,
    )  # fmt: skip


def _paired(line: Line, baseline: Line | None) -> Line:
    if baseline is None or baseline is line:
        return line

    def difference(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a - b

    converged = False not in (line.fine_tune_converged, baseline.fine_tune_converged)
    return Line(
        line.method, line.readouts, line.readout, line.headline, line.knn, line.fine_tune, line.fine_tune_converged,
        difference(line.headline, baseline.headline),
        difference(line.fine_tune, baseline.fine_tune) if converged else None,
    )  # fmt: skip
