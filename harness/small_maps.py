"""Convolutions over small maps as products of matrices, in bf16 on CPUs that have matrix units (AMX).

With few pixels and many weights, oneDNN (3.13, in torch 2.15) spends most of a convolution on the weights: it brings them
into another order and back, and sums their gradient with a part of the machine's rate (docs/decisions/014 has the figures).
Written as a product of patches and weights, both lie in memory as torch keeps them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEAST_WEIGHTS, MOST_PIXELS = 100_000, 36  # pixels of the map that comes out; outside of these nothing is gained
MANY_WEIGHTS, MORE_PIXELS = 1_000_000, 64  # with so many, up to 8 x 8; and the gradient of the images is a product too


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d, by products of matrices where it `fits`."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        if not fits(self, images):
            return super().forward(images)
        weight, images = self.weight.to(torch.bfloat16), images.to(torch.bfloat16)
        rows: Tensor = _Product.apply(images, weight, self.stride[0], int(self.padding[0]))
        height, width = _sizes(self, images)
        out = rows.view(len(images), height, width, len(weight)).permute(0, 3, 1, 2)
        return out if self.bias is None else out + self.bias.to(torch.bfloat16)[:, None, None]


def fits(conv: nn.Conv2d, images: Tensor) -> bool:
    """Whether this pass is better done as a product: training in bf16 on such a CPU, few pixels, many weights."""
    if torch.compiler.is_compiling() or images.device.type != "cpu" or conv.weight.numel() < LEAST_WEIGHTS:
        return False
    if not (torch.is_grad_enabled() and conv.weight.requires_grad and torch.is_autocast_enabled("cpu")):
        return False
    side, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    square = conv.kernel_size == (side, side) and conv.stride == (stride, stride) and conv.padding == (padding, padding)
    plain = square and conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    if not (plain and images.ndim == 4 and len(images) and torch.get_autocast_dtype("cpu") is torch.bfloat16):
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if type(images) is not Tensor or wrapped(images) or wrapped(conv.weight):  # stand-ins, vmap, torch.func.grad
        return False
    height, width = _sizes(conv, images)
    most = MORE_PIXELS if conv.weight.numel() >= MANY_WEIGHTS else MOST_PIXELS
    return min(height, width) > 0 and height * width <= most and has_matrix_units()


@functools.cache
def has_matrix_units() -> bool:
    """Whether the CPU multiplies tiles of bf16 (AMX). The question is a private one of torch's: unknown is no."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def _sizes(conv: nn.Conv2d, images: Tensor) -> list[int]:
    """Height and width of the map that comes out."""
    return [_size(size, conv.kernel_size[0], conv.stride[0], int(conv.padding[0])) for size in images.shape[2:]]


def _size(size: int, side: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - side) // stride + 1


class _Product(torch.autograd.Function):
    """A convolution without bias, its map as rows: patches (B * H' * W', K * K * C) times weights (K * K * C, C').

    Its gradient has none in turn: there are no second derivatives.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        count, channels, *sizes = images.shape
        side = weight.shape[2]
        height, width = (_size(size, side, stride, padding) for size in sizes)
        rows = nn.functional.pad(images.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding)).contiguous()
        image, row, pixel, _ = rows.stride()
        patches = rows.as_strided(
            (count, height, width, side, side, channels), (image, row * stride, pixel * stride, row, pixel, 1)
        ).reshape(-1, side * side * channels)
        matrix = weight.permute(0, 2, 3, 1).reshape(len(weight), -1)
        ctx.save_for_backward(patches, weight, images)
        ctx.window = (stride, padding, height, width)
        return patches @ matrix.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        patches, weight, images = ctx.saved_tensors
        channels, side = weight.shape[1:3]
        of_weight = (slopes.T @ patches).view(len(weight), side, side, channels).permute(0, 3, 1, 2)
        of_images = None
        if ctx.needs_input_grad[0]:
            of_images = _gradient_of_images(slopes, weight, images, *ctx.window)
        return of_images, of_weight, None, None


def _gradient_of_images(
    slopes: Tensor, weight: Tensor, images: Tensor, stride: int, padding: int, height: int, width: int
) -> Tensor:
    """slopes: the map's gradient as rows. The patches' gradient is added up in float32, or oneDNN does it all."""
    count, channels, *sizes = images.shape
    side = weight.shape[2]
    if weight.numel() < MANY_WEIGHTS and side > 1:
        gradient = slopes.reshape(count, height, width, len(weight)).permute(0, 3, 1, 2)
        window = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1)
        found: Tensor = torch.ops.aten.convolution_backward(
            gradient, images, weight, None, *window, [True, False, False]
        )[0]
        return found
    matrix = weight.permute(0, 2, 3, 1).reshape(len(weight), -1)
    parts = (slopes @ matrix).view(count, height, width, side, side, channels)
    rows, columns = (size + 2 * padding for size in sizes)
    whole = torch.zeros(count, rows, columns, channels, dtype=torch.float32 if side > 1 else torch.bfloat16)
    for y in range(side):
        for x in range(side):
            whole[:, y : y + stride * height : stride, x : x + stride * width : stride] += parts[..., y, x, :]
    inner = whole[:, padding : rows - padding, padding : columns - padding]
    return inner.to(torch.bfloat16).permute(0, 3, 1, 2)
