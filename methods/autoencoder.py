"""Autoencoder: squeeze the image through a short code and give it back.

Hinton & Salakhutdinov, "Reducing the dimensionality of data with neural networks", Science 313, 2006; with
convolutions Masci, Meier, Ciresan & Schmidhuber, ICANN 2011. Feature maps hold more numbers than the image, so without
the code the identity would do. Trained as a whole, not layer by layer; squared error between images in [0, 1] and a
sigmoid at the end, as in `denoising_autoencoder` and for its reason.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from harness.augment import to_float
from harness.contracts import Batch, Choice, Config, DatasetInfo, Encoder, Method, Range, setting
from harness.heads import decoder

__all__ = ["Autoencoder"]


class Autoencoder(Method):
    """Autoencoder"""

    family = "reconstruction"
    year = 2006
    idea = "give the image back from a short code"
    source = "Hinton & Salakhutdinov, Science 313, 2006"

    class Config(Config):
        code: int = setting(
            64, "numbers in the code", source="30 for MNIST and faces (figures 2 and 3)",
            search=Range(16, 256, log=True), ge=1,
        )  # fmt: skip
        hidden: int = setting(64, "channels of the decoder", search=Choice((32, 64, 128)), ge=1)

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        cells = math.prod(encoder.map_shape)
        self.code = nn.Sequential(nn.Flatten(), nn.Linear(cells, config.code))
        self.decode = nn.Sequential(
            nn.Linear(config.code, cells), nn.Unflatten(1, encoder.map_shape), nn.ReLU(),
            decoder(encoder.map_shape, (info.channels, *info.image_size), config.hidden),
        )  # fmt: skip

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        image = to_float(batch.images)
        restored = self.decode(self.code(self.encoder(image))).float().sigmoid()
        loss = functional.mse_loss(restored, image)
        # Of the variance about the batch's mean image: 1 for a decoder that ignores the code.
        share = loss.detach() / (image - image.mean(0)).square().mean().clamp_min(1e-12)
        return {"loss": loss, "error_share": share}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The image: nothing is changed about it."""
        return {"view": to_float(batch.images)}
