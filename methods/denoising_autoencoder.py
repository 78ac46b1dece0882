"""Denoising autoencoder: give back the image that was there before part of it was destroyed.

Vincent, Larochelle, Bengio & Manzagol, "Extracting and composing robust features with denoising autoencoders", ICML
2008; Vincent et al., "Stacked denoising autoencoders", JMLR 11, 2010. One convolutional network trained as a whole in
place of a stack trained layer by layer. Squared error between images in [0, 1]; the output is squashed to that range by
a sigmoid. It also keeps the error's curvature in the last layer small
enough for the shared learning rate: with a linear output SGD at 0.1 was no longer finite after four steps on digits.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from harness.augment import to_float, uniform
from harness.contracts import Batch, Choice, Config, DatasetInfo, Encoder, Method, Range, setting
from harness.heads import decoder

__all__ = ["DenoisingAutoencoder", "add_gaussian", "mask_pixels"]


def mask_pixels(images: Tensor, seeds: Tensor, stream: str, level: float) -> Tensor:
    """Set a share `level` of the pixels, all channels of each, to 0 (black): float (B, C, H, W) -> the same."""
    kept = uniform(seeds, stream, (1, *images.shape[2:])) >= level
    return torch.where(kept, images, 0.0)


def add_gaussian(images: Tensor, seeds: Tensor, stream: str, level: float) -> Tensor:
    """Add normal noise of standard deviation `level`, cut to [0, 1]: float (B, C, H, W) -> the same.

    Box & Muller (1958) turns two uniform numbers into a normal one, so that the seeds alone decide it.
    """
    radius = (-2 * torch.log1p(-uniform(seeds, f"{stream}.radius", tuple(images.shape[1:])))).sqrt()
    angle = uniform(seeds, f"{stream}.angle", tuple(images.shape[1:])) * (2 * math.pi)
    return (images + level * radius * angle.cos()).clamp(0, 1)


class DenoisingAutoencoder(Method):
    """Denoising autoencoder"""

    tier = "ranked"
    family = "reconstruction"
    year = 2008
    idea = "restore the pixels that were destroyed in the input"
    source = "Vincent, Larochelle, Bengio & Manzagol, ICML 2008"

    class Config(Config):
        noise: Literal["masking", "gaussian"] = setting(
            "masking", "how pixels are destroyed", source="both: JMLR 2010", search=Choice(("masking", "gaussian"))
        )
        level: float = setting(
            0.4,
            "share of masked pixels, or standard deviation of the noise (of 1)",
            source="0.1, 0.25 and 0.4 for masking (JMLR 2010)",
            search=Range(0.1, 0.75),
            ge=0,
            lt=1,
        )
        hidden: int = setting(64, "channels of the decoder", search=Choice((32, 64, 128)), ge=1)

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.decoder = decoder(encoder.map_shape, (info.channels, *info.image_size), config.hidden)
        self.corrupt = mask_pixels if config.noise == "masking" else add_gaussian

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        clean = to_float(batch.images)
        noisy = self.corrupt(clean, batch.seeds, "denoising_autoencoder", self.config.level)
        restored = self.decoder(self.encoder(noisy)).float().sigmoid()
        loss = functional.mse_loss(restored, clean)
        # Below 1 as soon as the output is nearer to the clean image than the input was.
        share = loss.detach() / (noisy - clean).square().mean().clamp_min(1e-12)
        return {"loss": loss, "error_share": share}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The destroyed image."""
        view = self.corrupt(to_float(batch.images), batch.seeds, "denoising_autoencoder", self.config.level)
        return {"view": view}
