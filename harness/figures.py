"""Figures of one run as PNG or SVG bytes: what the method saw, what it learnt, and where it errs.

Every figure is a `matplotlib.figure.Figure` of its own (no pyplot, no global state, no display), so that any thread may
draw. Colours: Okabe and Ito (2008), told apart by colour-blind readers, for classes, and cividis for amounts; where
there are more classes than colours the marker's shape changes too. matplotlib is imported by the first figure.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness import feature_maps
from harness.contracts import HarnessError
from harness.feature_maps import Plane

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ImageFormat = Literal["png", "svg"]
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "os^DvPX*"
_TITLE = 11
_TEXT = 9


def loss_curve(
    points: Sequence[tuple[float, float]] | Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    *,
    ylabel: str = "loss",
    image_format: ImageFormat = "png",
) -> bytes:
    """Draw (step, value) points, or several named curves. Values that are not finite are left out and counted."""
    curves = dict(points) if isinstance(points, Mapping) else {"": points}
    figure = _figure(6.4, 3.8)
    axes = figure.add_subplot()
    missing = 0
    for index, (name, curve) in enumerate(curves.items()):
        array = np.asarray(curve, dtype=float).reshape(-1, 2)
        finite = np.isfinite(array).all(axis=1)
        missing += int((~finite).sum())
        axes.plot(*array[finite].T, color=PALETTE[index % len(PALETTE)], linestyle=("-", "--", ":")[index // 8 % 3],
                  marker="." if finite.sum() < 40 else None, label=name)  # fmt: skip
    axes.set_title(_short(title, 70) + (f"\nleft out, not finite: {missing}" if missing else ""), fontsize=_TITLE)
    axes.set_xlabel("optimisation step", fontsize=_TEXT)
    axes.set_ylabel(ylabel, fontsize=_TEXT)
    axes.locator_params(axis="x", integer=True)
    _plain(axes)
    if any(curves):
        axes.legend(fontsize=_TEXT, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _bytes(figure, image_format)


def views_grid(
    views: Mapping[str, np.ndarray],
    boxes: Mapping[str, np.ndarray] | None = None,
    *,
    title: str = "What the method saw",
    max_images: int = 8,
    image_format: ImageFormat = "png",
) -> bytes:
    """Draw each view of the first images, one row per view, with its patches as squares.

    views: {name: (B, C, H, W) floats in [0, 1] or uint8}
    boxes: {name: (B, P, 4)} left, top, width, height in input pixels; P patches keep their colour over the rows
    """
    if not views:
        raise HarnessError("views_grid: there are no views to draw")
    count = min(max_images, *(len(images) for images in views.values()))
    figure = _figure(1.3 * count + 1.2, 1.35 * len(views) + 0.6)
    grid = figure.subplots(len(views), count, squeeze=False)
    for row, (name, images) in zip(grid, views.items(), strict=True):
        for index, axes in enumerate(row):
            _show(axes, np.asarray(images[index]))
            if boxes is not None and name in boxes:
                _squares(axes, np.asarray(boxes[name][index], dtype=float))
        row[0].set_ylabel(_short(name, 14), fontsize=_TEXT, rotation=0, ha="right", va="center", labelpad=6)
    figure.suptitle(_short(title, 12 * count + 10), fontsize=_TITLE)
    return _bytes(figure, image_format)


def first_layer_filters(
    weights: np.ndarray, *, title: str = "First-layer filters", max_filters: int = 64, image_format: ImageFormat = "png"
) -> bytes:
    """Draw convolution filters, each scaled by its own largest weight: mid-grey is zero.

    weights: (O, C, H, W); three channels are shown as colours, any other number as their mean
    """
    filters = np.asarray(weights, dtype=float)[:max_filters]
    columns = min(8, len(filters))
    rows = math.ceil(len(filters) / columns)
    figure = _figure(max(0.8 * columns, 3.2) + 0.2, 0.8 * rows + 0.8)
    for axes, kernel in zip(figure.subplots(rows, columns, squeeze=False).flat, filters, strict=False):
        kernel = kernel if len(kernel) == 3 else kernel.mean(axis=0, keepdims=True)
        scale = np.abs(np.nan_to_num(kernel)).max() or 1.0
        _show(axes, 0.5 + 0.5 * np.nan_to_num(kernel) / scale)
    for axes in figure.axes[len(filters) :]:
        axes.set_axis_off()
    shown = f" (first {len(filters)} of {len(weights)})" if len(weights) > len(filters) else ""
    figure.suptitle(f"{title}{shown}", fontsize=_TITLE)
    return _bytes(figure, image_format)


def confusion_matrix(
    true: np.ndarray,
    predicted: np.ndarray,
    classes: Sequence[str],
    *,
    title: str = "Confusion matrix",
    image_format: ImageFormat = "png",
) -> bytes:
    """Draw the share of each true class (row) that went to each predicted class; up to 20 classes with the counts.

    true, predicted: (N,) integers below len(classes)
    """
    true, predicted, size = np.asarray(true), np.asarray(predicted), len(classes)
    counts = np.bincount(true * size + predicted, minlength=size * size).reshape(size, size)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(0.48 * size, 3.2, 7.5))
    figure = _figure(side + 1.9, side + 1.2)
    axes = figure.add_subplot()
    picture = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    colourbar = figure.colorbar(picture, ax=axes, fraction=0.045, pad=0.02)
    colourbar.set_label("share of the true class", fontsize=_TEXT)
    colourbar.ax.tick_params(labelsize=_TEXT - 1)
    # All names where they stay legible; of many classes every tenth.
    ticks = np.arange(0, size, 1 if size <= 40 else 10)
    names = [_short(classes[int(index)], 14) for index in ticks]
    small = _TEXT if size <= 20 else 6 if size <= 40 else _TEXT - 1
    upright = max(map(len, names)) > 2 and size > 3
    axes.set_xticks(ticks, names, fontsize=small, rotation=45 if upright else 0, ha="right" if upright else "center",
                    rotation_mode="anchor" if upright else None)  # fmt: skip
    axes.set_yticks(ticks, names, fontsize=small)
    if size <= 20:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "black" if shares[row, column] > 0.55 else "white"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=colour)
    axes.set_xlabel("predicted class", fontsize=_TEXT)
    axes.set_ylabel("true class", fontsize=_TEXT)
    accuracy = float(np.trace(counts) / max(counts.sum(), 1))
    axes.set_title(f"{_short(title, 60)}\ntop-1 {accuracy:.1%} of {counts.sum():,} images", fontsize=_TITLE)
    return _bytes(figure, image_format)


def nearest_neighbours(
    images: np.ndarray,
    features: np.ndarray,
    queries: Sequence[int],
    *,
    labels: np.ndarray | None = None,
    num_neighbours: int = 8,
    title: str = "Nearest neighbours (cosine)",
    image_format: ImageFormat = "png",
) -> bytes:
    """Draw each query image and its nearest others by cosine similarity, nearest first, the similarity above each.

    images: (N, C, H, W); features: (N, D); queries: positions among the N
    labels: (N,) integers; neighbours of another class then get a thick dashed frame
    """
    unit = np.nan_to_num(np.asarray(features, dtype=float))
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    num = min(num_neighbours, len(unit) - 1)
    figure = _figure(0.95 * (num + 1) + 0.6, 1.18 * len(queries) + 0.7)
    grid = figure.subplots(len(queries), num + 1, squeeze=False)
    for row, query in zip(grid, queries, strict=True):
        similarity = unit @ unit[query]
        similarity[query] = -np.inf
        nearest = np.argsort(-similarity, kind="stable")[:num]
        _show(row[0], np.asarray(images[query]))
        row[0].set_title("query", fontsize=_TEXT - 1, pad=3, fontweight="bold")
        for axes, index in zip(row[1:], nearest, strict=True):
            _show(axes, np.asarray(images[index]))
            axes.set_title(f"{similarity[index]:.3f}", fontsize=_TEXT - 1, pad=3)
            if labels is not None and labels[index] != labels[query]:
                for spine in axes.spines.values():
                    spine.set(edgecolor=PALETTE[1], linewidth=2.2, linestyle="--")
    note = "\ndashed frame: another class than the query" if labels is not None else ""
    figure.suptitle(_short(title, 70) + note, fontsize=_TITLE)
    return _bytes(figure, image_format)


def feature_map_2d(
    features: np.ndarray,
    labels: np.ndarray | None,
    method: Literal["pca", "tsne"] = "pca",
    *,
    classes: Sequence[str] | None = None,
    title: str = "Features",
    max_points: int = 1000,
    plane: Plane | None = None,
    image_format: ImageFormat = "png",
) -> bytes:
    """Draw features in two dimensions: the first principal components, or t-SNE (seeded, on PCA to 50 numbers).

    features: (N, D); labels: (N,) integers or None; of more than `max_points` evenly spaced ones are drawn.
    plane: the projection, where it was made before
    """
    drawn_plane = plane if plane is not None else feature_maps.plane(features, method, max_points)
    points, keep, shares = drawn_plane.points, drawn_plane.kept, drawn_plane.shares
    figure = _figure(6.6, 5.0)
    axes = figure.add_subplot()
    if labels is None:
        axes.scatter(points[:, 0], points[:, 1], s=10, color=PALETTE[0], linewidths=0, alpha=0.7)
    else:
        _classes(axes, points, np.asarray(labels)[keep], classes)
    drawn = f"{len(keep):,} of {len(features):,} images" if len(keep) < len(features) else f"{len(keep):,} images"
    axes.set_title(f"{_short(title, 60)}\n{'t-SNE' if method == 'tsne' else 'PCA'}, {drawn}", fontsize=_TITLE)
    if method == "tsne":
        axes.set(xticks=[], yticks=[], xlabel="distances between far groups mean nothing")
    else:
        axes.set_xlabel(f"component 1 ({shares[0]:.0%} of the variance)", fontsize=_TEXT)
        axes.set_ylabel(f"component 2 ({shares[1]:.0%})", fontsize=_TEXT)
    _plain(axes, grid=False)
    return _bytes(figure, image_format)


# ------------------------------------------------------------------------------------------------------------ parts


def _figure(width: float, height: float) -> Figure:
    """An empty figure (inches) that makes room for its labels itself."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bytes(figure: Figure, image_format: ImageFormat) -> bytes:
    """The finished file; the same figure gives the same bytes (no date, fixed identifiers in the SVG)."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "harness"}):
        metadata: dict[str, Any] = {"Date": None} if image_format == "svg" else {"Software": None}
        figure.savefig(buffer, format=image_format, dpi=130, bbox_inches="tight", facecolor="white", metadata=metadata)
    return buffer.getvalue()


def _plain(axes: Axes, grid: bool = True) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=_TEXT - 1)
    if grid:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)


def _show(axes: Axes, image: np.ndarray) -> None:
    """One image (C, H, W), uint8 or floats in [0, 1]; three channels are colours, any other number becomes grey."""
    values = np.nan_to_num(image.astype(float) / (255 if image.dtype == np.uint8 else 1)).clip(0, 1)
    picture = values.transpose(1, 2, 0) if len(values) == 3 else values.mean(axis=0)
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(edgecolor="#bbbbbb", linewidth=0.6)


def _squares(axes: Axes, boxes: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    for index, (left, top, width, height) in enumerate(boxes):
        place = (left - 0.5, top - 0.5)  # a pixel's centre, not its corner, lies at its index
        for width_of_line, colour in ((2.6, "white"), (1.4, PALETTE[index % 6])):
            axes.add_patch(Rectangle(place, width, height, fill=False, edgecolor=colour, linewidth=width_of_line))


def _classes(axes: Axes, plane: np.ndarray, labels: np.ndarray, classes: Sequence[str] | None) -> None:
    """Points by class: a legend for up to 20 classes, else the class number at the middle of each class."""
    present = np.unique(labels)
    for index in present:
        name = _short(classes[index], 16) if classes is not None else str(index)
        colour, marker = PALETTE[index % len(PALETTE)], _MARKERS[index // len(PALETTE) % len(_MARKERS)]
        x, y = plane[labels == index].T
        hollow = index >= len(PALETTE)  # the ninth class has the first one's colour: shape alone is too little
        axes.scatter(x, y, s=14, alpha=0.75, linewidths=0.9, label=name, edgecolors=colour, marker=marker,
                     facecolors="none" if hollow else colour)  # fmt: skip
    if len(present) <= 20:
        axes.legend(fontsize=_TEXT - 1, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=1.4)
        return
    for index in present:
        x, y = np.median(plane[labels == index], axis=0)
        axes.text(float(x), float(y), str(index), fontsize=6.5, ha="center", va="center", fontweight="bold",
                  bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "#bbbbbb", "linewidth": 0.4,
                        "alpha": 0.85})  # fmt: skip


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
