"""Images that are larger than memory: a file of pixels, mapped, so that every consumer sees an ordinary tensor.

The kernel's page cache is the memory: what is used stays, what is not is dropped, and nothing is ever swapped
(docs/decisions/008). Selections of such images stay out of memory as well.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from harness import durable
from harness.download import disk_full

MEMORY_SHARE = 0.5  # of what is available; the rest is for features, activations and the test split
CHUNK_BYTES = 64 * 1024 * 1024
ABANDONED_SECONDS = 86_400.0


def available_bytes() -> int:
    """Memory that can be had without swapping, within the limit of the control group this process runs in."""
    available = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        available = min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return available


def fits_in_memory(num_bytes: int) -> bool:
    """Whether data of this size should be held in memory rather than in a mapped file."""
    return num_bytes <= MEMORY_SHARE * available_bytes()


def reserve(path: Path, size: int) -> None:
    """Make a file of `size` bytes with all its blocks, so that a full disk shows now and not at a write to the mapping,
    which would kill the process. Raises HarnessError when there is no room."""
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except AttributeError:
            file.truncate(size)  # macOS has no such call
        except OSError as error:
            disk_full(path, size, error)


def open_pixels(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Map a file of uint8 (N, H, W, C), which must hold them all."""
    try:
        return torch.from_file(os.fspath(path), shared=True, size=math.prod(shape), dtype=torch.uint8).view(shape)
    except RuntimeError as error:  # how torch says that a file cannot be opened for reading and writing
        raise PermissionError(str(error).splitlines()[0]) from None


def room(shape: tuple[int, ...], folder: Path) -> Tensor:
    """Uninitialised uint8 (N, H, W, C): in memory if it fits, else in a file in `folder`.

    The file has lost its name already, so the system frees it however this process ends. Memory is taken page by page,
    as it is written. Raises HarnessError when the disk is full.
    """
    if fits_in_memory(math.prod(shape)):
        # not torch.empty, which fills its memory when deterministic algorithms are asked for
        return torch.from_numpy(np.empty(shape, dtype=np.uint8))
    folder.mkdir(parents=True, exist_ok=True)
    durable.sweep(folder, ABANDONED_SECONDS, time.time())
    path = folder / f"room.{uuid.uuid4().hex}{durable.TEMPORARY}"
    try:
        reserve(path, math.prod(shape))
        return open_pixels(path, shape)
    finally:
        path.unlink(missing_ok=True)


def is_mapped(images: Tensor) -> bool:
    """Whether the images lie in a mapped file."""
    return images.device.type == "cpu" and images.untyped_storage().filename is not None


def select(images: Tensor, rows: Tensor) -> Tensor:
    """images[rows], channels_last: no copy for all rows in order, a mapped one if mapped images would not fit.

    images: (N, C, H, W) uint8 on any device; rows: (n,) int64 -> (n, C, H, W)
    """
    if len(rows) == len(images) and torch.equal(rows.cpu(), torch.arange(len(images))):
        return images
    pixels = images.permute(0, 2, 3, 1)
    if not is_mapped(images):
        return pixels.index_select(0, rows.to(images.device)).permute(0, 3, 1, 2)
    return _written(pixels, len(rows), (pixels.index_select(0, part) for part in rows.split(_step(pixels))))


def join(parts: Sequence[Tensor]) -> Tensor:
    """The images of several splits as one: a view where they follow one another in memory, else a copy."""
    first, count = parts[0], sum(len(part) for part in parts)
    if all(_follows(a, b) for a, b in itertools.pairwise(parts)):
        return first.as_strided((count, *first.shape[1:]), first.stride())
    beside = next((part for part in parts if is_mapped(part)), None)
    if beside is None:
        return torch.cat(list(parts))
    pixels = [part.permute(0, 2, 3, 1) for part in parts]
    return _written(beside, count, (piece for part in pixels for piece in part.split(_step(part))))


def _follows(first: Tensor, second: Tensor) -> bool:
    """Whether `second` begins where `first` ends, in the same memory."""
    return bool(
        first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.shape[1:] == second.shape[1:]
        and first.stride() == second.stride()
        and second.storage_offset() == first.storage_offset() + len(first) * first.stride(0)
    )


def _step(pixels: Tensor) -> int:
    return max(1, CHUNK_BYTES // pixels[0].numel())


def _written(beside: Tensor, count: int, pieces: Iterator[Tensor]) -> Tensor:
    """Pieces of NHWC pixels put together, (N, C, H, W): in memory, or else in a file beside that of mapped images."""
    filename = beside.untyped_storage().filename
    assert filename is not None
    first = next(pieces)
    out = room((count, *first.shape[1:]), Path(filename).parent)
    start = 0
    for piece in itertools.chain([first], pieces):
        out[start : start + len(piece)] = piece
        start += len(piece)
    return out.permute(0, 3, 1, 2)
