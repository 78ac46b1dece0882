"""Random views of image batches: on the device, per sample, pure functions of (images, seeds).

Every random number a method uses is `uniform(seeds, stream, shape)`, an integer hash of the sample's own seed, the
name of the choice and a counter. So a sample's views depend on (seed, epoch, index, choice) alone: not on batch size,
worker, rank or memory layout, and resuming needs no generator state.
"""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that has it."""
    return value - (1 << 64) if value >= 1 << 63 else value


# The finaliser of SplitMix64 (Steele, Lea & Flood, 2014): every input bit flips every output bit with probability ~1/2.
_GAMMA, _MIX_1, _MIX_2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's >> keeps the sign; this one is logical


def mix(x: Tensor) -> Tensor:
    """Scramble int64 values of any shape; wrap-around multiplication is exact and equal on every device."""
    x = x + _GAMMA
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


@cache
def stream_key(stream: str) -> int:
    """A fixed int64 for the name of a random choice."""
    return int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little", signed=True)


def hash_seeds(seed: int, epoch: int | Tensor, indices: Tensor) -> Tensor:
    """hash(seed, epoch, index) for int64 `indices` (B,) -> (B,) int64."""
    base = mix(torch.as_tensor(seed, dtype=torch.int64, device=indices.device))
    if not isinstance(epoch, Tensor):
        epoch = torch.as_tensor(epoch, dtype=torch.int64, device=indices.device)
    return mix(mix(base + epoch) + indices)


def uniform(seeds: Tensor, stream: str, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform float32 in [0, 1) with 24 random bits: seeds (B,) int64 -> (B, *shape), on the seeds' device."""
    count = 1
    for side in shape:
        count *= side
    counters = torch.arange(count, dtype=torch.int64, device=seeds.device)
    bits = mix(mix(seeds + stream_key(stream))[:, None] + counters)
    return (_shift(bits, 40).to(torch.float32) * 2.0**-24).reshape(len(seeds), *shape)


def integers(seeds: Tensor, stream: str, high: int, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform int64 in [0, high), high < 2**24: seeds (B,) -> (B, *shape)."""
    return (uniform(seeds, stream, shape) * high).to(torch.int64).clamp_(max=high - 1)


def permutation(seed: int, epoch: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The epoch's order of `count` samples: the argsort of hash(seed, epoch, index), (count,) int64.

    The order's hash is salted so that it is independent of the per-sample seeds of the same epoch.
    """
    indices = torch.arange(count, dtype=torch.int64, device=device)
    return torch.argsort(mix(hash_seeds(seed, epoch, indices) + stream_key("order")), stable=True)


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) -> float32 in [0, 1]; floats pass through."""
    return images.to(torch.float32).div(255) if images.dtype == torch.uint8 else images


def shift_and_mirror(images: Tensor, seeds: Tensor, stream: str, shift: int, mirror: bool) -> Tensor:
    """Translate by up to `shift` pixels (edge pixels repeat) and flip half of the samples, as one gather.

    images (B, C, H, W) any dtype, seeds (B,) -> same shape and dtype, channels_last in memory.
    """
    if shift == 0 and not mirror:
        return images
    batch, _, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device).expand(batch, height)
    cols = torch.arange(width, device=device).expand(batch, width)
    if mirror:
        flip = uniform(seeds, f"{stream}.mirror") < 0.5
        cols = torch.where(flip[:, None], width - 1 - cols, cols)
    if shift:
        offset = integers(seeds, f"{stream}.shift", 2 * shift + 1, (2,)) - shift
        rows = (rows + offset[:, :1]).clamp(0, height - 1)
        cols = (cols + offset[:, 1:]).clamp(0, width - 1)
    sample = torch.arange(batch, device=device)[:, None, None]
    return images.permute(0, 2, 3, 1)[sample, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
