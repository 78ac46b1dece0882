"""Features in two dimensions, and what a page needs to show the image behind each point.

Principal components, and t-SNE (van der Maaten & Hinton, 2008; scikit-learn's, seeded, started from the components).
Evidence for a reader, never an input to anything.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Kind = Literal["pca", "tsne"]
KINDS: tuple[Kind, ...] = ("pca", "tsne")
THUMBNAIL_SIDE = 28  # pixels at most: the page shows them enlarged, and 500 of them must stay small


@dataclass(frozen=True)
class Plane:
    """Features as points. points: (K, 2); kept: (K,) positions of the features that are drawn; shares: the part of the
    variance along each of the first two components (whatever the kind)."""

    points: np.ndarray
    kept: np.ndarray
    shares: tuple[float, float]


def plane(features: np.ndarray, kind: Kind, max_points: int = 1000) -> Plane:
    """Project (N, D) features: the first principal components, or t-SNE on up to 50 of them.

    Of more than `max_points` features evenly spaced ones are kept. Raises ValueError when t-SNE has nothing to spread.
    """
    kept = np.linspace(0, len(features) - 1, min(max_points, len(features))).astype(int)
    values = np.nan_to_num(np.asarray(features, dtype=float)[kept])
    values -= values.mean(axis=0)
    _, strengths, directions = np.linalg.svd(values, full_matrices=False)
    shares = strengths**2 / max(float((strengths**2).sum()), 1e-12)
    points = values @ directions[:50].T
    if kind == "tsne":
        points = _tsne(points)
    points = np.pad(points[:, :2], ((0, 0), (0, max(0, 2 - points.shape[1]))))
    return Plane(points, kept, (float(shares[0]), float(shares[1:2].sum())))


def _tsne(values: np.ndarray) -> np.ndarray:
    from sklearn.manifold import TSNE

    if not np.isfinite(values).all() or np.ptp(values, axis=0).max() < 1e-9:
        raise ValueError("the features are all the same or not finite")  # scikit-learn's t-SNE would crash the process
    perplexity = float(np.clip((len(values) - 1) / 4, 1, 30))
    points: np.ndarray = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(values)
    return points


def document(
    planes: dict[Kind, Plane], labels: np.ndarray, classes: Sequence[str] | None, about: dict[str, str]
) -> bytes:
    """The coordinates of a map as JSON; images lie in a sheet of `sheet`'s layout, in the same order.

    Every kind is scaled into the unit square, its longer side filled, y upwards; labels: (N,) integers.
    """
    first = next(iter(planes.values()))
    value: dict[str, Any] = {
        **about,
        "classes": [str(name) for name in classes or ()],
        "labels": [int(labels[index]) for index in first.kept],
        "shares": [round(share, 4) for share in first.shares],
        "columns": _columns(len(first.kept)),
        **{kind: np.round(_unit_square(found.points), 4).tolist() for kind, found in planes.items()},
    }
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def sheet(images: np.ndarray) -> bytes:
    """One PNG of all images (N, C, H, W) uint8, row by row, each at most THUMBNAIL_SIDE pixels wide and high."""
    from PIL import Image

    columns = _columns(len(images))
    step = max(1, math.ceil(max(images.shape[2:]) / THUMBNAIL_SIDE))
    height, width = images.shape[2] // step, images.shape[3] // step
    cut = images[:, :, : height * step, : width * step].astype(float)
    small = cut.reshape(len(images), -1, height, step, width, step).mean(axis=(3, 5)).round().astype(np.uint8)
    small = small if small.shape[1] == 3 else small.mean(axis=1, keepdims=True).round().astype(np.uint8)
    rows = math.ceil(len(small) / columns)
    canvas = np.zeros((rows * columns, *small.shape[1:]), dtype=np.uint8)
    canvas[: len(small)] = small
    grid = canvas.reshape(rows, columns, -1, height, width).transpose(0, 3, 1, 4, 2)
    picture = Image.fromarray(grid.reshape(rows * height, columns * width, -1).squeeze(-1) if grid.shape[-1] == 1
                              else grid.reshape(rows * height, columns * width, 3))  # fmt: skip
    buffer = io.BytesIO()
    picture.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _columns(count: int) -> int:
    return max(1, math.ceil(math.sqrt(count)))


def _unit_square(points: np.ndarray) -> np.ndarray:
    low, high = points.min(axis=0), points.max(axis=0)
    scaled: np.ndarray = 0.5 + (points - (low + high) / 2) / max(float((high - low).max()), 1e-12)
    return scaled
