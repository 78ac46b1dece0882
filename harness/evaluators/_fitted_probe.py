"""The linear probe as a model to ask: for evaluators that want more of it than its accuracy on the test split.

Standardised features, the strength chosen on validation, the refit on the whole budget: all of it is the linear probe's
own code, so on clean test images such an evaluator repeats the probe's `top1` exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.contracts import Evaluation, EvaluationTask, Measurement
from harness.evaluators.linear_probe import LinearModel, LinearProbe, _project, fit_path, pca


@dataclass(frozen=True)
class FittedProbe:
    """One readout's probe, fitted on the whole budget.

    source: the encoder's readout that it reads (`spatial` for `spatial_pca`); strength: chosen on validation
    width: asked of the projection of `spatial_pca`, else None; projection: mean (D,) and axes (D, at most width)
    """

    source: str
    width: int | None
    strength: float
    model: LinearModel
    projection: tuple[Tensor, Tensor] | None

    def logits(self, features: Tensor) -> Tensor:
        """Features of `source` (n, D) -> (n, K) float64."""
        return self.model.logits(features if self.projection is None else _project(features, self.projection))


class ProbeReader(LinearProbe):
    """Base of evaluators that question the linear probe; its settings are the probe's, under their own name."""

    def fit(self, task: EvaluationTask, found: Evaluation) -> dict[str, FittedProbe]:
        """The probe of every readout; validation rows and what was chosen go into `found`, as the linear probe's do."""
        device = probe_device(task)
        labels = torch.from_numpy(task.labels("train")).to(device)
        probes: dict[str, FittedProbe] = {}
        for name, (source, width) in self._readouts(task).items():
            rows = task.features("train", source).to(device)
            if not bool(torch.isfinite(rows).all()):
                found.measurements.append(Measurement(name, "validation", "status", None, status="NONFINITE"))
                continue
            strength = self._choose(name, rows, labels, task, width, found)
            rows, projection = _projected(rows, width)
            model = fit_path(rows, labels, task.info.num_classes, [strength])[0]
            probes[name] = FittedProbe(source, width, strength, model, projection)
        return probes

    def held_out(self, task: EvaluationTask, probe: FittedProbe) -> tuple[Tensor, Tensor]:
        """Logits (n, K) float64 and labels (n,) of the budget's validation rows, pooled over its rounds; each is judged
        by a probe of the chosen strength that was fitted without it. The budget must have rounds."""
        device = probe_device(task)
        features = task.features("train", probe.source).to(device)
        labels = torch.from_numpy(task.labels("train")).to(device)
        logits, targets = [], []
        for fit, validation in task.budget.rounds:
            rows, projection = _projected(features[torch.from_numpy(fit)], probe.width)
            model = fit_path(rows, labels[torch.from_numpy(fit)], task.info.num_classes, [probe.strength])[0]
            without = replace(probe, model=model, projection=projection)
            logits.append(without.logits(features[torch.from_numpy(validation)]))
            targets.append(labels[torch.from_numpy(validation)])
        return torch.cat(logits), torch.cat(targets)

    @staticmethod
    def _readouts(task: EvaluationTask) -> dict[str, tuple[str, int | None]]:
        """{name: (the encoder's readout, width of its projection or None)}, as the linear probe has them."""
        out: dict[str, tuple[str, int | None]] = {name: (name, None) for name in task.encoder.readouts}
        if {"gap", "spatial"} <= set(out):
            width = task.features("train", "gap").shape[1]
            if task.features("train", "spatial").shape[1] > width:
                out["spatial_pca"] = ("spatial", width)
        return out


def probe_device(task: EvaluationTask) -> torch.device:
    """Where probes are fitted and asked: in float64, so on CUDA or the CPU."""
    return task.device if task.device.type == "cuda" else torch.device("cpu")


def _projected(rows: Tensor, width: int | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    if width is None:
        return rows, None
    projection = pca(rows, width)
    return _project(rows, projection), projection
