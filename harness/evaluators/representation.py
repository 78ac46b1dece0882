"""Label-free measures of a representation: an alarm within one method, never a ranking across methods.

On a fixed sample of pretraining images and the first readout of the encoder (`gap` for conv nets):
- `effective_rank`: RankMe (Garrido et al., 2023), exp of the entropy of the normalised singular values; not centred,
  as there.
- `lidar`: Thilak et al., 2024: the same of the eigenvalues of Sw^-1/2 Sb Sw^-1/2, where every image is a class and its
  views are the members.
- `alignment`, `uniformity`: Wang & Isola, 2020 (section 4.1, alpha = t = 2) on unit-normalised features.
- `feature_std`: standard deviation of the unit-normalised features, averaged over dimensions; 1 / sqrt(D) at most.

Views are shifts of up to 2 pixels and, where it keeps the label, mirroring: the same for every method, encoder and
seed, so that an arm can be followed over time. They are milder than the authors' own augmentations, and LiDAR's sample
is smaller, so the values are not those of the papers.
`collapsed` = effective rank below 1.5 or feature_std below 0.1 / sqrt(D).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.linalg import eigh
from torch import Tensor
from torch.nn import functional as F

from harness.augment import hash_seeds, shift_and_mirror
from harness.contracts import Evaluation, EvaluationTask, Evaluator, Measurement, setting

RANK_EPSILON = 1e-7  # Garrido et al. 2023: added to every share
WITHIN_EPSILON = 1e-4  # Thilak et al. 2024, delta: keeps Sw invertible
SHIFT = 2
COLLAPSED_RANK = 1.5
COLLAPSED_STD = 0.1
BATCH = 256


class Representation(Evaluator):
    """Representation."""

    name = "representation"
    needs_labels = False

    class Config(Evaluator.Config):
        """`eval.representation.*`."""

        num_images: int = setting(512, "images whose views are compared, the first of the sample", ge=2)
        num_views: int = setting(10, "views of each", ge=2)

    def evaluate(self, task: EvaluationTask) -> Evaluation:
        """Measure the sample's features and those of its views; one row per measure."""
        readout = task.encoder.readouts[0]
        features = task.features("pretrain", readout).double()
        views = self._views(task, readout)
        if not bool(torch.isfinite(features).all() and torch.isfinite(views).all()):
            return Evaluation([Measurement(readout, "pretrain", "status", None, status="NONFINITE")])
        spread = feature_std(features)
        rank = effective_rank(features)
        values = {
            "effective_rank": rank,
            "lidar": lidar(views),
            "alignment": alignment(views[:, 0], views[:, 1]),
            "uniformity": uniformity(views[:, 0]),
            "feature_std": spread,
        }
        collapsed = rank < COLLAPSED_RANK or spread < COLLAPSED_STD / math.sqrt(features.shape[1])
        found = [
            Measurement(readout, "pretrain", metric, value, collapsed=collapsed)
            for metric, value in values.items()
            if math.isfinite(value)
        ]
        if len(found) < len(values):  # features near the largest float overflow when squared
            found.append(Measurement(readout, "pretrain", "status", None, status="NONFINITE", collapsed=collapsed))
        return Evaluation(found)

    @torch.inference_mode()
    def _views(self, task: EvaluationTask, readout: str) -> Tensor:
        """Features of every view: (num_images, num_views, D) float64 on the CPU."""
        images = task.images("pretrain")[: self.config.num_images].to(task.device)
        seeds = hash_seeds(0, 0, torch.arange(len(images), device=images.device))
        mirror = task.info.mirror_keeps_label
        columns = []
        for number in range(self.config.num_views):
            views = shift_and_mirror(images, seeds, f"representation{number}", SHIFT, mirror)
            parts = [task.encoder.read(task.encoder(part), readout).cpu() for part in views.split(BATCH)]
            columns.append(torch.cat(parts).double())
        return torch.stack(columns, 1)


def _spectral_rank(spectrum: np.ndarray) -> float:
    """exp of the entropy of a non-negative spectrum; 0 where all of it is zero."""
    total = spectrum.sum()
    if total <= 0:
        return 0.0
    share = spectrum / total + RANK_EPSILON
    return float(np.exp(-(share * np.log(share)).sum()))


def effective_rank(features: Tensor) -> float:
    """RankMe of (N, D) features: between 1 and min(N, D)."""
    return _spectral_rank(torch.linalg.svdvals(features).numpy())


def lidar(views: Tensor) -> float:
    """LiDAR of (N, V, D) float64 features, V >= 2 views of N images; 0 where the images' means are all equal."""
    num_images, num_views, width = views.shape
    means = views.mean(1)
    centred = means - means.mean(0)
    between = centred.T @ centred / (num_images - 1)
    rest = (views - means[:, None]).reshape(-1, width)
    within = rest.T @ rest / (num_images * (num_views - 1)) + WITHIN_EPSILON * torch.eye(width, dtype=views.dtype)
    if not bool(torch.isfinite(between).all() and torch.isfinite(within).all()):
        return math.nan
    ratios = eigh(between.numpy(), within.numpy(), eigvals_only=True)  # those of Sw^-1/2 Sb Sw^-1/2
    return _spectral_rank(ratios.clip(min=0))


def alignment(left: Tensor, right: Tensor) -> float:
    """Mean squared distance of two views' unit-normalised features, both (N, D)."""
    return float((F.normalize(left, dim=1) - F.normalize(right, dim=1)).square().sum(1).mean())


def uniformity(features: Tensor) -> float:
    """log of the mean of exp(-2 ||a - b||^2) over all pairs of different rows of (N, D), unit-normalised."""
    return float(F.pdist(F.normalize(features, dim=1)).square().mul(-2).exp().mean().log())


def feature_std(features: Tensor) -> float:
    """Standard deviation over the N rows of (N, D) unit-normalised features, averaged over D."""
    return float(F.normalize(features, dim=1).std(0, correction=0).mean())
