"""Max pooling of maps whose channels lie next to each other, on CUDA by kernels of our own.

torch's for channels_last maps took 23% of a step of the paper's STL-10 net on an H200 (docs/decisions/013).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from harness.batch_norm import ROWS_AT_ONCE, blocks, plain


class MaxPool2d(nn.MaxPool2d):
    """torch.nn.MaxPool2d, by our kernels for square windows of a map that is `plain`."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H', W')."""
        sizes = (self.kernel_size, self.stride, self.padding)
        simple = all(isinstance(size, int) for size in sizes) and self.dilation == 1
        if not (simple and not self.ceil_mode and not self.return_indices and plain(images)):
            return super().forward(images)
        with torch.cuda.device_of(images):  # where Triton starts its kernels
            out: Tensor = _MaxPool.apply(images, *sizes)
        return out


class _MaxPool(torch.autograd.Function):
    """The maximum of each window, and its gradient back to where it was found."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, side: int, stride: int, padding: int) -> Tensor:
        from harness import map_kernels as kernels

        count, channels, height, width = images.shape
        rows, columns = ((size + 2 * padding - side) // stride + 1 for size in (height, width))
        out = torch.empty(
            (count, channels, rows, columns), dtype=images.dtype, device=images.device,
            memory_format=torch.channels_last,
        )  # fmt: skip
        places = torch.empty_like(out, dtype=torch.uint8)
        ctx.sizes = (channels, height, width, rows, columns)
        ctx.window = {"K": side, "S": stride, "P": padding, "BLOCK_M": ROWS_AT_ONCE}
        block, across = blocks(channels)
        pixels = count * rows * columns
        kernels.pooled[(-(-pixels // ROWS_AT_ONCE), across)](
            images, out, places, pixels, *ctx.sizes, **ctx.window, BLOCK_C=block
        )
        ctx.save_for_backward(places)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from harness import map_kernels as kernels

        (places,) = ctx.saved_tensors
        channels, height, width, *_ = ctx.sizes
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        out = torch.empty(
            (len(places), channels, height, width), dtype=gradient.dtype, device=gradient.device,
            memory_format=torch.channels_last,
        )  # fmt: skip
        block, across = blocks(channels)
        pixels = len(places) * height * width
        kernels.pooled_gradient[(-(-pixels // ROWS_AT_ONCE), across)](
            gradient, places, out, pixels, *ctx.sizes, **ctx.window, BLOCK_C=block
        )
        return out, None, None, None
