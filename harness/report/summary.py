"""The closing table of one command: every arm beside the controls and floors, each at its validation-chosen readout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

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
