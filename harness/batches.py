"""Device-resident uint8 batches: an epoch is a permutation computed on the device; no loader, no workers, no PIL."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from harness.augment import hash_seeds, permutation
from harness.contracts import Batch


class Batches:
    """Images on `device` in the order of hash(seed, epoch, index); the last incomplete batch of an epoch is dropped.

    images: (N, C, H, W) uint8; labels: (N,) int64 or None; batch_size at most N
    Implements contracts.PretrainingData as well: labels never leave it unless they were given.
    """

    def __init__(
        self, images: Tensor, labels: Tensor | None, *, batch_size: int, seed: int, device: torch.device
    ) -> None:
        self.images = images.to(device).contiguous(memory_format=torch.channels_last)
        self.labels = None if labels is None else labels.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.steps_per_epoch = len(images) // batch_size
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    def gather(self, indices: Tensor, epoch: int) -> Batch:
        """The Batch of `indices` (B,) int64 with their seeds of `epoch`."""
        rows = self.images.permute(0, 2, 3, 1)[indices].permute(0, 3, 1, 2)  # NHWC underneath: one contiguous copy
        labels = None if self.labels is None else self.labels[indices]
        return Batch(rows, labels, indices, hash_seeds(self.seed, epoch, indices))

    def at(self, step: int) -> Batch:
        """The batch of global step `step` (0-based)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = permutation(self.seed, epoch, len(self), self.device), epoch
        start = position * self.batch_size
        return self.gather(self._order[start : start + self.batch_size], epoch)

    def batches(self, limit: int | None = None) -> Iterator[Batch]:
        """`limit` images spread evenly over the data (all if None), in index order.

        Spread, because files may be sorted by class; a last batch of one image is left out (batch norm).
        """
        count = len(self) if limit is None else min(limit, len(self))
        for start in range(0, count, self.batch_size):
            indices = torch.arange(start, min(start + self.batch_size, count), device=self.device)
            indices = indices * len(self) // count
            if len(indices) > 1 or count == 1:
                yield self.gather(indices, 0)

    @torch.no_grad()
    def embed(self, function: Callable[[Tensor], Tensor], limit: int | None = None) -> Tensor:
        """`function` of those batches' images, concatenated on the CPU."""
        return torch.cat([function(batch.images).cpu() for batch in self.batches(limit)])
