"""VICRegL: VICReg on whole views and, at the same time, on those of their cells that show the same or look the same.

Bardes, Ponce & LeCun, "VICRegL: self-supervised learning of local visual features", NeurIPS 2022 (arXiv 2210.01571).
Cells of two views are matched twice: with the cell nearest in the original image, and with the nearest one in embedding
space; of either the best matches count. Two large views, as for the paper's ResNet-50 (its ConvNeXt also has small
ones); narrower projectors; the number of matches is a share of the cells, since maps differ.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from harness.augment import uniform
from harness.contracts import Batch, Choice, DatasetInfo, Encoder, HarnessError, Method, Range, setting
from harness.heads import projector, wide
from harness.views import ViewConfig, ViewMaker, crop_boxes

__all__ = ["VICRegL", "best_matches", "cell_centres", "local_vicreg_loss"]

EPSILON = 1e-4  # below the root of the variance (Bardes et al., 2022, section 4.1)


def local_vicreg_loss(
    first: Tensor, second: Tensor, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
) -> Tensor:
    """VICReg's three terms over the batch, for each place by itself, averaged over places and the two views.

    first, second (N, D), or (N, P, D) for P matched cells of each image -> scalar, at least float32.
    """
    first, second = wide(first), wide(second)
    total = invariance * (first - second).square().mean()
    for embeddings in (first, second):
        centred = embeddings - embeddings.mean(0)
        spread = (embeddings.var(0) + EPSILON).sqrt()
        with torch.autocast(first.device.type, enabled=False):
            products = torch.einsum("n...c,n...d->...cd", centred, centred) / (len(centred) - 1)
        others = products.square().sum((-2, -1)) - products.diagonal(dim1=-2, dim2=-1).square().sum(-1)
        total = total + (variance * (1 - spread).relu().mean() + covariance * others.mean() / first.shape[-1]) / 2
    return total


def cell_centres(
    seeds: Tensor,
    stream: str,
    image_size: tuple[int, int],
    scale: tuple[float, float],
    mirror: bool,
    grid: tuple[int, int],
) -> Tensor:
    """Where in the image the cells of a view lie: (B, rows * columns, 2) row and column in pixels.

    stream, scale and mirror are those the view was made with. On CUDA the box that the view was cut by may, rarely, be
    another one by a pixel: where rounding decides about a side that lies at a half (harness.device_views).
    """
    top, left, height, width = crop_boxes(seeds, f"{stream}.crop", image_size, scale)
    down, across = ((torch.arange(side, device=seeds.device) + 0.5) / side for side in grid)
    across = across.expand(len(seeds), -1)
    if mirror:
        across = torch.where((uniform(seeds, f"{stream}.mirror") < 0.5)[:, None], 1 - across, across)
    rows = top[:, None] + height[:, None] * down
    columns = left[:, None] + width[:, None] * across
    both = (rows[:, :, None].expand(-1, -1, grid[1]), columns[:, None, :].expand(-1, grid[0], -1))
    return torch.stack(both, 3).flatten(1, 2)


@torch.no_grad()
def best_matches(ours: Tensor, theirs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` points of `ours` that are nearest to any of `theirs`, nearest first, and which those are.

    ours, theirs (B, P, D) -> two (B, count) int64 of positions among P.
    """
    ours, theirs = wide(ours), wide(theirs)
    with torch.autocast(ours.device.type, enabled=False):
        distances = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")
    nearest, partner = distances.min(2)
    chosen = nearest.argsort(dim=1, stable=True)[:, :count]
    return chosen, partner.gather(1, chosen)


def _taken(cells: Tensor, places: Tensor) -> Tensor:
    return cells.gather(1, places[:, :, None].expand(-1, -1, cells.shape[2]))


class VICRegL(Method):
    """VICRegL"""

    family = "dense"
    year = 2022
    idea = "VICReg on whole views and on cells matched by place and by likeness"
    source = "Bardes, Ponce & LeCun, NeurIPS 2022, arXiv 2210.01571"
    views_per_image = 2
    # AdamW as for the paper's ConvNeXts, rate and decay chosen here: by SGD at 0.1, where VICReg trains, the loss of small
    # nets is soon not finite (MNIST, convnet_small, seeds 10 to 12).
    defaults: ClassVar[dict[str, Any]] = {
        "optim.name": "adamw", "optim.lr": 1e-3, "optim.weight_decay": 1e-6,
    }  # fmt: skip

    class Config(ViewConfig):
        global_share: float = setting(
            0.75,
            "alpha, weight of whole views; cells have the rest",
            source="0.75",
            search=Range(0.5, 0.95),
            ge=0,
            le=1,
        )
        invariance: float = setting(25.0, "weight of the distance", source="25, as VICReg", ge=0)
        variance: float = setting(25.0, "weight of the variance below 1", source="25", ge=0)
        covariance: float = setting(1.0, "weight of the covariances", source="1", ge=0)
        matches: float = setting(
            0.4,
            "share of the cells that are matched",
            source="20 of 49",
            search=Range(0.1, 1),
            gt=0,
            le=1,
        )
        hidden: int = setting(512, "hidden units of both projectors", source="8192 and 512", ge=1)
        out: int = setting(
            256, "outputs of the projector of views", source="8192", search=Choice((128, 256, 512)), ge=1
        )
        local_out: int = setting(128, "outputs of the projector of cells", source="512", ge=1)

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.views = ViewMaker.of(config, info)
        channels, rows, columns = encoder.map_shape
        self.grid, self.image_size = (rows, columns), info.image_size
        self.num_matches = max(1, round(config.matches * rows * columns))
        if rows * columns < 2:
            raise HarnessError(
                f"vicregl: the map of {encoder.name} has {rows} x {columns} cells; there is nothing to match"
            )
        features = encoder.pool(torch.zeros(1, *encoder.map_shape)).shape[1]
        self.projector = projector(features, config.hidden, config.out)
        self.local_projector = projector(channels, config.hidden, config.local_out)

    def _criterion(self, first: Tensor, second: Tensor) -> Tensor:
        config = self.config
        return local_vicreg_loss(first, second, config.invariance, config.variance, config.covariance)

    def _matched(self, cells: tuple[Tensor, Tensor], by: tuple[Tensor, Tensor]) -> Tensor:
        """Mean over both directions of the criterion on the best matches by `by`, the two views' points (B, P, any)."""
        losses = []
        for one, other in ((0, 1), (1, 0)):
            chosen, partner = best_matches(by[one], by[other], self.num_matches)
            losses.append(self._criterion(_taken(cells[one], chosen), _taken(cells[other], partner)))
        return (losses[0] + losses[1]) / 2

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        feature_map = self.encoder(torch.cat(tuple(self.preview(batch).values())))
        first, second = self.projector(self.encoder.pool(feature_map)).chunk(2)
        whole = self._criterion(first, second)
        table = self.local_projector(feature_map.permute(0, 2, 3, 1).flatten(0, 2))
        one, two = table.unflatten(0, (2, len(batch), -1))
        places = [
            cell_centres(batch.seeds, f"vicregl.{v}", self.image_size, self.views.scale, self.views.mirror, self.grid)
            for v in (1, 2)
        ]
        by_place, by_likeness = self._matched((one, two), (places[0], places[1])), self._matched((one, two), (one, two))
        share = self.config.global_share
        spread = functional.normalize(wide(first.detach()), dim=1).std(0).mean() * first.shape[1] ** 0.5
        return {"loss": share * whole + (1 - share) * (by_place + by_likeness), "spread": spread}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The two views."""
        return {f"view {view}": self.views(batch.images, batch.seeds, f"vicregl.{view}") for view in (1, 2)}
