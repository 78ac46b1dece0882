"""Inpainting: paint the square that was cut out of the image.

Pathak, Krahenbuhl, Donahue, Darrell & Efros, "Context encoders: feature learning by inpainting", CVPR 2016 (arXiv
1604.07379). Reconstruction part only: the adversarial part needs a second network trained against this one, and the
paper's own features were learnt without it.

Where we differ: the square lies anywhere, not only in the middle, because a fixed hole lets features be about its
border alone (as the paper says), and keeps half the side as there; the channel-wise fully-connected layer shares its weights
among channels, since one matrix for each would be 64 million numbers on a 24 x 24 map of 192 channels; a sigmoid ends
the decoder, as in `denoising_autoencoder`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harness.augment import integers, to_float
from harness.contracts import Batch, Choice, Config, DatasetInfo, Encoder, HarnessError, Method, Range, setting
from harness.heads import decoder

__all__ = ["Inpainting", "hole_loss", "square_holes"]

SMALLEST = 2  # pixels


def square_holes(
    seeds: Tensor, stream: str, image_size: tuple[int, int], side: int, ring: int
) -> tuple[Tensor, Tensor]:
    """A square of `side` px at a random place: seeds (B,) -> hole (B, 1, H, W) bool, and its outermost `ring` px."""
    inside, core = [], []
    for axis, pixels in enumerate(image_size):
        start = integers(seeds, f"{stream}.{axis}", pixels - side + 1)
        offset = torch.arange(pixels, device=seeds.device) - start[:, None]
        inside.append((offset >= 0) & (offset < side))
        core.append((offset >= ring) & (offset < side - ring))
    hole = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
    return hole, hole & ~(core[0][:, :, None] & core[1][:, None, :])[:, None]


def hole_loss(painted: Tensor, image: Tensor, weight: Tensor) -> Tensor:
    """Eq. 1: the squared error where weight (B, 1, H, W) is not 0, per weighted number. painted, image (B, C, H, W)."""
    return ((painted - image).square() * weight).sum() / (weight.sum() * image.shape[1])


class Inpainting(Method):
    """Inpainting (context encoders)"""

    family = "reconstruction"
    year = 2016
    idea = "paint the square that was cut out of the image"
    source = "Pathak, Krahenbuhl, Donahue, Darrell & Efros, CVPR 2016, arXiv 1604.07379"

    class Config(Config):
        hole: float = setting(
            0.5,
            "side of the hole, share of the image's",
            source="half",
            search=Range(0.25, 0.7),
            gt=0,
            lt=1,
        )
        ring_weight: float = setting(
            10.0, "weight of the hole's outermost pixels, which must join what is around it",
            source="10, on 7 of 64 px", search=Choice((1.0, 10.0)), ge=1,
        )  # fmt: skip
        hidden: int = setting(64, "channels of the decoder", search=Choice((32, 64, 128)), ge=1)

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.image_size = info.image_size
        self.side = round(min(info.image_size) * config.hole)
        if self.side < SMALLEST:
            raise HarnessError(
                f"inpainting: a hole of {config.hole:g} of {info.image_size[0]} x {info.image_size[1]} px has a side of "
                f"{self.side} px, less than {SMALLEST}"
            )
        self.ring = max(1, round(self.side * 7 / 64))
        cells = encoder.map_shape[1] * encoder.map_shape[2]
        self.across = nn.Linear(cells, cells)  # lets what was seen anywhere reach the hole
        self.decoder = decoder(encoder.map_shape, (info.channels, *info.image_size), config.hidden)

    def cut(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The image, the image with its hole filled by the mean colour, and the weights (B, 1, H, W)."""
        image = to_float(batch.images)
        hole, ring = square_holes(batch.seeds, "inpainting", self.image_size, self.side, self.ring)
        weight = hole + ring * (self.config.ring_weight - 1)
        return image, torch.where(hole, self.encoder.mean.to(image.dtype), image), weight

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        image, holed, weight = self.cut(batch)
        feature_map = self.encoder(holed)
        spread = self.across(feature_map.flatten(2)).relu().reshape(feature_map.shape)
        loss = hole_loss(self.decoder(spread).float().sigmoid(), image, weight)
        # Below 1 as soon as the painting is nearer than the mean colour was.
        return {"loss": loss, "error_share": loss.detach() / hole_loss(holed, image, weight).clamp_min(1e-12)}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """What is left of the image."""
        return {"view": self.cut(batch)[1]}
