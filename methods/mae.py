"""MAE: encode the quarter of an image that is left, and paint the rest from it.

He, Chen, Xie, Li, Dollár & Girshick, "Masked autoencoders are scalable vision learners", CVPR 2022 (arXiv 2111.06377).
Most patches are dropped before the encoder, which sees no mask token and costs a quarter; a small decoder gets the
encoded patches, one learnt token in place of every other, and the class token, and gives the missing patches' pixels.

It needs an encoder of tokens and brings `vit_tiny` unless `--encoder` names another ViT; write
`--encoder vit_tiny` to have the controls on the same network. Where this differs: the class token enters after the
encoder (harness.vit), a narrower and shallower decoder for a smaller encoder. A crop and a flip are the only view, as in
the paper. Slow to start: the paper trains for 800 to 1600 epochs.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.augment import to_float
from harness.contracts import Batch, Choice, Config, DatasetInfo, Encoder, HarnessError, Method, Range, setting
from harness.encoders import build
from harness.heads import wide
from harness.views import random_resized_crop
from harness.vit import (
    Block,
    ViTEncoder,
    as_tokens,
    initialise,
    patches_of,
    random_order,
    sine_positions,
    take_tokens,
    with_tokens,
)

__all__ = ["MAE", "masked_pixel_loss", "normalised_patches"]


HEADS = 4  # of the decoder


def normalised_patches(patches: Tensor) -> Tensor:
    """Each patch by its own mean and standard deviation (table 1d), (B, N, D) -> the same; a flat one becomes zero."""
    spread = patches.var(2, keepdim=True)
    return (patches - patches.mean(2, keepdim=True)) * (spread + 1e-6).rsqrt()


def masked_pixel_loss(predicted: Tensor, target: Tensor, masked: Tensor) -> Tensor:
    """Mean square over the pixels of masked patches: (B, N, D), (B, N, D) and (B, N) of 0 and 1 -> scalar."""
    error = (wide(predicted) - wide(target)).square().mean(2)
    return (error * masked).sum() / masked.sum()


class Decoder(nn.Module):
    """Section 3: visible tokens and the class token (B, 1 + K, width) -> pixels of all patches (B, N, pixels)."""

    positions: Tensor

    def __init__(self, features: int, grid: tuple[int, int], width: int, depth: int, pixels: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(features, width)
        self.blocks = nn.ModuleList(Block(width, HEADS) for _ in range(depth))
        self.norm, self.paint = nn.LayerNorm(width), nn.Linear(width, pixels)
        self.register_buffer("positions", as_tokens(sine_positions(width, *grid)), persistent=False)
        initialise(self)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, encoded: Tensor, place: Tensor) -> Tensor:
        """place (B, N): where each patch stands in the order whose first K were encoded."""
        narrow = self.narrow(encoded)
        one, visible = narrow[:, :1], narrow[:, 1:]
        missing = self.mask_token.to(visible.dtype).expand(len(place), place.shape[1] - visible.shape[1], -1)
        tokens = take_tokens(torch.cat((visible, missing), 1), place) + self.positions.to(visible.dtype)
        tokens = torch.cat((one, tokens), 1)
        for block in self.blocks:
            tokens = block(tokens)
        painted: Tensor = self.paint(self.norm(tokens[:, 1:]))
        return painted


class MAE(Method):
    """Masked autoencoder"""

    tier = "ranked"
    family = "masked"
    year = 2022
    idea = "encode a random quarter of the patches, reconstruct the pixels of the others with a light decoder"
    source = "He, Chen, Xie, Li, Dollár & Girshick, CVPR 2022, arXiv 2111.06377"
    defaults: ClassVar[dict[str, Any]] = {
        "optim.name": "adamw", "optim.lr": 2e-3, "optim.weight_decay": 0.05, "optim.beta2": 0.95,
        "schedule.warmup_fraction": 0.05,
    }  # fmt: skip

    encoder: ViTEncoder

    class Config(Config):
        mask: float = setting(
            0.75, "share of masked patches", source="section 4.1, figure 5", search=Range(0.4, 0.9), gt=0, lt=1
        )
        normalised: bool = setting(
            True, "targets are normalised patch by patch", source="table 1d", search=Choice((True, False))
        )
        decoder_width: int = setting(
            64, "channels of the decoder", source="512 for an encoder of 1024 (table 1b)", search=Choice((32, 64, 128)),
            ge=4, multiple_of=4,
        )  # fmt: skip
        decoder_depth: int = setting(
            2, "blocks of the decoder", source="8; 1 probes worse by 8 points (table 1a)", ge=1
        )
        crop_scale: float = setting(0.4, "smallest crop, share of the area", source="0.2 (authors' code)", gt=0, le=1)

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(with_tokens(encoder, "mae"), config, info)
        self.mirror = info.mirror_keeps_label
        width, rows, columns = encoder.map_shape
        self.num_visible = round(rows * columns * (1 - config.mask))
        if not 0 < self.num_visible < rows * columns:
            raise HarnessError(
                f"mae: method.mask={config.mask:g} leaves {self.num_visible} of {rows} x {columns} patches visible; "
                "some must be and some must not"
            )
        pixels = self.encoder.patch**2 * info.channels
        if config.normalised and pixels == 1:
            raise HarnessError(
                "mae: a patch is 1 pixel here and 0 once it is normalised by itself; set method.normalised=false"
            )
        self.decoder = Decoder(width, (rows, columns), config.decoder_width, config.decoder_depth, pixels)

    @classmethod
    def own_encoder(cls, info: DatasetInfo) -> Encoder:
        return build("vit_tiny", info)

    def view(self, batch: Batch) -> Tensor:
        """A crop, half of them mirrored where that keeps the label: (B, C, H, W) floats in [0, 1]."""
        scale = (self.config.crop_scale, 1.0)
        return random_resized_crop(to_float(batch.images), batch.seeds, "mae", scale, self.mirror)

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        encoder = self.encoder
        images = encoder.normalise(self.view(batch))
        tokens = as_tokens(encoder.placed(encoder.embed(images)))
        order, place = random_order(batch.seeds, "mae.mask", tokens.shape[1])
        encoded = encoder.encode_tokens(take_tokens(tokens, order[:, : self.num_visible]))
        predicted = self.decoder(torch.cat((encoder.class_token(encoded)[:, None], encoded), 1), place)
        target = patches_of(images, encoder.patch)
        if self.config.normalised:
            target = normalised_patches(target)
        return {"loss": masked_pixel_loss(predicted, target, (place >= self.num_visible).float())}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The view, and what is left of it."""
        view, (rows, columns) = self.view(batch), self.encoder.map_shape[1:]
        place = random_order(batch.seeds, "mae.mask", rows * columns)[1]
        kept = (place < self.num_visible).unflatten(1, (rows, columns))[:, None].float()
        kept = functional.interpolate(kept, scale_factor=self.encoder.patch)[..., : view.shape[2], : view.shape[3]]
        return {"view": view, "visible": view * kept}
