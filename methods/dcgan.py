"""DCGAN: the features of a network that learnt to tell real images from generated ones.

Radford, Metz & Chintala, "Unsupervised representation learning with deep convolutional generative adversarial
networks", 2015 (arXiv 1511.06434), section 3, with the non-saturating loss of Goodfellow et al., 2014. The encoder is the
discriminator.

Where we differ: the harness takes one step of one optimiser, so both networks move at once instead of in turn, from
the same weights: the generator's gradient goes through a copy of the discriminator whose weights are constants, the
discriminator's through detached images, so each gets exactly the gradient of its own loss. Any encoder is the
discriminator, also ones with ReLU where the paper has LeakyReLU; the generator enlarges and convolves where it has
transposed convolutions, which leave checkerboards (Odena et al., 2016); its tanh is brought to [0, 1], as images are.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from harness.augment import to_float, uniform
from harness.contracts import Batch, Choice, Config, DatasetInfo, Encoder, Method, setting
from harness.heads import decoder, wide

__all__ = ["DCGAN", "discriminator_loss", "generator_loss"]


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-log D(x) - log(1 - D(G(z))), each a mean; real, fake: scores (B,) before the sigmoid. Chance is 2 log 2."""
    return functional.softplus(-real).mean() + functional.softplus(fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """-log D(G(z)), the non-saturating form (Goodfellow et al., 2014, section 3). Chance is log 2."""
    return functional.softplus(-fake).mean()


class DCGAN(Method):
    """DCGAN discriminator"""

    family = "generative"
    year = 2015
    idea = "tell real images from those a generator makes to deceive"
    source = "Radford, Metz & Chintala, 2015, arXiv 1511.06434"
    # Section 4: Adam, 2e-4, first moment 0.5, no weight decay.
    defaults: ClassVar[dict[str, Any]] = {
        "optim.name": "adamw", "optim.lr": 2e-4, "optim.beta1": 0.5, "optim.weight_decay": 0.0,
    }  # fmt: skip

    class Config(Config):
        noise: int = setting(100, "uniform numbers that an image is made of", source="100: section 4", ge=1)
        channels: int = setting(
            64, "of the generator", source="1024 down to 128: figure 1", search=Choice((32, 64)), ge=1
        )

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        height, width = info.image_size
        start = (config.channels, math.ceil(height / 8), math.ceil(width / 8))  # doubled three times
        self.generator = nn.Sequential(
            nn.Linear(config.noise, math.prod(start), bias=False), nn.Unflatten(1, start),
            nn.BatchNorm2d(config.channels), nn.ReLU(), decoder(start, (info.channels, height, width), config.channels),
        )  # fmt: skip
        self.head = nn.Linear(math.prod(encoder.map_shape), 1)

    def generated(self, seeds: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1]."""
        noise = 2 * uniform(seeds, "dcgan.noise", (self.config.noise,)) - 1
        images = (wide(self.generator(noise.to(self.head.weight.dtype))).tanh() + 1) / 2
        assert isinstance(images, Tensor)
        return images

    def scores(self, images: Tensor, *, real: bool, constant: bool = False) -> Tensor:
        """The discriminator's (B,). real: these images enter the running statistics, which whoever uses the encoder
        later relies on; constant: no gradient for the discriminator's weights."""
        tensors: dict[str, Tensor] = {}
        if not real:
            tensors |= {name: buffer.clone() for name, buffer in self.encoder.named_buffers()}
        if constant:
            tensors |= {name: parameter.detach() for name, parameter in self.encoder.named_parameters()}
        flat = functional_call(self.encoder, tensors, (images,)).flatten(1)
        weight, bias = (part.detach() if constant else part for part in (self.head.weight, self.head.bias))
        return wide(functional.linear(flat, weight, bias)[:, 0])

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        fake = self.generated(batch.seeds)
        told = discriminator_loss(  # real and fake images in batches of their own, as in section 3
            self.scores(to_float(batch.images), real=True), self.scores(fake.detach(), real=False)
        )
        deceived = generator_loss(self.scores(fake, real=False, constant=True))
        return {"loss": told + deceived, "discriminator": told.detach(), "generator": deceived.detach()}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The real images, which are all that the encoder is kept for."""
        return {"view": to_float(batch.images)}
