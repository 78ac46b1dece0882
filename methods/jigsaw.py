"""Jigsaw puzzles: in which of a fixed set of orders were the image's nine tiles dealt?

Noroozi & Favaro, "Unsupervised learning of visual representations by solving jigsaw puzzles", ECCV 2016 (arXiv
1603.09246). The tiles go through the network one by one and meet in a small head. Against shortcuts, as there: gaps
between tiles, jitter, and each tile standardised by itself.

Where we differ: the grid is the whole image; the set of orders is grown by the largest smallest distance to those
chosen (ties by the largest sum, then the first in lexical order) where algorithm 1 as printed takes the sum alone and
starts at random: it then holds orders that differ in two tiles; tiles keep the paper's proportions (64 of 75 px).
"""

from __future__ import annotations

from functools import cache
from itertools import permutations
from math import factorial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.augment import integers, to_float
from harness.contracts import Batch, Choice, Config, DatasetInfo, Encoder, HarnessError, Method, Range, setting
from harness.heads import SquareEncoder
from harness.image_operations import cut_squares
from harness.views import grid_corners

__all__ = ["Jigsaw", "distant_permutations", "standardise_tiles"]

SHARE = 64 / 75  # of a cell that is its tile
SMALLEST = 4  # pixels
FLOOR = 0.02  # standard deviation, of 1, below which a tile counts as flat and is not blown up


@cache
def distant_permutations(tiles: int, count: int) -> Tensor:
    """(count, tiles) int64: orders far from each other in Hamming distance, always the same ones."""
    every = np.array(list(permutations(range(tiles))), dtype=np.int8).T.copy()  # a row for each place: 20 times as fast
    least, total = np.full(every.shape[1], tiles, dtype=np.int32), np.zeros(every.shape[1], dtype=np.int32)
    chosen = [0]
    while len(chosen) < count:
        apart = np.zeros(every.shape[1], dtype=np.int8)
        for place in every:
            apart += place != place[chosen[-1]]
        np.minimum(least, apart, out=least)
        total += apart
        chosen.append(int(np.argmax(least * (tiles * count + 1) + total)))
    return torch.from_numpy(every[:, chosen].T.astype(np.int64))


def standardise_tiles(tiles: Tensor) -> Tensor:
    """Each tile and channel (..., C, s, s) to mean 0 and standard deviation 1."""
    centred = tiles - tiles.mean((-2, -1), keepdim=True)
    return centred * (centred.square().mean((-2, -1), keepdim=True) + FLOOR**2).rsqrt()


class Jigsaw(Method):
    """Jigsaw puzzles"""

    family = "pretext"
    year = 2016
    idea = "put the shuffled tiles of the image back in order"
    source = "Noroozi & Favaro, ECCV 2016, arXiv 1603.09246"

    class Config(Config):
        grid: int = setting(3, "tiles along a side", source="3: section 3", search=Choice((2, 3)), ge=2, le=3)
        num_permutations: int = setting(
            64, "orders in the set; at most all there are", source="1,000 on ImageNet",
            search=Range(16, 256, log=True), ge=2,
        )  # fmt: skip
        hidden: int = setting(
            128, "units for each tile, and twice as many for all", source="1024 (fc6) and 4096 (fc7)", ge=1
        )

    permutations: Tensor  # (orders, tiles)

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.image_size, self.tiles = info.image_size, config.grid**2
        cell = min(info.image_size) // config.grid
        self.side = round(cell * SHARE)
        if self.side < SMALLEST:
            raise HarnessError(
                f"jigsaw: images of {info.image_size[0]} x {info.image_size[1]} px in {config.grid} x {config.grid} "
                f"cells give tiles of {self.side} px, less than {SMALLEST}"
            )
        self.jitter = cell - self.side
        count = min(config.num_permutations, factorial(self.tiles))
        self.register_buffer("permutations", distant_permutations(self.tiles, count).clone(), persistent=False)
        self.squares = SquareEncoder(encoder, info, self.side)
        hidden = config.hidden
        self.each = nn.Sequential(
            nn.Flatten(), nn.Linear(self.squares.features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()
        )
        self.all = nn.Sequential(
            nn.Linear(self.tiles * hidden, 2 * hidden, bias=False), nn.BatchNorm1d(2 * hidden), nn.ReLU(),
            nn.Linear(2 * hidden, count),
        )  # fmt: skip

    @torch.no_grad()
    def puzzle(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tiles in the order dealt (B, tiles, C, side, side) in [0, 1], and which order it is (B,)."""
        corners = grid_corners(batch.seeds, "jigsaw", self.image_size, self.config.grid, self.side, self.jitter)
        order = integers(batch.seeds, "jigsaw.order", len(self.permutations))
        dealt = corners.gather(1, self.permutations[order][:, :, None].expand(-1, -1, 2))
        return to_float(cut_squares(batch.images, dealt, self.side)), order

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        tiles, order = self.puzzle(batch)
        with torch.no_grad():  # so that after the encoder's own normalisation a tile is standardised
            tiles = standardise_tiles(tiles) * self.encoder.std + self.encoder.mean
        vectors = self.each(self.squares(self.encoder, tiles)).unflatten(0, (len(batch), -1))
        scores = self.all(vectors.flatten(1)).float()
        top1 = (scores.detach().argmax(1) == order).float().mean()
        return {"loss": functional.cross_entropy(scores, order), "top1": top1}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The puzzle as it was dealt, before tiles are standardised."""
        tiles, _ = self.puzzle(batch)
        rows = [torch.cat(row.unbind(1), 3) for row in tiles.split(self.config.grid, 1)]
        board = functional.interpolate(torch.cat(rows, 2), list(batch.images.shape[2:]), mode="bilinear")
        return {"puzzle": board.clamp(0, 1)}
