"""Rotation prediction: by which multiple of 90 degrees was the image turned?

Gidaris, Singh & Komodakis, "Unsupervised representation learning by predicting image rotations", ICLR 2018 (arXiv
1803.07728). All four rotations of an image are in the same batch, which the paper found better than one at random.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.augment import shift_and_mirror, to_float
from harness.contracts import Batch, Config, DatasetInfo, Encoder, HarnessError, Method, Range, setting
from harness.image_operations import four_rotations

__all__ = ["Rotation", "four_rotations"]


class Rotation(Method):
    """Rotation prediction"""

    tier = "ranked"
    family = "pretext"
    year = 2018
    idea = "by which quarter turn was the image rotated?"
    source = "Gidaris, Singh & Komodakis, ICLR 2018, arXiv 1803.07728"
    views_per_image = 4
    view_corruptions = ("rotate",)

    class Config(Config):
        shift: int = setting(
            2, "largest translation before turning, pixels", source="not stated", search=Range(0, 4), ge=0
        )
        mirror: bool | Literal["auto"] = setting(
            "auto", "flip half of the images; auto: where the data set says a class survives it"
        )

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        height, width = info.image_size
        if height != width:
            raise HarnessError(
                f"rotation: images of {height} x {width} px are not square; a quarter turn makes {width} x {height}"
            )
        self.mirror = info.mirror_keeps_label if config.mirror == "auto" else config.mirror
        self.head = nn.Linear(encoder.pool(torch.zeros(1, *encoder.map_shape)).shape[1], 4)

    def view(self, batch: Batch) -> Tensor:
        """The upright images, mildly augmented, same type as `batch.images`."""
        return shift_and_mirror(batch.images, batch.seeds, "rotation", self.config.shift, self.mirror)

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        turned, turns = four_rotations(self.view(batch))
        scores = self.head(self.encoder.pool(self.encoder(turned))).float()
        top1 = (scores.detach().argmax(1) == turns).float().mean()
        return {"loss": functional.cross_entropy(scores, turns), "top1": top1}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The four rotations."""
        turned = to_float(four_rotations(self.view(batch))[0]).chunk(4)
        return {f"{90 * turns} degrees": view for turns, view in enumerate(turned)}
