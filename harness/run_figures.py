"""The pictures of a run: loss curve, what the method saw, first-layer filters, confusion, neighbours, feature maps.

They are evidence for a reader, never an input to anything; one that cannot be drawn is left out with a tag that says
why. Controls and floors get the loss curve and the confusion matrix only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from harness import durable, feature_maps, figures
from harness.batches import Batches
from harness.contracts import Evaluation, Method
from harness.evaluation import Task
from harness.journal import Journal

if TYPE_CHECKING:
    from harness.arms import Arm, Cell

PREVIEWED = 8
MAPPED_POINTS = 500


def _add(journal: Journal, folder: Path, name: str, draw: Callable[[], bytes], ending: str = "png") -> None:
    path = folder / "figures" / f"{name}.{ending}"
    try:
        durable.write_bytes(path, draw())
    except Exception as error:  # a picture is never worth a run
        journal.tags({f"figure.{name}": f"not drawn: {type(error).__name__}: {str(error)[:150]}"})
        return
    journal.artifact(f"figures/{path.name}", path)


def log_pretraining_figures(
    journal: Journal, folder: Path, arm: Arm, method: Method, data: Batches, curve: list[dict[str, float]]
) -> None:
    """After pretraining: how the loss fell, what the method saw, what its first layer looks like."""
    title = f"{arm.method} on {arm.config.dataset_name}, seed {arm.config.seed}"
    if curve:
        names = [name for name in curve[-1] if name != "step"]
        series = {name: [(p["step"], p[name]) for p in curve] for name in names}
        _add(journal, folder, "loss", lambda: figures.loss_curve(series, title, ylabel="mean per interval"))
    if arm.role != "method":
        return
    views = method.preview(next(data.batches(PREVIEWED)))
    if views:
        arrays = {name: view.float().cpu().numpy() for name, view in views.items()}
        _add(journal, folder, "views", lambda: figures.views_grid(arrays, title=f"What {arm.method} saw"))
    first = next((m for m in method.encoder.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None:
        weights = first.weight.detach().float().cpu().numpy()
        _add(
            journal, folder, "filters", lambda: figures.first_layer_filters(weights, title=f"First layer after {title}")
        )


def log_evaluation_figures(
    journal: Journal, folder: Path, arm: Arm, cell: Cell, task: Task, result: Evaluation, dataset: str
) -> None:
    """After an evaluation: its confusion matrix; for the method itself neighbours and 2-d maps of the features.

    dataset: the name of what it was measured on
    """
    suffix = "" if cell.budget is None or cell.budget.fold is None else f"_fold{cell.budget.fold}"
    if arm.origin is not None:  # beside those of its own run
        suffix = f"_on_{dataset.replace(':', '_')}{suffix}"
    for readout, predicted in list(result.predictions.items())[:1]:
        name = f"confusion_{cell.evaluator}_{readout}{suffix}"
        true, classes = task.labels("test"), task.info.classes or ()
        spec = "" if cell.budget is None else f", labels {cell.budget.spec}"
        title = f"{arm.method}, {cell.evaluator} {readout}{spec}: test images"
        _add(
            journal,
            folder,
            name,
            partial(figures.confusion_matrix, true, predicted, classes, title=title),
        )
    if arm.role != "method" or cell.evaluator != "linear_probe" or suffix:
        return
    readout = task.encoder.readouts[0]
    features, labels = task.features("train", readout)[:MAPPED_POINTS].numpy(), task.labels("train")[:MAPPED_POINTS]
    images = task.images("train")[:MAPPED_POINTS].cpu().numpy()
    queries: list[Any] = list(range(min(6, len(images))))
    _add(journal, folder, "neighbours", lambda: figures.nearest_neighbours(images, features, queries, labels=labels))
    _map_features(journal, folder, cell, readout, features, labels, images, task.info.classes)


def _map_features(
    journal: Journal,
    folder: Path,
    cell: Cell,
    readout: str,
    features: np.ndarray,
    labels: np.ndarray,
    images: np.ndarray,
    classes: Sequence[str] | None,
) -> None:
    """The features as a picture per projection, and as coordinates with a sheet of thumbnails for a page to show."""
    planes = {kind: cache(partial(feature_maps.plane, features, kind)) for kind in feature_maps.KINDS}
    for kind, plane in planes.items():

        def draw(kind: feature_maps.Kind = kind, plane: Callable[[], feature_maps.Plane] = plane) -> bytes:
            return figures.feature_map_2d(features, labels, kind, classes=classes, plane=plane())

        _add(journal, folder, f"features_{kind}", draw)
    about = {"readout": readout, "budget": cell.budget.spec if cell.budget is not None else ""}

    def coordinates() -> bytes:
        found: dict[feature_maps.Kind, feature_maps.Plane] = {}
        for kind, plane in planes.items():
            with contextlib.suppress(ValueError):  # features that t-SNE cannot spread still have components
                found[kind] = plane()
        return feature_maps.document(found, labels, classes, about)

    _add(journal, folder, "map_images", partial(feature_maps.sheet, images))
    _add(journal, folder, "map", coordinates, "json")
