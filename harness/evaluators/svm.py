"""Support vector machine on frozen features (Cortes & Vapnik, 1995): the classifier of the floors `pixels_svm`, `hog`.

Up to `kernel_limit` labels it has an RBF kernel exp(-gamma ||a - b||^2) with gamma = multiplier / (D * variance) of the
fit rows; C and the multiplier are chosen on validation (mean over rounds; of equals the smoothest: smallest C, then
smallest multiplier) and the machine is refitted on the whole budget. The kernel matrix is computed here, as one matrix
product, because libsvm's own loop over pixels takes ten times as long. Beyond the limit it is the linear machine
(one-against-rest, squared hinge), and its metric is `top1_linear`. Features are not standardised one by one: the border
pixels of centred images vary little and should weigh little.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import SVC, LinearSVC

from harness.contracts import Evaluation, EvaluationTask, Evaluator, Measurement, Positives, setting

KERNEL_ROWS_AT_ONCE = 2048
Predictor = Callable[[np.ndarray], np.ndarray]


class SupportVectorMachine(Evaluator):
    """Support vector machine."""

    name = "svm"

    class Config(Evaluator.Config):
        """`eval.svm.*`. The first value of each grid is the smoothest."""

        c: Positives = setting((1.0, 10.0, 100.0), "RBF: cost of an error, ascending")
        gamma: Positives = setting((0.5, 1.0, 2.0), "RBF: multipliers of 1 / (D * variance), ascending")
        linear_c: Positives = setting((0.1, 1.0, 10.0), "linear: cost of an error, ascending")
        default_c: float = setting(10.0, "where nothing can be held out: a round value, never tuned", gt=0)
        default_linear_c: float = setting(1.0, "the same for the linear machine", gt=0)
        kernel_limit: int = setting(10_000, "most labels for the kernel", source="design: protocol, floors", ge=1)

    def evaluate(self, task: EvaluationTask) -> Evaluation:
        """Classify by every readout of the encoder: the grid on validation, then a refit for the test split."""
        found = Evaluation([])
        labels = task.labels("train")
        linear = len(labels) > self.config.kernel_limit
        metric = "top1_linear" if linear else "top1"
        machines: dict[str, tuple[Predictor, bool]] = {}
        for name in task.encoder.readouts:
            features = task.features("train", name).numpy()
            if not np.isfinite(features).all():
                found.measurements.append(Measurement(name, "validation", "status", None, status="NONFINITE"))
                continue
            c, gamma = self._choose(name, metric, features, labels, linear, task, found)
            machines[name] = _fit_linear(features, labels, c) if linear else _fit_kernel(features, labels, c, gamma)
        if task.has_test:
            for name, (predict, converged) in machines.items():
                features, targets = task.features("test", name).numpy(), task.labels("test")
                if not np.isfinite(features).all():
                    found.measurements.append(
                        Measurement(name, "test", "status", None, len(targets), status="NONFINITE")
                    )
                    continue
                found.predictions[name] = predict(features).astype(np.int64)
                top1 = float((found.predictions[name] == targets).mean())
                found.measurements.append(Measurement(name, "test", metric, top1, len(targets), converged))
        return found

    def _choose(
        self,
        name: str,
        metric: str,
        features: np.ndarray,
        labels: np.ndarray,
        linear: bool,
        task: EvaluationTask,
        found: Evaluation,
    ) -> tuple[float, float]:
        """(C, gamma multiplier) with the best validation top-1; its row goes into `found`. gamma is 1 when linear."""
        config = self.config
        cs, gammas = (config.linear_c, (1.0,)) if linear else (config.c, config.gamma)
        if not task.budget.rounds:
            best = (config.default_linear_c if linear else config.default_c), 1.0
            found.chosen |= {f"{name}.c": best[0], f"{name}.gamma": best[1], f"{name}.at_edge": False}
            return best
        scores = np.mean([_scores(features, labels, *r, cs, gammas, linear) for r in task.budget.rounds], axis=0)
        row, column = np.unravel_index(int(scores.argmax()), scores.shape)  # the first of equals
        at_edge = any(len(grid) > 1 and i in (0, len(grid) - 1) for grid, i in ((cs, row), (gammas, column)))
        found.chosen |= {f"{name}.c": cs[row], f"{name}.gamma": gammas[column], f"{name}.at_edge": at_edge}
        count = sum(len(validation) for _, validation in task.budget.rounds)
        found.measurements.append(Measurement(name, "validation", metric, float(scores[row, column]), count))
        return cs[row], gammas[column]


def _scores(
    features: np.ndarray, labels: np.ndarray, fit: np.ndarray, validation: np.ndarray,
    cs: tuple[float, ...], gammas: tuple[float, ...], linear: bool,
) -> np.ndarray:  # fmt: skip
    """Validation top-1 of one round: (len(cs), len(gammas))."""
    out = np.empty((len(cs), len(gammas)))
    rows, targets, held_out = features[fit], labels[fit], features[validation]
    if linear:
        for i, c in enumerate(cs):
            out[i, 0] = (_fit_linear(rows, targets, c)[0](held_out) == labels[validation]).mean()
        return out
    among, across = squared_distances(rows, rows), squared_distances(held_out, rows)
    for j, gamma in enumerate(gammas):
        scale = -gamma * _unit_gamma(rows)
        kernel, held_out_kernel = np.exp(scale * among), np.exp(scale * across)
        for i, c in enumerate(cs):
            machine = SVC(C=c, kernel="precomputed").fit(kernel, targets)
            out[i, j] = (machine.predict(held_out_kernel) == labels[validation]).mean()
    return out


def _fit_kernel(features: np.ndarray, labels: np.ndarray, c: float, gamma: float) -> tuple[Predictor, bool]:
    scale = -gamma * _unit_gamma(features)
    machine = SVC(C=c, kernel="precomputed").fit(np.exp(scale * squared_distances(features, features)), labels)

    def predict(queries: np.ndarray) -> np.ndarray:
        blocks = range(0, len(queries), KERNEL_ROWS_AT_ONCE)
        parts = (queries[start : start + KERNEL_ROWS_AT_ONCE] for start in blocks)
        return np.concatenate([machine.predict(np.exp(scale * squared_distances(part, features))) for part in parts])

    return predict, bool(machine.fit_status_ == 0)


def _fit_linear(features: np.ndarray, labels: np.ndarray, c: float) -> tuple[Predictor, bool]:
    """On features centred and divided by one number that makes the mean squared row 1, so that C has no unit."""
    mean, scale = features.mean(0, dtype=np.float64), _unit_gamma(features) ** 0.5
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        machine = LinearSVC(C=c, dual=False, tol=1e-3).fit((features - mean) * scale, labels)
    converged = not any(issubclass(w.category, ConvergenceWarning) for w in caught)
    return lambda queries: machine.predict((queries - mean) * scale), converged


def _unit_gamma(features: np.ndarray) -> float:
    """1 / (D * variance over all entries); 1 / D for constant features."""
    variance = float(features.var(dtype=np.float64))
    return 1.0 / (features.shape[1] * (variance if variance > 0 else 1.0))


def squared_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(N, D), (M, D) -> (N, M) float64, never negative."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    out = left @ right.T
    out *= -2
    out += np.square(left).sum(1)[:, None]
    out += np.square(right).sum(1)
    return np.maximum(out, 0, out=out)
