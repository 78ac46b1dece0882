"""DenseCL: MoCo for whole views and, at the same time, for each cell of a view and the cell of the other most like it.

Wang, Zhang, Shen, Kong & Li, "Dense contrastive learning for self-supervised visual pre-training", CVPR 2021 (arXiv
2011.09157). Cells find their partners by the encoder's own features; their negatives are other images' mean cells, kept
in a second queue. The rest is MoCo v2, with the differences named there: a rising momentum, no key of an image's own
among its negatives. Maps of more than 7 x 7 cells are averaged to that, as the paper's are.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from harness.contracts import Batch, Choice, DatasetInfo, Encoder, Method, PretrainingData, Range, setting
from harness.heads import Queue, QueueLength, matrix_product, momentum_update, rising_momentum, unit_rows, wide
from harness.methods.moco_v2 import info_nce_loss
from harness.views import ViewConfig, ViewMaker

__all__ = ["DenseCL", "dense_loss", "partners"]

MOST_CELLS = 7  # a side


def averaging(side: int, out: int) -> Tensor:
    """The matrix (out, side) of adaptive average pooling along one axis."""
    weights = torch.zeros(out, side)
    for cell in range(out):
        first, last = cell * side // out, -(-(cell + 1) * side // out)
        weights[cell, first:last] = 1 / (last - first)
    return weights


@torch.no_grad()
def partners(first: Tensor, second: Tensor) -> Tensor:
    """Eq. 4: for each cell of `first` the cell of `second` with the highest cosine; (B, P, C) twice -> (B, P) int64."""
    one, two = (unit_rows(cells.flatten(0, 1)).unflatten(0, cells.shape[:2]) for cells in (first, second))
    return matrix_product(one, two.transpose(1, 2)).argmax(2)


def dense_loss(
    queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float, excluded: Tensor | None = None
) -> Tensor:
    """Eq. 2: InfoNCE averaged over all cells; queries and their partners' keys (B, P, D), negatives (K, D) -> scalar.

    excluded (B, K) bool: what is no negative for an image's cells.
    """
    cells = queries.shape[1]
    apart = None if excluded is None else excluded.repeat_interleave(cells, 0)
    return info_nce_loss(queries.flatten(0, 1), keys.flatten(0, 1), negatives, temperature, apart)


class Heads(nn.Module):
    """Section 3.2: one head on the pooled map, (B, D), one on every cell, (B, P, D); and the cells before it."""

    down: Tensor
    across: Tensor

    def __init__(self, features: int, map_shape: tuple[int, int, int], hidden: int, out: int) -> None:
        super().__init__()
        channels, rows, columns = map_shape
        self.whole = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out))
        self.cell = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out))
        self.register_buffer("down", averaging(rows, min(rows, MOST_CELLS)), persistent=False)
        self.register_buffer("across", averaging(columns, min(columns, MOST_CELLS)), persistent=False)

    def forward(self, pooled: Tensor, feature_map: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        small = matrix_product(matrix_product(self.down, wide(feature_map)), self.across.T)
        cells = small.flatten(2).transpose(1, 2)
        return self.whole(pooled), self.cell(cells), cells


class DenseCL(Method):
    """DenseCL"""

    family = "dense"
    year = 2021
    idea = "MoCo v2 on views and on their cells, each paired with the other view's cell that is most like it"
    source = "Wang, Zhang, Shen, Kong & Li, CVPR 2021, arXiv 2011.09157"
    views_per_image = 2

    class Config(ViewConfig):
        dense_share: float = setting(
            0.5,
            "lambda, weight of the cells; views have the rest",
            source="0.5",
            search=Range(0.1, 0.9),
            ge=0,
            le=1,
        )
        queue: QueueLength = setting(
            "auto",
            "keys kept as negatives, of each kind; auto: a quarter of the images, 4096 at most",
            source="65,536 of 1.3 million images (section 4.1)",
            search=Choice(("auto", 256, 1024, 4096)),
        )
        momentum: float = setting(
            0.99, "of the key network at the start; it rises to 1", source="0.999 throughout (MoCo)", ge=0, le=1
        )
        temperature: float = setting(
            0.2, "divides the cosines", source="section 4.1", search=Range(0.05, 1, log=True), gt=0
        )
        hidden: int = setting(256, "hidden units of both heads", source="2048 (section 4.1)", ge=1)
        out: int = setting(
            128, "outputs of both heads", source="128 (section 4.1)", search=Choice((64, 128, 256)), ge=1
        )

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.views = ViewMaker.of(config, info)
        features = encoder.pool(torch.zeros(1, *encoder.map_shape)).shape[1]
        self.heads = Heads(features, encoder.map_shape, config.hidden, config.out)
        self.teacher_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.teacher_heads = copy.deepcopy(self.heads).requires_grad_(False)
        self.view_queue = Queue(config.queue, config.out, info)
        self.cell_queue = Queue(config.queue, config.out, info)

    def prepare(self, data: PretrainingData) -> None:
        self.view_queue.fit(len(data))
        self.cell_queue.fit(len(data))

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        first, second = self.preview(batch).values()
        feature_map = self.encoder(first)
        query, cell_queries, cells = self.heads(self.encoder.pool(feature_map), feature_map)
        with torch.no_grad():
            key_map = self.teacher_encoder(second)
            key, cell_keys, key_cells = self.teacher_heads(self.teacher_encoder.pool(key_map), key_map)
            partner = partners(cells, key_cells)
            matched = cell_keys.gather(1, partner[:, :, None].expand(-1, -1, cell_keys.shape[2]))
            # Copies: the backward pass needs the negatives as they were before this batch's keys take their place.
            negatives = [queue.embeddings.clone() for queue in (self.view_queue, self.cell_queue)]
            own = [queue.of_images(batch.indices) for queue in (self.view_queue, self.cell_queue)]
        temperature, share = self.config.temperature, self.config.dense_share
        whole = info_nce_loss(query, key, negatives[0], temperature, own[0])
        dense = dense_loss(cell_queries, matched, negatives[1], temperature, own[1])
        self.view_queue.push(unit_rows(key), batch.indices)
        self.cell_queue.push(unit_rows(cell_keys.mean(1)), batch.indices)
        return {"loss": (1 - share) * whole + share * dense, "view_loss": whole.detach(), "cell_loss": dense.detach()}

    @torch.no_grad()
    def after_step(self, progress: Tensor) -> None:
        momentum = rising_momentum(progress, self.config.momentum)
        momentum_update(self.teacher_encoder, self.encoder, momentum)
        momentum_update(self.teacher_heads, self.heads, momentum)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The query's and the key's view."""
        return {f"view {view}": self.views(batch.images, batch.seeds, f"densecl.{view}") for view in (1, 2)}
