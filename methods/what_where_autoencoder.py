"""What-where autoencoder: pooling hands on what there is, and tells the decoder beside it where it was.

Zhao, Mathieu, Goroshin & LeCun, "Stacked what-where auto-encoders", 2015 (arXiv 1506.02351), section 3: the decoder puts
each pooled value back to where the maximum was, and the layer under the pooling is rebuilt as well as the image.

Where we differ: poolings inside an encoder are its own and any encoder is used here, so one pooling with switches sits
on top of its map, in place of one at each stage; the supervised term is left out (their unsupervised form); a sigmoid
ends the decoder, as in `denoising_autoencoder`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.augment import to_float
from harness.contracts import Batch, Choice, Config, DatasetInfo, Encoder, HarnessError, Method, Range, setting
from harness.heads import decoder, wide

__all__ = ["WhatWhereAutoencoder", "pool_what_where", "unpool"]


def pool_what_where(feature_map: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Max pooling by `side`: (B, C, H, W) -> what (B, C, H / side, W / side), and where (B, C, H, W) bool: one True in
    each full window, the first of equals; what is left over at the border has none."""
    what, index = functional.max_pool2d(feature_map, side, return_indices=True)
    height, width = feature_map.shape[2:]
    cells = torch.arange(height * width, device=feature_map.device).reshape(height, width)
    rows, columns = what.shape[2] * side, what.shape[3] * side
    inside = cells[:rows, :columns] == index.repeat_interleave(side, 2).repeat_interleave(side, 3)
    return what, functional.pad(inside, (0, width - columns, 0, height - rows))


def unpool(what: Tensor, where: Tensor, side: int) -> Tensor:
    """Put what back to where it was, 0 elsewhere: the inverse of `pool_what_where` as far as there is one."""
    large = what.repeat_interleave(side, 2).repeat_interleave(side, 3)
    rows, columns = large.shape[2:]
    return functional.pad(large, (0, where.shape[3] - columns, 0, where.shape[2] - rows)) * where


class WhatWhereAutoencoder(Method):
    """What-where autoencoder"""

    family = "reconstruction"
    year = 2015
    idea = "pool what there is, and give the decoder the places beside it"
    source = "Zhao, Mathieu, Goroshin & LeCun, 2015, arXiv 1506.02351"

    class Config(Config):
        pool: int = setting(
            2, "cells along a side of a pooling window", source="several are compared",
            search=Choice((2, 3)), ge=2,
        )  # fmt: skip
        middle: float = setting(
            0.2, "weight of the error of the map under the pooling", source="the weight of L_2M; no single value stated",
            search=Range(0.01, 1, log=True), ge=0,
        )  # fmt: skip
        hidden: int = setting(64, "channels of the decoder", search=Choice((32, 64, 128)), ge=1)

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        channels, rows, columns = encoder.map_shape
        if min(rows, columns) < config.pool:
            raise HarnessError(
                f"what_where_autoencoder: a map of {rows} x {columns} cells has no window of {config.pool} x {config.pool}"
            )
        self.middle = nn.Conv2d(channels, channels, 3, padding=1)
        self.decoder = decoder(encoder.map_shape, (info.channels, *info.image_size), config.hidden)

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        image = to_float(batch.images)
        feature_map = self.encoder(image)
        what, where = pool_what_where(feature_map, self.config.pool)
        rebuilt = self.middle(unpool(what, where, self.config.pool))
        middle = functional.mse_loss(wide(rebuilt), wide(feature_map))
        restored = self.decoder(rebuilt).float().sigmoid()
        error = functional.mse_loss(restored, image)
        share = error.detach() / (image - image.mean(0)).square().mean().clamp_min(1e-12)
        return {"loss": error + self.config.middle * middle, "error_share": share, "middle": middle.detach()}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The image: nothing is changed about it."""
        return {"view": to_float(batch.images)}
