"""A ResNet's first convolution on CUDA in bf16: 7 x 7 over three channels as 4 x 4 over blocks of 2 x 2 pixels.

Tensor cores take channels eight at a time; for three, cuDNN pads the images and takes a kernel that reaches a
twentieth of the card's rate (docs/decisions/015). A stride of two reads blocks of four pixels with twelve channels just
as well: the rearrangement is known as space to depth. The weights stay 7 x 7, a row and a column of zeros beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from harness import small_maps
from harness.kernels import ordinary

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what autocast takes; others go to torch, which says why not
CHANNELS = 16  # of a block: twelve, and four of zeros


class Stem(small_maps.Conv2d):
    """torch.nn.Conv2d of 7 x 7, stride 2 and padding 3, by blocks where it `fits`."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / 2, W / 2)."""
        if not fits(self, images):
            return super().forward(images)
        return by_blocks(images, self.weight, torch.get_autocast_dtype("cuda"))


def is_stem(conv: torch.nn.Conv2d) -> bool:
    """Whether a convolution is of the kind that `Stem` knows."""
    sizes = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.in_channels)
    return sizes == ((7, 7), (2, 2), (3, 3), (1, 1), 1, 3) and conv.bias is None and conv.padding_mode == "zeros"


def fits(conv: torch.nn.Conv2d, images: Tensor) -> bool:
    """Whether this pass is done by blocks: under autocast on CUDA, of images with even sides that ask for no gradient."""
    return (
        images.is_cuda and torch.is_autocast_enabled("cuda") and not images.requires_grad and images.ndim == 4
        and images.dtype in FLOATS and images.shape[2] % 2 == 0 and images.shape[3] % 2 == 0
        and ordinary(images, conv.weight)
    )  # fmt: skip


def by_blocks(images: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """conv2d(images, weight, stride=2, padding=3): (B, C, H, W), (C', C, 7, 7) -> (B, C', H / 2, W / 2).

    A window begins three pixels before its place: with a pixel more in front it begins with a block, two before its own.
    """
    batch, channels, height, width = images.shape
    blocks = torch.zeros(batch, height // 2 + 3, width // 2 + 3, CHANNELS, dtype=dtype, device=images.device)
    pixels = images.detach().permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, h, 2, w, 2, C)
    inner = blocks[:, 2:-1, 2:-1, : 4 * channels].unflatten(3, (2, 2, channels))
    inner.copy_(pixels.transpose(2, 3))
    taps = functional.pad(weight, (1, 0, 1, 0)).unflatten(3, (4, 2)).unflatten(2, (4, 2))  # (C', C, 4, 2, 4, 2)
    taps = taps.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
    taps = functional.pad(taps, (0, 0, 0, 0, 0, CHANNELS - 4 * channels))
    return functional.conv2d(blocks.permute(0, 3, 1, 2), taps.to(dtype, memory_format=torch.channels_last))
