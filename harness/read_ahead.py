"""Batches out of host memory or a mapped file, fetched by threads while the device works on the ones before.

Threads, not processes: gathering rows runs outside of Python's lock, and two threads outran two processes at both
sizes measured (docs/decisions/008).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

AHEAD = 2  # batches on their way while one is in use: one being gathered, one being copied


def read_ahead(
    images: Tensor, index_batches: Iterable[Tensor], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """(indices, images[indices]) on `device` for each batch of indices, the next AHEAD ones under way.

    images: (N, C, H, W) uint8 on the CPU, channels_last; index_batches: (B,) int64 each, on the CPU
    On CUDA rows are gathered into pinned buffers and copied on a stream of their own; the consumer's stream waits for
    the copy, the host only for the gathering. Raises IndexError for an index outside of the images.
    """
    pixels = images.permute(0, 2, 3, 1).numpy()
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    slots = [_Slot(pixels, device, side) for _ in range(AHEAD + 1)]
    waiting: deque[tuple[_Slot, Future[tuple[Tensor, Tensor]]]] = deque()
    pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="read-ahead")
    try:
        for number, indices in enumerate(index_batches):
            slot = slots[number % len(slots)]
            waiting.append((slot, pool.submit(slot.fetch, indices)))
            if len(waiting) > AHEAD:
                slot, future = waiting.popleft()
                yield slot.handed_over(future.result())
        while waiting:
            slot, future = waiting.popleft()
            yield slot.handed_over(future.result())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Slot:
    """One buffer. It is filled again three batches later at the earliest, and only when its copy is complete."""

    def __init__(self, pixels: np.ndarray, device: torch.device, side: torch.cuda.Stream | None) -> None:
        self.pixels, self.device, self.side = pixels, device, side
        self.buffer = self.places = torch.empty(0)
        self.copied = torch.cuda.Event() if side is not None else None

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(indices, rows) on the device, or on their way to it."""
        if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= len(self.pixels)):
            raise IndexError(f"an index is outside of the {len(self.pixels)} images")
        if self.side is None or self.copied is None:
            rows = torch.from_numpy(np.take(self.pixels, indices.numpy(), axis=0))
            return indices.to(self.device), rows.permute(0, 3, 1, 2).to(self.device)
        self.copied.synchronize()  # this thread waits, nobody else
        count = len(indices)
        with torch.cuda.stream(self.side):  # and its device: a new thread begins on the first one
            if count > len(self.buffer):
                self.buffer = torch.empty((count, *self.pixels.shape[1:]), dtype=torch.uint8, pin_memory=True)
                self.places = torch.empty(count, dtype=torch.int64, pin_memory=True)
            # clip: with `raise` numpy would gather into a copy first; the range was checked above
            np.take(self.pixels, indices.numpy(), axis=0, out=self.buffer[:count].numpy(), mode="clip")
            self.places[:count].copy_(indices)
            places = self.places[:count].to(self.device, non_blocking=True)
            rows = self.buffer[:count].to(self.device, non_blocking=True)
            self.copied.record(self.side)
        return places, rows.permute(0, 3, 1, 2)

    def handed_over(self, fetched: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Make the consumer's stream wait for the copy, and keep the memory from reuse until that stream is done."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self.copied)
            for tensor in fetched:
                tensor.record_stream(stream)
        return fetched
