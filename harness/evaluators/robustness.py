"""Robustness: the linear probe, fitted on clean images, on test images that were corrupted.

Eight corruptions in the style of MNIST-C (Mu & Gilmer, 2019), five severities each, made here on the device; nothing is
downloaded and no corrupted image is ever fitted on. What is random of one (a direction, a place, noise) is a hash of
(test index, corruption, severity), so every method sees the same corrupted images, in every run.

Strengths are those of Mu & Gilmer's code where it has them; lengths there are pixels of 28 and grow here with the side:
- `translate`: by so many pixels along both axes, each way at random; what comes in is black;
- `rotate`: by so many radians, either way; `scale`: shrunk to this share of the side; black around both;
- `noise`: Gaussian, this standard deviation of the full range (Hendrycks & Dietterich, 2019, use the same);
- `blur`: Gaussian, sigma in pixels; `brightness`: so much added to the HSV value;
- `stripe`: so many columns on the left and on the right are inverted (theirs has the last severity only);
- `occlusion`: a grey square of this share of the side, anywhere inside (after DeVries & Taylor, 2017; theirs has none).

Metrics: `top1_clean` (the probe's own `top1`), `top1_<corruption>_<severity>`, their mean `top1_<corruption>`, the mean
over all `top1_corrupted`, and `top1_unseen`: over the corruptions that the method's own views do not contain, told by
the names of its settings (IN_VIEWS; in doubt it has seen one) and by what it declares. Where they contain all there is
no such row. `top1_unseen` of two methods may be over different corruptions: compare them corruption by corruption.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.augment import hash_seeds, integers, to_float, uniform
from harness.contracts import Evaluation, EvaluationTask, Measurement
from harness.evaluators._fitted_probe import FittedProbe, ProbeReader, probe_device
from harness.image_operations import blur
from harness.views import SMALL

SEVERITIES = (1, 2, 3, 4, 5)
SIDE = 28  # pixels that lengths were written for
BATCH = 256

# ---------------------------------------------------------------------------------------------------------- corruptions


def corrupt(images: Tensor, indices: Tensor, corruption: str, severity: int) -> Tensor:
    """images (B, C, H, W) uint8, their positions (B,) int64 in the test split -> the same shape, uint8, on the device.

    corruption: one of CORRUPTIONS; severity: 1 to 5
    """
    make, strengths = CORRUPTIONS[corruption]
    corrupted = make(to_float(images), hash_seeds(severity, 0, indices), strengths[severity - 1])
    corrupted = corrupted.clamp(0, 1).mul(255).round().to(torch.uint8)
    return corrupted.contiguous(memory_format=torch.channels_last)


def _translate(images: Tensor, seeds: Tensor, pixels: float) -> Tensor:
    rows, columns = _centred(images)
    moved = [_signs(seeds, f"translate.{axis}") * pixels * images.shape[axis] / SIDE for axis in (2, 3)]
    return _resampled(images, rows - moved[0], columns - moved[1])


def _rotate(images: Tensor, seeds: Tensor, radians: float) -> Tensor:
    rows, columns = _centred(images)
    sine, cosine = _signs(seeds, "rotate") * math.sin(radians), math.cos(radians)
    return _resampled(images, cosine * rows + sine * columns, cosine * columns - sine * rows)


def _scale(images: Tensor, seeds: Tensor, share: float) -> Tensor:
    rows, columns = _centred(images)
    return _resampled(images, rows / share, columns / share)


def _noise(images: Tensor, seeds: Tensor, deviation: float) -> Tensor:
    radius, angle = uniform(seeds, "robustness.noise", (2, *images.shape[1:])).unbind(1)
    normal = (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)  # Box & Muller, 1958
    return images + deviation * normal


def _blur(images: Tensor, seeds: Tensor, sigma: float) -> Tensor:
    side = min(images.shape[2:])
    sigma = sigma * side / SIDE
    taps = min(2 * math.ceil(3 * sigma) + 1, 2 * side - 1)
    return blur(images, torch.full((len(images),), sigma, device=images.device), taps)


def _brightness(images: Tensor, seeds: Tensor, amount: float) -> Tensor:
    value = images.amax(1, keepdim=True)
    raised = (value + amount).clamp(max=1)
    return torch.where(value > 0, images * (raised / value.clamp_min(1e-12)), raised)  # black becomes grey


def _stripe(images: Tensor, seeds: Tensor, columns: float) -> Tensor:
    width = images.shape[3]
    wide = max(1, round(columns * width / SIDE))
    place = torch.arange(width, device=images.device)
    return torch.where((place < wide) | (place >= width - wide), 1 - images, images)


def _occlusion(images: Tensor, seeds: Tensor, share: float) -> Tensor:
    inside = []
    for axis in (2, 3):
        length = images.shape[axis]
        side = max(1, round(share * length))
        start = integers(seeds, f"robustness.occlusion.{axis}", length - side + 1)[:, None]
        place = torch.arange(length, device=images.device)
        inside.append((place >= start) & (place < start + side))
    square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill(square, 128 / 255)


def _signs(seeds: Tensor, stream: str) -> Tensor:
    """-1 or 1 for each sample: (B, 1, 1)."""
    return torch.where(uniform(seeds, f"robustness.{stream}") < 0.5, -1.0, 1.0)[:, None, None]


def _centred(images: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (H, 1) and columns (1, W) of the pixels, counted from the middle of the image."""
    rows, columns = (torch.arange(n, dtype=torch.float32, device=images.device) - (n - 1) / 2 for n in images.shape[2:])
    return rows[:, None], columns[None, :]


def _resampled(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Every pixel read at (row, column) from the middle, bilinear, black outside; both broadcast to (B, H, W)."""
    batch, _, height, width = images.shape
    rows, columns = rows.expand(batch, height, width), columns.expand(batch, height, width)
    grid = torch.stack((2 * columns / width, 2 * rows / height), -1)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


CORRUPTIONS: dict[str, tuple[Callable[[Tensor, Tensor, float], Tensor], tuple[float, ...]]] = {
    "translate": (_translate, (1, 2, 3, 4, 5)),
    "rotate": (_rotate, (0.2, 0.4, 0.6, 0.8, 1.0)),
    "scale": (_scale, (0.9, 0.8, 0.7, 0.6, 0.5)),
    "noise": (_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "blur": (_blur, (1, 2, 3, 4, 6)),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "stripe": (_stripe, (2, 3, 4, 5, 7)),
    "occlusion": (_occlusion, (0.2, 0.3, 0.4, 0.5, 0.6)),
}

# ----------------------------------------------------------------------------------------- what a method has seen before

# Setting of a method: its value that leaves the operation out, and the corruptions that its views contain otherwise.
IN_VIEWS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "shift": (0, ("translate",)),
    "patch": (None, ("translate",)),  # patches lie anywhere
    "grid": (1, ("translate",)),  # tiles of a puzzle too
    "crop_scale": (1, ("translate", "scale")),
    "local_scale": (1, ("translate", "scale")),
    "zoom": (1, ("scale",)),
    "turn": (0, ("rotate",)),
    "jitter": (0, ("brightness",)),
    "colours": (0, ("brightness",)),
    "blur": (0, ("blur",)),
    "level": (0, ("noise",)),  # of destroyed pixels
    "drop_colours": (False, ("noise",)),
    "hole": (0, ("occlusion",)),
    "mask": (0, ("occlusion",)),
    "blocks": (0, ("occlusion",)),
}


def seen_in_views(settings: Mapping[str, Any], declared: tuple[str, ...], image_size: tuple[int, int]) -> set[str]:
    """Corruptions that a method's views contain: by its settings {dotted name: value}, and those it declares."""
    seen = set(declared)
    for name, value in settings.items():
        if name == "blur" and value == "auto":
            value = 0 if min(image_size) < SMALL else 1
        if name in IN_VIEWS and value != IN_VIEWS[name][0]:
            seen.update(IN_VIEWS[name][1])
    return seen


# ------------------------------------------------------------------------------------------------------------ evaluator


class Robustness(ProbeReader):
    """Robustness of the linear probe to corruptions."""

    name = "robustness"

    class Config(ProbeReader.Config):
        """`eval.robustness.*`: the linear probe's settings."""

    def evaluate(self, task: EvaluationTask) -> Evaluation:
        """Fit every readout's probe on the clean budget, then judge it on clean and on corrupted test images."""
        found = Evaluation([])
        probes = self.fit(task, found)
        found.measurements = [replace(m, metric="top1_clean") if m.metric == "top1" else m for m in found.measurements]
        seen = seen_in_views(task.method_settings, task.view_corruptions, task.info.image_size)
        found.chosen["seen_in_views"] = sorted(seen & set(CORRUPTIONS))
        if task.has_test and probes:
            labels = torch.from_numpy(task.labels("test")).to(probe_device(task))
            hits = {
                name: {"top1_clean": _hits(p, task.features("test", p.source), labels)} for name, p in probes.items()
            }
            for metric, right in self._corrupted(task, probes, labels):
                for name, count in right.items():
                    hits[name][metric] = count
            for name, probe in probes.items():
                _rows(name, probe, hits[name], len(labels), seen, found)
        return found

    @staticmethod
    @torch.inference_mode()
    def _corrupted(
        task: EvaluationTask, probes: Mapping[str, FittedProbe], labels: Tensor
    ) -> list[tuple[str, dict[str, float]]]:
        """[(metric, {readout: images classified right})]; NaN where a feature is not finite."""
        images, out = task.images("test"), []
        for corruption in CORRUPTIONS:
            for severity in SEVERITIES:
                right = dict.fromkeys(probes, 0.0)
                for start in range(0, len(images), BATCH):
                    clean = images[start : start + BATCH].to(task.device)
                    positions = torch.arange(start, start + len(clean), device=task.device)
                    corrupted = corrupt(clean, positions, corruption, severity)
                    with task.autocast():
                        feature_map = task.encoder(corrupted)
                        features = {p.source: task.encoder.read(feature_map, p.source).float() for p in probes.values()}
                    for name, probe in probes.items():
                        right[name] += _hits(probe, features[probe.source], labels[start : start + BATCH])
                out.append((f"top1_{corruption}_{severity}", right))
        return out


def _hits(probe: FittedProbe, features: Tensor, labels: Tensor) -> float:
    """How many images are classified right; NaN if a feature is not finite."""
    features = features.to(labels.device)
    if not bool(torch.isfinite(features).all()):
        return math.nan
    return float((probe.logits(features).argmax(1) == labels).sum())


def _rows(
    name: str, probe: FittedProbe, hits: Mapping[str, float], count: int, seen: set[str], found: Evaluation
) -> None:
    """The test rows of one readout: each corruption and severity, then the means."""
    if not all(math.isfinite(value) for value in hits.values()):
        found.measurements.append(Measurement(name, "test", "status", None, count, status="NONFINITE"))
        return
    top1 = {metric: value / count for metric, value in hits.items()}
    each = {c: sum(top1[f"top1_{c}_{s}"] for s in SEVERITIES) / len(SEVERITIES) for c in CORRUPTIONS}
    top1 |= {f"top1_{corruption}": value for corruption, value in each.items()}
    top1["top1_corrupted"] = sum(each.values()) / len(each)
    if unseen := [value for corruption, value in each.items() if corruption not in seen]:
        top1["top1_unseen"] = sum(unseen) / len(unseen)
    for metric, value in top1.items():
        found.measurements.append(Measurement(name, "test", metric, value, count, probe.model.converged))
