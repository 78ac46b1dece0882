"""Contrastive predictive coding: from the rows of patches above, tell which patch comes below.

van den Oord, Li & Vinyals, "Representation learning with contrastive predictive coding", 2018 (arXiv 1807.03748), section
3.2, for images with the batch norm and the separate patches of Henaff et al., 2019 (arXiv 1905.09272, section 2):
overlapping patches go through the network one by one; a network that sees only rows above makes a context of each
place; a linear map of it for each distance must pick the true patch among all patches of the batch.

Where we differ: 64 px patches every 32 px of 256 px become a quarter of the side every half patch, at least 8 px, so
small images have a grid of 5 to 7; the context network is three causal convolutions in place of a PixelCNN; distances
start at the first row that shares no pixel with what the context has seen (there: skip one row).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.augment import shift_and_mirror, to_float
from harness.contracts import Batch, Choice, Config, DatasetInfo, Encoder, HarnessError, Method, setting
from harness.heads import SquareEncoder, wide
from harness.image_operations import cut_squares

__all__ = ["CPC", "DownwardConv", "info_nce_loss"]

SHARE = 1 / 4  # of the image's side that is a patch's (section 3.2)
SMALLEST = 8  # pixels: below it most networks have no cell left
LAYERS = 3


def info_nce_scores(predictions: Tensor, candidates: Tensor) -> Tensor:
    """(N, D) and (N, D) -> (N, N), scaled so that random vectors give scores of about unit size."""
    with torch.autocast(predictions.device.type, enabled=False):
        return wide(predictions) @ wide(candidates).T / predictions.shape[1] ** 0.5


def info_nce_loss(predictions: Tensor, candidates: Tensor) -> Tensor:
    """Eq. 4: mean of -log softmax of the own candidate among all; (N, D) and (N, D) -> scalar. Chance is log N."""
    scores = info_nce_scores(predictions, candidates)
    return -scores.log_softmax(1).diagonal().mean()


class DownwardConv(nn.Module):
    """A convolution whose output at a row sees that row, the one above and a column to either side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, (2, 3), padding=(0, 1))

    def forward(self, grid: Tensor) -> Tensor:
        """(B, C, rows, columns) -> the same shape, added to the input."""
        above = functional.pad(self.norm(grid).relu(), (0, 0, 1, 0))
        moved = self.conv(above)
        assert isinstance(moved, Tensor)
        return grid + moved


class CPC(Method):
    """Contrastive predictive coding"""

    family = "contrastive"
    year = 2018
    idea = "predict the patches below from the rows above"
    source = "van den Oord, Li & Vinyals, 2018, arXiv 1807.03748; Henaff et al., 2019, arXiv 1905.09272"

    class Config(Config):
        units: int = setting(
            128, "dimensions of patches and contexts", source="1024: section 3.2", search=Choice((64, 128, 256)), ge=1
        )
        distances: int = setting(
            3, "rows ahead that are predicted, at most", source="5: section 3.2", search=Choice((1, 2, 3, 4)), ge=1
        )
        shift: int = setting(2, "largest translation, pixels", source="random crops: section 3.2", ge=0)

    grid: Tensor  # (rows * columns, 2)

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        height, width = info.image_size
        self.mirror = info.mirror_keeps_label
        self.side = max(SMALLEST, round(min(height, width) * SHARE))
        stride = self.side // 2
        self.rows, self.columns = ((pixels - self.side) // stride + 1 for pixels in (height, width))
        self.skipped = math.ceil(self.side / stride)  # rows down to the first patch that shares no pixel
        self.ahead = range(self.skipped, min(self.skipped + config.distances, max(self.rows, 0)))
        if min(height, width) < self.side or not self.ahead:
            raise HarnessError(
                f"cpc: {height} x {width} px hold {max(self.rows, 0)} rows of patches of {self.side} px, and none lies "
                f"clear of another ({self.skipped + 1} rows are needed)"
            )
        tops, lefts = (torch.arange(count) * stride for count in (self.rows, self.columns))
        self.register_buffer("grid", torch.cartesian_prod(tops, lefts), persistent=False)
        self.squares = SquareEncoder(encoder, info, self.side)
        self.embed = nn.Sequential(nn.Flatten(), nn.Linear(self.squares.features, config.units))
        self.context = nn.Sequential(*(DownwardConv(config.units) for _ in range(LAYERS)))
        self.predict = nn.ModuleList(nn.Linear(config.units, config.units) for _ in self.ahead)

    def view(self, batch: Batch) -> Tensor:
        """The images, mildly augmented, same type as `batch.images`."""
        return shift_and_mirror(batch.images, batch.seeds, "cpc", self.config.shift, self.mirror)

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        corners = self.grid.expand(len(batch), -1, -1)
        patches = to_float(cut_squares(self.view(batch), corners, self.side))
        vectors = self.embed(self.squares(self.encoder, patches))
        grid = vectors.unflatten(0, (len(batch), self.rows, self.columns)).permute(0, 3, 1, 2)
        contexts = self.context(grid)
        losses, hits = [], []
        for ahead, predict in zip(self.ahead, self.predict, strict=True):
            seen = contexts[:, :, : self.rows - ahead].permute(0, 2, 3, 1).flatten(0, 2)
            below = grid[:, :, ahead:].permute(0, 2, 3, 1).flatten(0, 2)
            scores = info_nce_scores(predict(seen), below)
            losses.append(-scores.log_softmax(1).diagonal().mean())
            own = torch.arange(len(scores), device=scores.device)
            hits.append((scores.detach().argmax(1) == own).float().mean())
        return {"loss": torch.stack(losses).mean(), "retrieval": torch.stack(hits).mean()}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The view that patches are cut from."""
        return {"view": to_float(self.view(batch))}
