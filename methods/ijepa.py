"""I-JEPA: from what is seen of an image, predict what a slow copy of the encoder makes of blocks that are not seen.

Assran, Duval, Misra, Bojanowski, Vincent, Rabbat, LeCun & Ballas, "Self-supervised learning from images with a
joint-embedding predictive architecture", CVPR 2023 (arXiv 2301.08243). No views: the context is the image without its
target blocks, the target is in features and never in pixels. Spatial contrasting's idea without negatives.

It needs an encoder of tokens and brings `vit_tiny` unless `--encoder` names another ViT. So that every
step has the same shapes, target blocks are squares of one size (the paper draws their size and aspect ratio for each
batch) and the context has a fixed number of patches: what four blocks leave if they do not overlap, drawn at random
among what they really leave (the paper cuts a batch's contexts to the shortest). Blocks and patches are few on small
images. The momentum rises along half a cosine, where the paper's rises on a straight line. The class token plays no
part, as the paper's encoder has none (`cls` then reads an untrained one).
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.augment import integers, to_float, uniform
from harness.contracts import Batch, Choice, Config, DatasetInfo, Encoder, HarnessError, Method, Range, setting
from harness.encoders import build
from harness.heads import momentum_update, rising_momentum, wide
from harness.views import random_resized_crop
from harness.vit import Block, ViTEncoder, as_tokens, initialise, sine_positions, take_tokens, with_tokens

__all__ = ["IJEPA", "block_places", "context_places"]

HEADS = 4  # of the predictor


def block_places(seeds: Tensor, stream: str, grid: tuple[int, int], side: int, count: int) -> Tensor:
    """`count` square blocks of `side` patches anywhere on the grid: seeds (B,) -> (B, count, side * side) int64."""
    device, (rows, columns) = seeds.device, grid
    top = integers(seeds, f"{stream}.top", rows - side + 1, (count,))
    left = integers(seeds, f"{stream}.left", columns - side + 1, (count,))
    cells = torch.arange(side, device=device)
    inside = (cells[:, None] * columns + cells).flatten()
    return (top * columns + left)[:, :, None] + inside


def context_places(seeds: Tensor, stream: str, targets: Tensor, patches: int, count: int) -> Tensor:
    """`count` of the patches that lie in no block, at random: targets (B, M, K) -> (B, count) int64."""
    hidden = torch.zeros(len(seeds), patches, device=seeds.device).scatter(1, targets.flatten(1), 1.0)
    return (hidden + uniform(seeds, stream, (patches,))).argsort(dim=1, stable=True)[:, :count]


class Predictor(nn.Module):
    """Section 3: a narrow transformer that gets the context and one token for each patch of a block."""

    positions: Tensor

    def __init__(self, features: int, grid: tuple[int, int], width: int, depth: int) -> None:
        super().__init__()
        self.narrow, self.widen = nn.Linear(features, width), nn.Linear(width, features)
        self.blocks = nn.ModuleList(Block(width, HEADS) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("positions", as_tokens(sine_positions(width, *grid)), persistent=False)
        initialise(self)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)

    def _placed(self, tokens: Tensor, places: Tensor) -> Tensor:
        return tokens + take_tokens(self.positions.expand(len(places), -1, -1), places).to(tokens.dtype)

    def forward(self, context: Tensor, seen: Tensor, asked: Tensor) -> Tensor:
        """context (B, N, D) at places seen (B, N), blocks asked (B, M, K) -> (B * M, K, D)."""
        blocks = asked.shape[1]
        tokens = self._placed(self.narrow(context), seen).repeat_interleave(blocks, 0)
        places = asked.flatten(0, 1)
        masks = self._placed(self.mask_token.to(tokens.dtype).expand(*places.shape, -1), places)
        tokens = torch.cat((tokens, masks), 1)
        for block in self.blocks:
            tokens = block(tokens)
        predicted: Tensor = self.widen(self.norm(tokens[:, seen.shape[1] :]))
        return predicted


class IJEPA(Method):
    """I-JEPA"""

    family = "masked"
    year = 2023
    idea = "predict a momentum encoder's features of hidden blocks from the rest of the image"
    source = "Assran, Duval, Misra et al., CVPR 2023, arXiv 2301.08243"
    defaults: ClassVar[dict[str, Any]] = {
        "optim.name": "adamw", "optim.lr": 1e-3, "optim.weight_decay": 0.05, "schedule.warmup_fraction": 0.05,
    }  # fmt: skip

    class Config(Config):
        blocks: int = setting(4, "target blocks of an image", source="4 (section 3)", search=Choice((1, 2, 4)), ge=1)
        scale: float = setting(
            0.175,
            "share of the patches in a block",
            source="0.15 to 0.2 (section 3)",
            search=Range(0.1, 0.2),
            gt=0,
            lt=1,
        )
        momentum: float = setting(
            0.99, "of the target encoder at the start; it rises to 1", source="0.996 with 100,000 steps", ge=0, le=1
        )
        width: int = setting(
            64, "channels of the predictor", source="384 for an encoder of 768 to 1280", ge=4, multiple_of=4
        )
        depth: int = setting(3, "blocks of the predictor", source="6 to 16 (appendix A)", ge=1)
        crop_scale: float = setting(0.4, "smallest crop, share of the area", source="0.3 (authors' code)", gt=0, le=1)

    encoder: ViTEncoder

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(with_tokens(encoder, "ijepa"), config, info)
        width, rows, columns = encoder.map_shape
        self.grid = (rows, columns)
        self.side = max(1, round((config.scale * rows * columns) ** 0.5))
        self.num_context = rows * columns - config.blocks * self.side**2
        if self.num_context < 1 or self.side > min(self.grid):
            raise HarnessError(
                f"ijepa: {config.blocks} blocks of {self.side} x {self.side} patches (method.scale={config.scale:g}) may "
                f"leave nothing of {rows} x {columns} to predict them from"
            )
        self.encoder.class_token.requires_grad_(False)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.predictor = Predictor(width, self.grid, config.width, config.depth)

    @classmethod
    def own_encoder(cls, info: DatasetInfo) -> Encoder:
        return build("vit_tiny", info)

    def view(self, batch: Batch) -> Tensor:
        """One crop: (B, C, H, W) floats in [0, 1]."""
        return random_resized_crop(to_float(batch.images), batch.seeds, "ijepa", (self.config.crop_scale, 1.0))

    def places(self, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Patches of the context (B, N) and of the target blocks (B, M, K)."""
        asked = block_places(seeds, "ijepa.block", self.grid, self.side, self.config.blocks)
        return context_places(seeds, "ijepa.context", asked, self.grid[0] * self.grid[1], self.num_context), asked

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        encoder, view = self.encoder, self.view(batch)
        seen, asked = self.places(batch.seeds)
        tokens = as_tokens(encoder.placed(encoder.embed(encoder.normalise(view))))
        predicted = self.predictor(encoder.encode_tokens(take_tokens(tokens, seen)), seen, asked)
        with torch.no_grad():
            features = wide(as_tokens(self.teacher(view)))
            features = functional.layer_norm(features, features.shape[2:])  # as the authors' code does
            target = take_tokens(features, asked.flatten(1)).reshape(predicted.shape)
        spread = functional.normalize(features.mean(1), dim=1).std(0).mean() * features.shape[2] ** 0.5
        return {"loss": functional.mse_loss(wide(predicted), target), "target_spread": spread}

    @torch.no_grad()
    def after_step(self, progress: Tensor) -> None:
        momentum_update(self.teacher, self.encoder, rising_momentum(progress, self.config.momentum))

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The view, what is seen of it, and the first block."""
        view, (seen, asked) = self.view(batch), self.places(batch.seeds)
        shown = {"view": view}
        for name, places in (("context", seen), ("block", asked[:, 0])):
            kept = torch.zeros(len(batch), self.grid[0] * self.grid[1], device=view.device).scatter(1, places, 1.0)
            kept = functional.interpolate(kept.unflatten(1, self.grid)[:, None], scale_factor=self.encoder.patch)
            shown[name] = view * kept[..., : view.shape[2], : view.shape[3]]
        return shown
