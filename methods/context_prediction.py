"""Context prediction: on which of eight sides of the middle patch does the other one lie?

Doersch, Gupta & Efros, "Unsupervised visual representation learning by context prediction", ICCV 2015 (arXiv
1505.05192), section 3. Against shortcuts, as there: a gap between patches, random jitter of each, and of colour patches
two channels replaced by noise (chromatic aberration tells where a patch was).

Where we differ: the grid is the whole image, since images are small; the middle patch is paired with all eight
neighbours, so that the labels are balanced in every batch; patches keep the paper's proportions (96 of 144 px) but never
get smaller than 8 px where the cell holds that; a patch is not pixelated at random.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.augment import integers, mix, to_float, uniform
from harness.contracts import Batch, Choice, Config, DatasetInfo, Encoder, HarnessError, Method, Range, setting
from harness.heads import SquareEncoder
from harness.image_operations import cut_squares
from harness.views import grid_corners

__all__ = ["ContextPrediction", "drop_colours"]

CELLS = 3  # along a side of the grid
MIDDLE = 4  # the place of the middle patch, row by row
SMALLEST = 8  # pixels: below it most networks have no cell left
JITTER = 14 / 48  # of the gap: +-7 px of 48
NOISE = 0.01  # of the kept channel's standard deviation, as there


def drop_colours(squares: Tensor, seeds: Tensor, stream: str) -> Tensor:
    """Keep one channel of each square, drawn by its seed; noise about the same grey in the others.

    squares (N, 3, s, s) in [0, 1], seeds (N,) -> the same shape. Uniform noise of the paper's (normal) deviation about
    the kept channel's mean.
    """
    kept = integers(seeds, f"{stream}.channel", 3)
    chosen = (torch.arange(3, device=seeds.device) == kept[:, None])[:, :, None, None]
    only = (squares * chosen).sum(1, keepdim=True)
    deviation = only.std((2, 3), correction=0, keepdim=True)
    noise = (2 * uniform(seeds, f"{stream}.noise", tuple(squares.shape[1:])) - 1) * (3**0.5 * NOISE)
    return torch.where(chosen, squares, only.mean((2, 3), keepdim=True) + noise * deviation).clamp(0, 1)


class ContextPrediction(Method):
    """Context prediction"""

    tier = "ranked"
    family = "pretext"
    year = 2015
    idea = "where does this patch lie, seen from that one?"
    source = "Doersch, Gupta & Efros, ICCV 2015, arXiv 1505.05192"

    class Config(Config):
        patch: float = setting(
            2 / 3, "side of a patch, share of its cell; the rest is the gap", source="96 of 144 px: section 3",
            search=Range(0.5, 0.9), gt=0, lt=1,
        )  # fmt: skip
        drop_colours: bool = setting(True, "keep one channel of three, noise in the others", source="section 3")
        hidden: int = setting(
            256, "units of the layers on each patch and on each pair", source="4096 (fc6, fc7): figure 3",
            search=Choice((128, 256, 512)), ge=1,
        )  # fmt: skip

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        height, width = self.image_size = info.image_size
        cell = min(height, width) // CELLS
        self.side = max(round(cell * config.patch), min(SMALLEST, cell - 1))
        if self.side < SMALLEST // 2:
            raise HarnessError(
                f"context_prediction: images of {height} x {width} px give cells of {cell} px, which hold no patches "
                f"of {SMALLEST // 2} px with a gap"
            )
        slack = cell - self.side
        self.jitter = min(slack, max(1, round(slack * JITTER)))
        self.drops = config.drop_colours and info.channels == 3
        self.squares = SquareEncoder(encoder, info, self.side)
        self.each = nn.Sequential(
            nn.Flatten(), nn.Linear(self.squares.features, config.hidden, bias=False),
            nn.BatchNorm1d(config.hidden), nn.ReLU(),
        )  # fmt: skip
        self.pair = nn.Sequential(
            nn.Linear(2 * config.hidden, config.hidden, bias=False), nn.BatchNorm1d(config.hidden), nn.ReLU(),
            nn.Linear(config.hidden, CELLS**2 - 1),
        )  # fmt: skip

    def corners(self, seeds: Tensor) -> Tensor:
        """(B, 9, 2): top and left of the patches, row by row."""
        return grid_corners(seeds, "context_prediction", self.image_size, CELLS, self.side, self.jitter)

    @torch.no_grad()
    def patches(self, batch: Batch) -> Tensor:
        """(B, 9, C, side, side) in [0, 1]."""
        squares = to_float(cut_squares(batch.images, self.corners(batch.seeds), self.side))
        if not self.drops:
            return squares
        places = torch.arange(CELLS**2, device=batch.seeds.device)
        seeds = mix(mix(batch.seeds)[:, None] + places).flatten()
        dropped = drop_colours(squares.flatten(0, 1), seeds, "context_prediction.drop")
        return dropped.unflatten(0, (len(batch), -1))

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        vectors = self.each(self.squares(self.encoder, self.patches(batch))).unflatten(0, (len(batch), -1))
        middle = vectors[:, MIDDLE : MIDDLE + 1].expand(-1, CELLS**2 - 1, -1)
        around = torch.cat((vectors[:, :MIDDLE], vectors[:, MIDDLE + 1 :]), 1)
        scores = self.pair(torch.cat((middle, around), 2).flatten(0, 1)).float()
        side = torch.arange(CELLS**2 - 1, device=scores.device).repeat(len(batch))
        top1 = (scores.detach().argmax(1) == side).float().mean()
        return {"loss": functional.cross_entropy(scores, side), "top1": top1}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The middle patch and the one above it."""
        size, patches = list(batch.images.shape[2:]), self.patches(batch)
        return {
            name: functional.interpolate(patches[:, place], size, mode="bilinear").clamp(0, 1)
            for name, place in (("middle", MIDDLE), ("above", 1))
        }
