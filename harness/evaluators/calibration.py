"""Calibration of the linear probe: whether it is right as often as it says, before and after temperature scaling.

Of every readout's probe (the linear probe's own, `_fitted_probe.py`), on the test split:
- `nll`: mean negative log-likelihood of the true class;
- `ece`: expected calibration error (Naeini, Cooper & Hauskrecht, 2015; Guo, Pleiss, Sun & Weinberger, 2017, eq. 3): the
  mean over 15 equally wide bins of confidence of |accuracy - mean confidence|, weighted by how many images each holds;
- `brier`: mean squared distance between the probabilities and the one-hot label, summed over classes (Brier, 1950): 0
  is perfect, 2 the worst.

`*_scaled` is the same after the logits were divided by one temperature (Guo et al., section 4.2; no image changes its
class). The temperature minimises the NLL of the budget's validation rows before the refit: probes of the chosen
strength, fitted without the rows they judge; under cross-validation the rows of all rounds are pooled. So it is paid
for by the budget like any other choice. Validation rows say what it was and what it did there (`nll_scaled` there is
fitted, not tested). One at an end of what is searched is flagged (`<readout>.temperature_at_edge`): validation rows
that are all right would have it at 0. With one image per class nothing can be held out: no temperature, no scaled rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.contracts import Evaluation, EvaluationTask, Measurement
from harness.evaluators._fitted_probe import FittedProbe, ProbeReader

BINS = 15  # Guo et al. 2017, section 5
TEMPERATURES = (0.1, 10.0)  # searched between: the best for validation rows that are all classified right would be 0
HALVINGS = 60


class Calibration(ProbeReader):
    """Calibration of the linear probe."""

    name = "calibration"

    class Config(ProbeReader.Config):
        """`eval.calibration.*`: the linear probe's settings."""

    def evaluate(self, task: EvaluationTask) -> Evaluation:
        """Fit the temperature of every readout's probe inside the budget, then open the test split once."""
        found = Evaluation([])
        probes = self.fit(task, found)
        temperatures = {name: self._temperature(name, probe, task, found) for name, probe in probes.items()}
        if task.has_test:
            for name, probe in probes.items():
                _test(name, probe, temperatures[name], task, found)
        return found

    def _temperature(self, name: str, probe: FittedProbe, task: EvaluationTask, found: Evaluation) -> float | None:
        if not task.budget.rounds:
            return None
        logits, targets = self.held_out(task, probe)
        temperature = fit_temperature(logits, targets)
        found.chosen |= {
            f"{name}.temperature": temperature, f"{name}.temperature_at_edge": temperature in TEMPERATURES
        }  # fmt: skip
        values = {
            "nll": float(F.cross_entropy(logits, targets)),
            "nll_scaled": float(F.cross_entropy(logits / temperature, targets)),
            "temperature": temperature,
        }
        for metric, value in values.items():
            found.measurements.append(Measurement(name, "validation", metric, value, len(targets)))
        return temperature


def _test(name: str, probe: FittedProbe, temperature: float | None, task: EvaluationTask, found: Evaluation) -> None:
    device = probe.model.weight.device
    features, targets = task.features("test", probe.source).to(device), torch.from_numpy(task.labels("test")).to(device)
    if not bool(torch.isfinite(features).all()):
        found.measurements.append(Measurement(name, "test", "status", None, len(targets), status="NONFINITE"))
        return
    logits = probe.logits(features)
    values = _scores(logits, targets)
    if temperature is not None:
        values |= {f"{metric}_scaled": value for metric, value in _scores(logits / temperature, targets).items()}
    for metric, value in values.items():
        found.measurements.append(Measurement(name, "test", metric, value, len(targets), probe.model.converged))


def _scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    probabilities = torch.softmax(logits, 1)
    return {
        "nll": float(F.cross_entropy(logits, labels)),
        "ece": expected_calibration_error(probabilities, labels),
        "brier": brier_score(probabilities, labels),
    }


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature in TEMPERATURES whose logits / temperature have the lowest NLL: logits (n, K), labels (n,).

    In 1 / temperature the NLL is convex, and its slope is the mean of E_p[logit - logit of the true class]: bisection.
    """
    logits = logits.double()
    margins = logits - logits.gather(1, labels[:, None])

    def falls(temperature: float) -> bool:
        """Whether a lower temperature would lower the NLL; 0 where all probabilities have come to 0 and 1: it did."""
        return float((torch.softmax(logits / temperature, 1) * margins).sum()) <= 0

    low, high = TEMPERATURES
    if falls(low):
        return low
    if not falls(high):
        return high
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if falls(middle) else (middle, high)
    return (low * high) ** 0.5


def expected_calibration_error(probabilities: Tensor, labels: Tensor, num_bins: int = BINS) -> float:
    """Guo et al. 2017, eq. 3, with bins ((b - 1) / M, b / M]: probabilities (n, K), labels (n,) int64."""
    confidence, predicted = probabilities.double().max(1)
    right = (predicted == labels).double()
    edges = torch.arange(1, num_bins, dtype=torch.float64, device=confidence.device) / num_bins
    places = torch.bucketize(confidence, edges)  # edges[i - 1] < confidence <= edges[i]
    gaps = torch.zeros(num_bins, dtype=torch.float64, device=confidence.device).index_add_(
        0, places, right - confidence
    )
    return float(gaps.abs().sum() / len(labels))


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    """Brier 1950, eq. 2: probabilities (n, K), labels (n,) int64 -> mean over images, sum over classes, in [0, 2]."""
    probabilities = probabilities.double()
    return float((probabilities - F.one_hot(labels, probabilities.shape[1])).square().sum(1).mean())
