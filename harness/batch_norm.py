"""Batch norm over maps whose channels lie next to each other, on CUDA with the activation that follows in one pass.

torch's own kernels for channels_last maps know no activation and are slow to sum over pixels: with the leaky ReLU behind
them they were a third of a step of the paper's CIFAR-10 net on an H200 (docs/decisions/013). Everywhere else - a CPU, evaluation,
vmap, a compiler that fuses by itself - `BatchNorm2d` is torch's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from harness.kernels import applicable

PROGRAMS = 768  # that share a sum over pixels: six for each of an H100's multiprocessors
ROWS_AT_ONCE = 64


class BatchNorm2d(nn.BatchNorm2d):
    """torch.nn.BatchNorm2d, by our kernels where `fits` says so."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        return self.activated(images, 1.0) if fits(self, images) else super().forward(images)

    def activated(self, images: Tensor, slope: float, other: Tensor | None = None) -> Tensor:
        """Leaky ReLU of the normalised map, of its sum with `other` if there is one. Only where `fits`.

        other: the same shape; slope: of the negative side, 0 for ReLU, 1 for no activation
        """
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        with torch.cuda.device_of(
            images
        ):  # Triton starts kernels on the current device, which need not be the tensor's
            out: Tensor = _BatchNorm.apply(
                images,
                other,
                self.weight,
                self.bias,
                self.running_mean,
                self.running_var,
                self.momentum,
                self.eps,
                slope,
            )
        return out


def in_order(modules: Iterable[nn.Module], images: Tensor) -> Tensor:
    """The modules one after the other; a batch norm and the (leaky) ReLU behind it are one operation where that `fits`."""
    left = list(modules)
    while left:
        module = left.pop(0)
        slope = _slope(left[0]) if left else None
        if isinstance(module, BatchNorm2d) and slope is not None and fits(module, images):
            images = module.activated(images, slope)
            del left[0]
        else:
            images = module(images)
    return images


class InOrder(nn.Sequential):
    """nn.Sequential by `in_order`."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> what the last module gives."""
        return in_order(self, images)


def _slope(module: nn.Module) -> float | None:
    if isinstance(module, nn.LeakyReLU):
        return float(module.negative_slope)
    return 0.0 if isinstance(module, nn.ReLU) else None


def fits(norm: nn.BatchNorm2d, images: Tensor) -> bool:
    """Whether our kernels can do this pass of a batch norm: training, on a map that is `plain`."""
    return (
        norm.training and plain(images) and images.numel() > images.shape[1] and norm.affine
        and norm.track_running_stats and norm.momentum is not None and norm.weight.dtype == torch.float32
    )  # fmt: skip


def plain(images: Tensor) -> bool:
    """A channels_last map that our kernels are `applicable` to."""
    return (
        applicable(images)  # first: inside vmap a map cannot be asked how it lies in memory
        and images.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and images.is_contiguous(memory_format=torch.channels_last)
    )


def blocks(channels: int) -> tuple[int, int]:
    """Channels per program, and programs across all of them."""
    block = 64 if channels % 64 == 0 else 32 if channels > 16 else 16
    return block, -(-channels // block)


def _shares(pixels: int, across: int) -> tuple[int, int]:
    """Programs that share the pixels, and pixels of each."""
    shared = max(1, min(-(-pixels // ROWS_AT_ONCE), PROGRAMS // across))
    each = -(-pixels // (shared * ROWS_AT_ONCE)) * ROWS_AT_ONCE
    return -(-pixels // each), each


class _BatchNorm(torch.autograd.Function):
    """Ioffe & Szegedy 2015, algorithm 1, and its gradient; the map's normalised form is computed twice, not kept."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, other: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor,
        running_var: Tensor, momentum: float, eps: float, slope: float,
    ) -> Tensor:  # fmt: skip
        from harness import map_kernels as kernels

        channels = images.shape[1]
        pixels = images.numel() // channels
        block, across = blocks(channels)
        shared, each = _shares(pixels, across)
        partial = torch.empty(2, shared, channels, dtype=torch.float32, device=images.device)
        mean, scale = torch.empty(2, channels, dtype=torch.float32, device=images.device)
        out = torch.empty_like(images)
        if other is not None:
            other = other.contiguous(memory_format=torch.channels_last)
        kernels.moments[(shared, across)](images, partial, pixels, channels, each, BLOCK_M=ROWS_AT_ONCE, BLOCK_C=block)
        kernels.statistics[(-(-channels // 16),)](
            images, partial, mean, scale, running_mean, running_var, pixels, channels, shared, momentum, eps,
            BLOCK_P=64, BLOCK_C=16,
        )  # fmt: skip
        kernels.normalise[(-(-pixels // ROWS_AT_ONCE), across)](
            images, images if other is None else other, out, mean, scale, weight, bias, pixels, channels, slope,
            ACTIVATE=slope != 1, ADD=other is not None, BLOCK_M=ROWS_AT_ONCE, BLOCK_C=block,
        )  # fmt: skip
        ctx.save_for_backward(images, None if other is None else out, weight, bias, mean, scale)
        ctx.slope = slope
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from harness import map_kernels as kernels

        images, sum_out, weight, bias, mean, scale = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        channels = images.shape[1]
        pixels = images.numel() // channels
        block, across = blocks(channels)
        shared, each = _shares(pixels, across)
        partial = torch.empty(2, shared, channels, dtype=torch.float32, device=images.device)
        sums = torch.empty(2, channels, dtype=torch.float32, device=images.device)
        out, add = torch.empty_like(images), sum_out is not None
        to_other = torch.empty_like(images) if add else None
        after = sum_out if add else images  # a pointer that is not read
        own: dict[str, Any] = {"ACTIVATE": ctx.slope != 1, "ADD": add, "BLOCK_M": ROWS_AT_ONCE, "BLOCK_C": block}
        kernels.gradient_sums[(shared, across)](
            images, after, gradient, partial, mean, scale, weight, bias, pixels, channels, each, ctx.slope, **own
        )
        kernels.added_up[(-(-channels // 16), 2)](partial, sums, channels, shared, BLOCK_P=64, BLOCK_C=16)
        kernels.input_gradient[(-(-pixels // ROWS_AT_ONCE), across)](
            images, after, gradient, out, out if to_other is None else to_other, sums, mean, scale, weight, bias, pixels,
            channels, ctx.slope, **own,
        )  # fmt: skip
        return out, to_other, sums[1], sums[0], None, None, None, None, None
