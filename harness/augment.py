"""Random views of image batches: on the device, per sample, pure functions of (images, seeds).

Every random number a method uses is `uniform(seeds, stream, shape)`, an integer hash of the sample's own seed, the
name of the choice and a counter. So a sample's views depend on (seed, epoch, index, choice) alone: not on batch size,
worker, rank or memory layout, and resuming needs no generator state.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache

import torch
from torch import Tensor

from harness import device_views


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


def stream_key(stream: str) -> int:
    """A fixed int64 for the name of a random choice."""
    return _hashed(stream)


# What torch.compiler.assume_constant_result does, without the 3.5 CPU seconds that importing the compiler takes.
stream_key._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _hashed(name: str) -> int:
    # Apart from `stream_key`, because torch.compile looks through a cache but calls a function that it may assume
    # constant; hashlib is nothing it could trace.
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def hash_seeds(seed: int, epoch: int | Tensor, indices: Tensor) -> Tensor:
    """hash(seed, epoch, index) for int64 `indices` (B,) -> (B,) int64."""
    base = mix(torch.full((), seed, dtype=torch.int64, device=indices.device))  # filled there, not copied from here
    return mix(mix(base + epoch) + indices)


def uniform(seeds: Tensor, stream: str, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform float32 in [0, 1) with 24 random bits: seeds (B,) int64 -> (B, *shape), on the seeds' device."""
    count = 1
    for side in shape:
        count *= side
    counters = torch.arange(count, dtype=torch.int64, device=seeds.device)
    bits = mix(mix(seeds + stream_key(stream))[:, None] + counters)
    return (_shift(bits, 40).to(torch.float32) * 2.0**-24).reshape(len(seeds), *shape)


def uniforms(seeds: Tensor, wanted: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """`uniform` of every stream that is named, with its shape: the same bits, in a tenth of the operations on a CPU."""
    if not chooses(seeds):  # these operations need constants that lie on the device
        return {stream: uniform(seeds, stream, shape) for stream, shape in wanted.items()}
    keys, counters, counts = _columns(tuple(wanted.items()))
    bits = mix(mix(seeds[:, None] + keys) + counters)
    parts = (_shift(bits, 40).to(torch.float32) * 2.0**-24).split(counts, 1)
    return {
        stream: part.reshape(len(seeds), *shape) for (stream, shape), part in zip(wanted.items(), parts, strict=True)
    }


@cache
def _columns(wanted: tuple[tuple[str, tuple[int, ...]], ...]) -> tuple[Tensor, Tensor, list[int]]:
    """The key and the counter of each number, stream after stream, and how many numbers each stream has."""
    counts = [math.prod(shape) for _, shape in wanted]
    keys = [stream_key(stream) for (stream, _), count in zip(wanted, counts, strict=True) for _ in range(count)]
    counters = [number for count in counts for number in range(count)]
    return torch.tensor(keys), torch.tensor(counters), counts


def integers(seeds: Tensor, stream: str, high: int, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform int64 in [0, high), high < 2**24: seeds (B,) -> (B, *shape)."""
    return (uniform(seeds, stream, shape) * high).to(torch.int64).clamp(max=high - 1)


def permutation(seed: int, epoch: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The epoch's order of `count` samples: the argsort of hash(seed, epoch, index), (count,) int64.

    The order's hash is salted so that it is independent of the per-sample seeds of the same epoch.
    """
    indices = torch.arange(count, dtype=torch.int64, device=device)
    return torch.argsort(mix(hash_seeds(seed, epoch, indices) + stream_key("order")), stable=True)


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) -> float32 in [0, 1]; floats pass through."""
    return images.to(torch.float32).div(255) if images.dtype == torch.uint8 else images


def chooses(*tensors: Tensor) -> bool:
    """Whether work may be spent only on the samples that need it.

    On a CPU that is where the time goes. Elsewhere it would make the host wait for the device to say how many they are;
    in a compiled step shapes must not depend on values, and inside vmap they cannot: there everything is computed for
    every sample and selected. Both ways give the same bits.
    """
    if torch.compiler.is_compiling():
        return False
    stand_ins = (t for t in tensors if type(t) is not Tensor or torch._C._functorch.is_batchedtensor(t))  # no values
    return next(stand_ins, None) is None and all(t.device.type == "cpu" for t in tensors)


def shift_and_mirror(images: Tensor, seeds: Tensor, stream: str, shift: int, mirror: bool) -> Tensor:
    """Translate by up to `shift` pixels (edge pixels repeat) and flip half of the samples.

    images (B, C, H, W) any dtype, seeds (B,) -> same shape and dtype, channels_last in memory.
    """
    if shift == 0 and not mirror:
        return images
    if device_views.fits(images, seeds):
        keys = stream_key(f"{stream}.shift"), stream_key(f"{stream}.mirror")
        return device_views.moved(images, seeds, *keys, shift, mirror)
    flip = uniform(seeds, f"{stream}.mirror") < 0.5 if mirror else None
    if shift:
        offset = integers(seeds, f"{stream}.shift", 2 * shift + 1, (2,)) - shift
    else:
        offset = torch.zeros(len(seeds), 2, dtype=torch.int64, device=seeds.device)
    return (_move_rows if chooses(images, seeds) else _move_pixels)(images, offset, flip, shift)


def _move_pixels(images: Tensor, offset: Tensor, flip: Tensor | None, shift: int) -> Tensor:
    """One gather of pixels: offset (B, 2) rows and columns, flip (B,) bool."""
    batch, _, height, width = images.shape
    rows = torch.arange(height, device=images.device).expand(batch, height)
    columns = torch.arange(width, device=images.device).expand(batch, width)
    if flip is not None:
        columns = torch.where(flip[:, None], width - 1 - columns, columns)
    rows = (rows + offset[:, :1]).clamp(0, height - 1)
    columns = (columns + offset[:, 1:]).clamp(0, width - 1)
    sample = torch.arange(batch, device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _move_rows(images: Tensor, offset: Tensor, flip: Tensor | None, shift: int) -> Tensor:
    """The same by whole rows: at 96 px 12 times as fast as a gather of pixels on one core.

    Every row of the result is one run of memory in the images with their columns padded; the mirrored ones are
    appended, mirrored.
    """
    batch, channels, height, width = images.shape
    wide = width + 2 * shift
    chosen = torch.empty(0, dtype=torch.int64) if flip is None else flip.nonzero()[:, 0]
    padded = images.new_empty(batch + len(chosen), height, wide, channels)
    pixels = images.permute(0, 2, 3, 1)
    padded[:batch, :, shift : shift + width] = pixels
    padded[:batch, :, :shift] = pixels[:, :, :1]
    padded[:batch, :, shift + width :] = pixels[:, :, -1:]
    padded[batch:] = padded[:batch].index_select(0, chosen).flip(2)
    source, left = torch.arange(batch), shift + offset[:, 1]
    source[chosen] = batch + torch.arange(len(chosen))
    left[chosen] = shift - offset[chosen, 1]
    rows = (torch.arange(height) + offset[:, :1]).clamp(0, height - 1)
    starts = (((source[:, None] * height + rows) * wide) + left[:, None]) * channels
    runs = padded.view(-1).unfold(0, width * channels, 1)  # every run of a row's length, wherever it starts
    moved = runs.index_select(0, starts.view(-1)).view(batch, height, width, channels)
    return moved.permute(0, 3, 1, 2)
