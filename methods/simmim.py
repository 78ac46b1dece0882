"""SimMIM: paint over most patches of an image and guess the pixels below from what the encoder makes of the whole.

Xie, Zhang, Cao, Lin, Bao, Yao, Dai & Hu, "SimMIM: a simple framework for masked image modeling", CVPR 2022 (arXiv
2111.09886). Masked patches enter the encoder as one learnt token; a single linear layer predicts raw pixels, L1 distance.

It needs an encoder of tokens and brings `vit_tiny` unless `--encoder` names another ViT. One masked
unit is one patch: a seventh of a 28 px side, as the paper's 32 px are a sixth of 192. The class token plays no part and
is left as it is (`cls` then reads an untrained one).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.augment import to_float
from harness.contracts import Batch, Config, DatasetInfo, Encoder, HarnessError, Method, Range, setting
from harness.encoders import build
from harness.heads import wide
from harness.views import random_resized_crop
from harness.vit import ViTEncoder, as_tokens, patches_of, random_order, with_tokens

__all__ = ["SimMIM", "masked_l1_loss"]


def masked_l1_loss(predicted: Tensor, target: Tensor, masked: Tensor) -> Tensor:
    """Eq. 1: mean absolute difference over pixels of masked patches; (B, N, D), (B, N, D), (B, N) bool -> scalar."""
    error = (wide(predicted) - wide(target)).abs().mean(2)
    return (error * masked).sum() / masked.sum()


class SimMIM(Method):
    """SimMIM"""

    family = "masked"
    year = 2022
    idea = "a mask token in place of most patches; one linear layer on the encoder predicts their raw pixels"
    source = "Xie, Zhang, Cao et al., CVPR 2022, arXiv 2111.09886"
    defaults: ClassVar[dict[str, Any]] = {
        "optim.name": "adamw", "optim.lr": 1e-3, "optim.weight_decay": 0.05, "schedule.warmup_fraction": 0.05,
    }  # fmt: skip

    class Config(Config):
        mask: float = setting(
            0.6, "share of masked patches", source="0.6 (table 1, 32 px)", search=Range(0.3, 0.8), gt=0, lt=1
        )
        crop_scale: float = setting(0.67, "smallest crop, share of the area", source="section 4.1", gt=0, le=1)

    encoder: ViTEncoder

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(with_tokens(encoder, "simmim"), config, info)
        self.mirror = info.mirror_keeps_label
        width, rows, columns = encoder.map_shape
        self.num_masked = round(rows * columns * config.mask)
        if not 0 < self.num_masked < rows * columns:
            raise HarnessError(
                f"simmim: method.mask={config.mask:g} masks {self.num_masked} of {rows} x {columns} patches; "
                "some must be and some must not"
            )
        self.encoder.class_token.requires_grad_(False)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.head = nn.Linear(width, self.encoder.patch**2 * info.channels)

    @classmethod
    def own_encoder(cls, info: DatasetInfo) -> Encoder:
        return build("vit_tiny", info)

    def view(self, batch: Batch) -> Tensor:
        """A crop, half of them mirrored where that keeps the label: (B, C, H, W) floats in [0, 1]."""
        scale = (self.config.crop_scale, 1.0)
        return random_resized_crop(to_float(batch.images), batch.seeds, "simmim", scale, self.mirror)

    def masked(self, seeds: Tensor) -> Tensor:
        """Which patches are masked: (B, rows, columns) bool."""
        rows, columns = self.encoder.map_shape[1:]
        return (random_order(seeds, "simmim.mask", rows * columns)[1] < self.num_masked).unflatten(1, (rows, columns))

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        encoder, masked = self.encoder, self.masked(batch.seeds)
        images = encoder.normalise(self.view(batch))
        embedded = encoder.embed(images)
        token = self.mask_token.to(embedded.dtype)[:, None, None]
        covered = encoder.placed(torch.where(masked[:, None], token, embedded))
        predicted = self.head(encoder.encode_tokens(as_tokens(covered)))
        return {"loss": masked_l1_loss(predicted, patches_of(images, encoder.patch), masked.flatten(1))}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The view, and what is not covered of it."""
        view, kept = self.view(batch), (~self.masked(batch.seeds))[:, None].float()
        kept = functional.interpolate(kept, scale_factor=self.encoder.patch)[..., : view.shape[2], : view.shape[3]]
        return {"view": view, "visible": view * kept}
