"""Linear probe: L2 multinomial logistic regression on frozen features, its strength chosen inside the label budget.

For every readout: features are standardised by the fit rows, the whole path of strengths is solved, the best one on
validation is taken (mean over rounds; the stronger of equals), and the model is refitted on all rows of the budget. An
optimum at either end of the path is flagged (`<readout>.at_edge`). `spatial_pca` is the grid projected to the width of
`gap` by PCA of the fit rows (centred, not scaled), because 576 numbers against 64 is not a fair pair. With one image
per class nothing can be held out: `default_strength` is used and there is no validation row.

Objective: mean cross-entropy + strength / 2 * ||W||^2, bias unpenalised (scikit-learn's with C = 1 / (n * strength)).

Solver: truncated Newton (Dembo & Steihaug, 1983; Lin, Weng & Keerthi, 2008) from the strongest penalty to the weakest,
each warm-started by the one before. The features are rotated to their principal axes, where the Hessian is close to
diag(eigenvalues) x mean(diag(p) - p p^T) + strength; its inverse preconditions the conjugate gradients. It stops when
the decrease it still expects is below a share of the objective: PATH_TOLERANCE while strengths are compared (products
with the features in float32), TOLERANCE for the refit (gradients in float64; Hessian products, which only choose the
direction, stay float32).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harness.contracts import Encoder, Evaluation, EvaluationTask, Evaluator, HarnessError, Measurement, setting

PATH_TOLERANCE = 1e-3  # relative excess of the objective
TOLERANCE = 1e-10
MAX_NEWTON_STEPS = 100
MAX_PRODUCTS = 400  # Hessian products in one Newton step
FORCING = 0.1  # squared residual left by one truncated solve; 3x fewer products than a superlinear rule on 4,000 x 576
FLOAT32_FROM = 1e-5  # a looser tolerance needs no float64 products
ROTATED_UP_TO = 4096  # axes; an eigendecomposition beyond this costs more than it saves
ROWS_AT_ONCE = 8192  # of test features standardised in float64


@dataclass(frozen=True)
class Standardiser:
    """Per-feature shift and scale of the fit rows; a constant feature is only shifted, to zero."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> Standardiser:
        """features (n, D) float64."""
        if features.shape[1] == 0:
            return cls(features.mean(0), features.new_ones(0))
        mean, scale = features.mean(0), features.std(0, correction=0)
        constant = scale <= 1e-6 * mean.abs().clamp_min(1e-30)  # float32 rounding of a constant is about 1e-7
        return cls(mean, torch.where(constant, 1.0, scale))

    def __call__(self, features: Tensor) -> Tensor:
        return (features.to(self.mean.dtype) - self.mean) / self.scale


@dataclass(frozen=True)
class LinearModel:
    """logits = standardise(features) @ weight + bias. weight (D, K), bias (K,) float64.

    objective: its value at the solution; converged: whether the tolerance was met within the step limit
    """

    standardise: Standardiser
    weight: Tensor
    bias: Tensor
    objective: float
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """(n, D) -> (n, K) float64, in blocks of rows."""
        return torch.cat([self.standardise(rows) @ self.weight + self.bias for rows in features.split(ROWS_AT_ONCE)])


def fit_path(
    features: Tensor, labels: Tensor, num_classes: int, strengths: list[float], tolerance: float = TOLERANCE
) -> list[LinearModel]:
    """Fit one model per strength, in the order given; fastest from strong to weak.

    features (n, D) float, labels (n,) int64 in [0, num_classes); a class without rows gets a very low bias, no error.
    """
    rows = features.double()
    standardise = Standardiser.fit(rows)
    axes, rotation = _principal_axes(standardise(rows))
    present, targets = torch.unique(labels, return_inverse=True)
    solver = _NewtonSolver(axes, targets, len(present), torch.float32 if tolerance >= FLOAT32_FROM else torch.float64)
    models = []
    for strength in strengths:
        converged = solver.solve(strength, tolerance)
        weight = torch.zeros(features.shape[1], num_classes, dtype=torch.float64, device=features.device)
        bias = torch.full((num_classes,), float(solver.bias.min()) - 100.0, dtype=torch.float64, device=features.device)
        weight[:, present] = solver.weight if rotation is None else rotation @ solver.weight
        bias[present] = solver.bias
        models.append(LinearModel(standardise, weight, bias, solver.objective(strength), converged))
    return models


def _principal_axes(features: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rotate (n, D) float64 to its principal axes: (n, r) and the rotation (D, r); axes without variance are dropped.

    Exact: the penalty is rotation invariant and the optimal weight has no part outside the span of the rows. More
    features than rows go through the (n, n) Gram matrix. (features, None) when both sides exceed ROTATED_UP_TO.
    """
    num_rows, width = features.shape
    if min(num_rows, width) > ROTATED_UP_TO or width == 0:  # 0: principal components of features that are all constant
        return features, None
    if width <= num_rows:
        energy, rotation = torch.linalg.eigh(features.T @ features)
        kept = energy > 1e-14 * energy[-1].clamp_min(1e-30)
        rotation = rotation[:, kept]
    else:
        energy, rows = torch.linalg.eigh(features @ features.T)
        kept = energy > 1e-14 * energy[-1].clamp_min(1e-30)
        rotation = features.T @ (rows[:, kept] / energy[kept].sqrt())
    return features @ rotation, rotation


class _NewtonSolver:
    """Softmax regression on fixed rows; `weight` (D, K) and `bias` (K,) carry over from one strength to the next."""

    def __init__(self, features: Tensor, targets: Tensor, num_classes: int, dtype: torch.dtype) -> None:
        self.features = features.float()
        self.exact = features.to(dtype)  # what gradients and logits are computed with
        self.energy = features.square().mean(0).float()[:, None]  # (D, 1): eigenvalues of the covariance
        self.targets = targets
        self.weight = features.new_zeros(features.shape[1], num_classes)
        self.bias = features.new_zeros(num_classes)
        self.logits = features.new_zeros(len(features), num_classes)

    def objective(self, strength: float) -> float:
        return float(self._objective(self.logits, self.weight, strength))

    def _objective(self, logits: Tensor, weight: Tensor, strength: float) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, self.targets) + 0.5 * strength * weight.square().sum()

    def solve(self, strength: float, tolerance: float) -> bool:
        """Minimise from where the last call ended; True when the expected decrease is within tolerance."""
        for _ in range(MAX_NEWTON_STEPS):
            probabilities = torch.softmax(self.logits, 1)
            residual = probabilities.clone()
            residual[torch.arange(len(residual), device=residual.device), self.targets] -= 1
            gradient = self._backward(residual) + strength * self.weight, residual.mean(0)
            hessian = _Hessian(self.features, self.energy, probabilities.float(), strength)
            value = self._objective(self.logits, self.weight, strength)
            if hessian.expected_decrease(*gradient) <= tolerance * float(value):
                return True
            if not self._step(hessian, gradient, value, strength):
                return False
        return False

    def _step(self, hessian: _Hessian, gradient: tuple[Tensor, Tensor], value: Tensor, strength: float) -> bool:
        """One Newton step with backtracking (Armijo); False when no decrease was found: the limit of float64."""
        weight, bias = (part.double() for part in hessian.solve(*gradient))
        logits = self._forward(weight) + bias
        slope = (gradient[0] * weight).sum() + (gradient[1] * bias).sum()
        size = 1.0
        while size > 1e-6:
            moved = self._objective(self.logits + size * logits, self.weight + size * weight, strength)
            if bool(moved <= value + 1e-4 * size * slope):
                self.weight += size * weight
                self.bias += size * bias
                self.logits += size * logits
                return True
            size /= 2
        return False

    def _forward(self, weight: Tensor) -> Tensor:
        return (self.exact @ weight.to(self.exact.dtype)).double()

    def _backward(self, residual: Tensor) -> Tensor:
        return (self.exact.T @ residual.to(self.exact.dtype)).double() / len(residual)


class _Hessian:
    """The Hessian at fixed probabilities (n, K), in float32: products, preconditioner, truncated solve."""

    def __init__(self, features: Tensor, energy: Tensor, probabilities: Tensor, strength: float) -> None:
        self.features, self.probabilities, self.strength = features, probabilities, strength
        mean = torch.diag(probabilities.mean(0)) - probabilities.T @ probabilities / len(probabilities)
        curvature, self.classes = torch.linalg.eigh(mean)
        curvature = curvature.clamp_min(0)
        self.weight_scale = energy * curvature + strength
        # The logits are unchanged by a constant added to every class: that direction of the bias has no curvature.
        self.bias_scale = torch.where(curvature > 1e-6 * curvature[-1], curvature, torch.inf)

    def precondition(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        weight = (weight @ self.classes / self.weight_scale) @ self.classes.T
        return weight, (bias @ self.classes / self.bias_scale) @ self.classes.T

    def expected_decrease(self, weight: Tensor, bias: Tensor) -> float:
        """Half the squared gradient in the preconditioner's metric: about objective - optimum."""
        weight, bias = weight.float(), bias.float()
        scaled_weight, scaled_bias = self.precondition(weight, bias)
        return 0.5 * float((weight * scaled_weight).sum() + (bias * scaled_bias).sum())

    def product(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        change = self.probabilities * (self.features @ weight + bias)
        change -= self.probabilities * change.sum(1, keepdim=True)
        change /= len(change)
        return self.features.T @ change + self.strength * weight, change.sum(0)

    def solve(self, gradient_weight: Tensor, gradient_bias: Tensor) -> tuple[Tensor, Tensor]:
        """-Hessian^-1 gradient by preconditioned conjugate gradients, truncated where more accuracy is of no use."""
        both = torch.cat([gradient_weight.flatten(), gradient_bias])  # of constant features there are no weights
        norm = float(both.abs().max())
        scale = 1 / max(norm, 1e-300)  # keeps float32 away from its smallest numbers
        rest = [-(gradient_weight * scale).float(), -(gradient_bias * scale).float()]
        found = [torch.zeros_like(part) for part in rest]
        scaled = self.precondition(*rest)
        direction = list(scaled)
        size = first = _dot(rest, scaled)
        target = FORCING * first
        for _ in range(MAX_PRODUCTS):
            product = self.product(*direction)
            curvature = _dot(direction, product)
            if not curvature > 0:
                break
            step = size / curvature
            for part in range(2):
                found[part] += step * direction[part]
                rest[part] -= step * product[part]
            scaled = self.precondition(*rest)
            last, size = size, _dot(rest, scaled)
            if size <= target:
                break
            direction = [new + size / last * old for new, old in zip(scaled, direction, strict=True)]
        return found[0].double() / scale, found[1].double() / scale


def _dot(left: list[Tensor] | tuple[Tensor, ...], right: list[Tensor] | tuple[Tensor, ...]) -> float:
    return float(sum((a * b).sum() for a, b in zip(left, right, strict=True)))


def pca(fit: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Mean (D,) and projection (D, at most width) of the fit rows (n, D): centred, not scaled; float64.

    Beyond ROTATED_UP_TO on both sides the first that many rows decide (budget order is a random order).
    """
    rows = fit.double()
    if min(rows.shape) > ROTATED_UP_TO:
        rows = rows[:ROTATED_UP_TO]
    mean = rows.mean(0)
    _, rotation = _principal_axes(rows - mean)
    assert rotation is not None
    return mean, rotation[:, -width:]


class LinearProbe(Evaluator):
    """Linear probe."""

    name = "linear_probe"

    class Config(Evaluator.Config):
        """`eval.linear_probe.*`."""

        weakest: float = setting(1e-6, "weakest penalty per sample", gt=0)
        strongest: float = setting(1e2, "strongest penalty per sample", gt=0)
        num_strengths: int = setting(12, "penalties on the path, evenly spaced in the logarithm", ge=1)
        default_strength: float = setting(
            1e-2, "penalty where nothing can be held out (one label per class): a round value, never tuned", gt=0
        )

    def check(self, encoder: Encoder) -> None:
        """Refuse a path that runs the wrong way."""
        if self.config.weakest > self.config.strongest:
            raise HarnessError(
                f"eval.linear_probe.weakest={self.config.weakest:g} is above strongest={self.config.strongest:g}"
            )

    def evaluate(self, task: EvaluationTask) -> Evaluation:
        """Probe every readout of the encoder, and `spatial_pca` where it has both `gap` and `spatial`."""
        device = task.device if task.device.type == "cuda" else torch.device("cpu")
        found = Evaluation([])
        labels = torch.from_numpy(task.labels("train")).to(device)
        readouts = list(task.encoder.readouts)
        train = {name: task.features("train", name).to(device) for name in readouts}
        pca_width = None
        if {"gap", "spatial"} <= set(readouts) and train["spatial"].shape[1] > train["gap"].shape[1]:
            readouts.append("spatial_pca")
            pca_width = train["gap"].shape[1]
            train["spatial_pca"] = train["spatial"]
        models: dict[str, LinearModel] = {}
        projections: dict[str, tuple[Tensor, Tensor]] = {}
        for name in readouts:
            width = pca_width if name == "spatial_pca" else None
            if not bool(torch.isfinite(train[name]).all()):
                found.measurements.append(Measurement(name, "validation", "status", None, status="NONFINITE"))
                continue
            strength = self._choose(name, train[name], labels, task, width, found)
            rows = train[name]
            if width is not None:
                projections[name] = pca(rows, width)
                rows = _project(rows, projections[name])
            models[name] = fit_path(rows, labels, task.info.num_classes, [strength])[0]
        if task.has_test:
            for name, model in models.items():
                features = task.features("test", "spatial" if name == "spatial_pca" else name).to(device)
                features = _project(features, projections[name]) if name in projections else features
                self._test(name, model, features, task.labels("test"), found)
        return found

    def _choose(
        self,
        name: str,
        features: Tensor,
        labels: Tensor,
        task: EvaluationTask,
        pca_width: int | None,
        found: Evaluation,
    ) -> float:
        """The strength with the best validation top-1; its row and whether it lies at an edge go into `found`."""
        if not task.budget.rounds:
            found.chosen |= {f"{name}.strength": self.config.default_strength, f"{name}.at_edge": False}
            return self.config.default_strength
        config = self.config
        strengths = np.geomspace(config.strongest, config.weakest, config.num_strengths).tolist()
        top1 = np.zeros((len(task.budget.rounds), len(strengths)))
        converged = np.zeros_like(top1, dtype=bool)
        for row, (fit, validation) in enumerate(task.budget.rounds):
            fit_rows, rows = features[torch.from_numpy(fit)], features[torch.from_numpy(validation)]
            if pca_width is not None:
                projection = pca(fit_rows, pca_width)
                fit_rows, rows = _project(fit_rows, projection), _project(rows, projection)
            models = fit_path(fit_rows, labels[torch.from_numpy(fit)], task.info.num_classes, strengths, PATH_TOLERANCE)
            targets = labels[torch.from_numpy(validation)]
            for column, model in enumerate(models):
                top1[row, column] = float((model.logits(rows).argmax(1) == targets).double().mean())
                converged[row, column] = model.converged
        best = int(np.argmax(top1.mean(0)))  # the first of equals: the strongest
        at_edge = len(strengths) > 1 and best in (0, len(strengths) - 1)
        found.chosen |= {f"{name}.strength": strengths[best], f"{name}.at_edge": at_edge}
        count = sum(len(validation) for _, validation in task.budget.rounds)
        found.measurements.append(Measurement(
            name, "validation", "top1", float(top1[:, best].mean()), count, bool(converged[:, best].all())
        ))  # fmt: skip
        return strengths[best]

    @staticmethod
    def _test(name: str, model: LinearModel, features: Tensor, labels: np.ndarray, found: Evaluation) -> None:
        if not bool(torch.isfinite(features).all()):
            found.measurements.append(Measurement(name, "test", "status", None, len(labels), status="NONFINITE"))
            return
        logits = model.logits(features)
        targets = torch.from_numpy(labels).to(logits.device)
        predicted = logits.argmax(1)
        nll = float(torch.nn.functional.cross_entropy(logits, targets))
        top1 = float((predicted == targets).double().mean())
        found.predictions[name] = predicted.cpu().numpy()
        found.measurements += [
            Measurement(name, "test", "top1", top1, len(labels), model.converged),
            Measurement(name, "test", "nll", nll, len(labels), model.converged),
        ]


def _project(features: Tensor, projection: tuple[Tensor, Tensor]) -> Tensor:
    mean, axes = projection
    return torch.cat([(rows.double() - mean) @ axes for rows in features.split(ROWS_AT_ONCE)])
