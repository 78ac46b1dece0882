"""A small Vision Transformer for images of 8 to 224 px; its map is its patch tokens.

Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021: patches, a linear embedding, positions, pre-norm blocks.
Fixed sines in two dimensions are the positions (He et al., 2022, appendix A), resampled for views of another size (Caron
et al., 2021). The patch's side is the largest power of two that leaves at least 7 tokens a side, 16 at most: 4 px at 28
to 48, 8 at 64 to 96; an image that is no multiple of it is padded by its mean. `vit_tiny` is smaller than the 192 x 12
that others call so, since a laptop must train it.

The class token enters after the last block, as in CaiT (Touvron et al., 2021, "Going deeper with image transformers",
section 3): it asks the patch tokens once and is asked by none. So the map has no cell that is no place of the image,
spatial methods cannot cheat through a token that every cell has read, any subset of the tokens can be encoded, and the
class token is a function of the map: `pool`, what most methods put their projector on. A method that uses the map alone
leaves it untrained, and its readout `cls` then says little; which readout counts is chosen on validation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.augment import uniform
from harness.contracts import DatasetInfo, Encoder, HarnessError
from harness.conv_encoder import ConvEncoder

REVISION = 2  # bump when the arithmetic changes any number; 2: attention in bf16 on a CPU
FEWEST_TOKENS, LARGEST_PATCH = 7, 16  # a side, and pixels: 14 x 14 tokens at 224 px as in Dosovitskiy et al.
WAVES = 10_000.0  # longest over shortest period of the sines (Vaswani et al., 2017)


@dataclass(frozen=True)
class Size:
    """Width of a token, number of blocks, heads of each."""

    width: int
    depth: int
    heads: int


SIZES = {"vit_tiny": Size(128, 6, 4), "vit_small": Size(384, 12, 6)}  # the second: Touvron et al., 2021, table 1


def patch_side(image_size: tuple[int, int]) -> int:
    """Pixels of a patch's side for images (H, W)."""
    return min(LARGEST_PATCH, 2 ** max(0, int(math.log2(max(1.0, min(image_size) / FEWEST_TOKENS)))))


def sine_positions(width: int, rows: int, columns: int) -> Tensor:
    """Sines and cosines of the row in one half of the channels, of the column in the other: (1, width, rows, columns)."""
    waves = WAVES ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    halves = []
    for axis, side in enumerate((rows, columns)):
        angles = waves[:, None] * torch.arange(side, dtype=torch.float64)
        half = torch.cat((angles.sin(), angles.cos()))
        halves.append((half[:, :, None] if axis == 0 else half[:, None, :]).expand(-1, rows, columns))
    return torch.cat(halves)[None].float()


def as_tokens(feature_map: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C), row by row: a view of a channels_last map."""
    return feature_map.flatten(2).transpose(1, 2)


def as_map(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """(B, rows * columns, C) -> (B, C, rows, columns), channels_last in memory."""
    return tokens.transpose(1, 2).unflatten(2, (rows, columns))


def take_tokens(tokens: Tensor, places: Tensor) -> Tensor:
    """Some tokens of each sample: (B, N, D) and places (B, K) int64 -> (B, K, D)."""
    return tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))


def random_order(seeds: Tensor, stream: str, count: int) -> tuple[Tensor, Tensor]:
    """A random order of `count` patches for each sample and where each patch is in it: both (B, count) int64."""
    order = uniform(seeds, stream, (count,)).argsort(dim=1, stable=True)
    return order, order.argsort(dim=1)


def patches_of(images: Tensor, side: int) -> Tensor:
    """Cut (B, C, H, W), padded by zeros to multiples of `side`, into (B, N, side * side * C), row by row."""
    height, width = images.shape[2:]
    padded = functional.pad(images, (0, -width % side, 0, -height % side))
    cut = padded.unfold(2, side, side).unfold(3, side, side)  # (B, C, rows, columns, side, side)
    return cut.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V of (B, heads, Q, D), (B, heads, N, D) and (B, heads, N, D) -> (B, heads, Q, D).

    torch's fused attention, but for bf16 on a CPU, where its backward pass took 76 ms for 128 images of 4 heads and 49
    tokens and three plain operations take 7 (torch 2.15, one core of an AMD EPYC): 64% of a step of MAE.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(-1).to(value.dtype) @ value
    return functional.scaled_dot_product_attention(query, key, value)


class Attention(nn.Module):
    """Multi-head attention of `asking` (B, Q, D) to `asked` (B, N, D) -> (B, Q, D) (Vaswani et al., 2017)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, asking: Tensor, asked: Tensor) -> Tensor:
        key, value = (self._split(part) for part in self.key_value(asked).chunk(2, 2))
        answers = attend(self._split(self.query(asking)), key, value)
        result: Tensor = self.out(answers.transpose(1, 2).flatten(2))
        return result


def mlp(width: int) -> nn.Sequential:
    """The block's second half: (..., D) -> (..., D) through 4 D."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Block(nn.Module):
    """Pre-norm transformer block: (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = Attention(width, heads), mlp(width)

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.first_norm(tokens)
        tokens = tokens + self.attention(normed, normed)
        result: Tensor = tokens + self.mlp(self.second_norm(tokens))
        return result


class ClassToken(nn.Module):
    """A learnt token that asks the others once: tokens (B, N, D), or a map (B, D, H, W), -> (B, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(width) * 0.02)
        self.attention, self.mlp = Attention(width, heads), mlp(width)
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = as_tokens(tokens) if tokens.ndim == 4 else tokens
        own = self.token.to(tokens.dtype).expand(len(tokens), 1, -1)
        own = own + self.attention(own, tokens)
        result: Tensor = self.second_norm(own + self.mlp(self.first_norm(own)))[:, 0]
        return result


def initialise(module: nn.Module) -> None:
    """Xavier-uniform weights and no biases in every linear layer (He et al., 2022, appendix A)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


class ViTEncoder(ConvEncoder):
    """One of SIZES. Layers `patches`, `block1`, `block2`, ...; the last one's tokens are normalised.

    Readouts: `gap` and `spatial` of the map as for any encoder; `cls`, the class token; `mean`, what papers on vision
    transformers call `gap`.
    """

    readouts = ("gap", "spatial", "cls", "mean")
    positions: Tensor  # (1, D, H, W)

    def __init__(self, name: str, info: DatasetInfo) -> None:
        super().__init__(name, info)
        size = SIZES[name]
        self.patch = patch_side(info.image_size)
        rows, columns = (-(-side // self.patch) for side in info.image_size)
        self.embedding = nn.Conv2d(info.channels, size.width, self.patch, stride=self.patch)
        self.register_buffer("positions", sine_positions(size.width, rows, columns), persistent=False)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width)
        self.class_token = ClassToken(size.width, size.heads)
        nn.init.xavier_uniform_(self.embedding.weight.data.view(size.width, -1))
        nn.init.zeros_(self.embedding.bias)  # type: ignore[arg-type]
        initialise(self)

    # ---- tokens: what masked models work on

    def embed(self, normalised: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) -> map of patch embeddings (B, D, rows, columns), without positions."""
        height, width = normalised.shape[2:]
        padded = functional.pad(normalised, (0, -width % self.patch, 0, -height % self.patch))
        embedded: Tensor = self.embedding(padded)
        return embedded

    def placed(self, embedded: Tensor) -> Tensor:
        """Add the positions, those of this very image: (B, D, rows, columns) -> the same."""
        positions, size = self.positions, embedded.shape[2:]
        if positions.shape[2:] != size:
            positions = functional.interpolate(positions, size, mode="bilinear", align_corners=False)
        return embedded + positions.to(embedded.dtype)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """All blocks and the last norm on any subset of placed tokens: (B, K, D) -> (B, K, D)."""
        for block in self.blocks:
            tokens = block(tokens)
        encoded: Tensor = self.norm(tokens)
        return encoded

    # ---- Encoder

    def _begin(self, normalised: Tensor) -> Tensor:
        return self.placed(self.embed(normalised))

    def _block(self, feature_map: Tensor, number: int) -> Tensor:
        tokens = self.blocks[number](as_tokens(feature_map))
        if number + 1 == len(self.blocks):
            tokens = self.norm(tokens)
        return as_map(tokens, feature_map.shape[2], feature_map.shape[3])

    def stages(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        blocks = {f"block{n + 1}": partial(self._block, number=n) for n in range(len(self.blocks))}
        return {"patches": self._begin, **blocks}

    def pool(self, feature_map: Tensor) -> Tensor:
        token: Tensor = self.class_token(feature_map)
        return token

    def read(self, feature_map: Tensor, readout: str) -> Tensor:
        if readout in ("gap", "mean"):
            return feature_map.mean((2, 3))
        return self.pool(feature_map) if readout == "cls" else super().read(feature_map, readout)

    def classifier(self, num_classes: int) -> nn.Module:
        """A class token that starts where the encoder's own stands, and a linear layer."""
        token = copy.deepcopy(self.class_token).requires_grad_(True)
        return nn.Sequential(token, nn.Linear(self.map_shape[0], num_classes))


def with_tokens(encoder: Encoder, method: str) -> ViTEncoder:
    """The encoder itself, if it is one of tokens. Raises HarnessError, naming `method`, if not."""
    if isinstance(encoder, ViTEncoder):
        return encoder
    raise HarnessError(
        f"{method}: encodes some patches of an image only, so its encoder is {' or '.join(SIZES)}, not {encoder.name}"
    )
