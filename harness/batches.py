"""uint8 batches in an order computed from (seed, epoch), wherever the images are; no loader, no PIL.

Three placements, the first that holds the images (docs/decisions/008): `resident` on the device, where an epoch is a
permutation and a batch one gather; `pinned`, in host memory, copied ahead through pinned buffers; `streamed`, in a
mapped file, read ahead by threads. A sample's order, seed and pixels are the same in all three.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Literal

import torch
from torch import Tensor

from harness.augment import hash_seeds, permutation
from harness.contracts import Batch
from harness.mapped import is_mapped
from harness.read_ahead import read_ahead

Placement = Literal["resident", "pinned", "streamed"]
# Of the device's free memory: weights, optimiser state and activations are not there yet when this is asked, and their
# size is not known; what is left in host memory costs little, because copies overlap with the step.
DEVICE_SHARE = 0.5


def choose_placement(images: Tensor, device: torch.device) -> Placement:
    """Where images (N, C, H, W) should lie for work on `device`."""
    if images.device.type != "cpu":
        return "resident"
    mapped = is_mapped(images)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps it for reuse
        if images.numel() <= DEVICE_SHARE * free:
            return "resident"
    return "streamed" if mapped else "pinned" if device.type == "cuda" else "resident"


def place(images: Tensor, device: torch.device) -> Tensor:
    """The images on `device` if they fit there, else as they are."""
    return images.to(device) if choose_placement(images, device) == "resident" else images


class Batches:
    """Images in the order of hash(seed, epoch, index); the last incomplete batch of an epoch is dropped.

    images: (N, C, H, W) uint8; labels: (N,) int64 or None; batch_size at most N; device: where batches are made
    placement: None chooses; on a CPU `pinned` means what `resident` does
    Implements contracts.PretrainingData as well: labels never leave it unless they were given.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        placement: Placement | None = None,
    ) -> None:
        self.placement: Placement = placement or choose_placement(images, device)
        if self.placement == "resident":
            images = images.to(device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = None if labels is None else labels.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.steps_per_epoch = len(images) // batch_size
        self._ahead = self.placement == "streamed" or self.images.device.type != device.type
        self._coming: Iterator[tuple[Tensor, Tensor]] = iter(())
        self._next = -1
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    def gather(self, indices: Tensor, epoch: int) -> Batch:
        """The Batch of `indices` (B,) int64 with their seeds of `epoch`."""
        return next(self._gathered(iter([indices]), epoch))

    def at(self, step: int) -> Batch:
        """The batch of global step `step` (0-based)."""
        if not self._ahead:
            return self.gather(self._indices(step), step // self.steps_per_epoch)
        if step != self._next:  # the first one, or a training that was resumed or has gone back
            self._coming = read_ahead(self.images, map(self._indices, _from(step)), self.device)
        self._next = step + 1
        return self._batch(*next(self._coming), step // self.steps_per_epoch)

    def batches(self, limit: int | None = None) -> Iterator[Batch]:
        """`limit` images spread evenly over the data (all if None), in index order.

        Spread, because files may be sorted by class; a last batch of one image is left out (batch norm).
        """
        return self._gathered(self._spread(len(self) if limit is None else min(limit, len(self))), 0)

    @torch.no_grad()
    def embed(self, function: Callable[[Tensor], Tensor], limit: int | None = None) -> Tensor:
        """`function` of those batches' images, concatenated on the CPU."""
        return torch.cat([function(batch.images).cpu() for batch in self.batches(limit)])

    def close(self) -> None:
        """Stop reading ahead; `at` may be called again."""
        coming, self._coming, self._next = self._coming, iter(()), -1
        if isinstance(coming, Generator):
            coming.close()

    # ---- indices, on the device that the images are on

    def _indices(self, step: int) -> Tensor:
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = permutation(self.seed, epoch, len(self), self.images.device), epoch
        start = position * self.batch_size
        return self._order[start : start + self.batch_size]

    def _spread(self, count: int) -> Iterator[Tensor]:
        for start in range(0, count, self.batch_size):
            indices = torch.arange(start, min(start + self.batch_size, count), device=self.images.device)
            if len(indices) > 1 or count == 1:
                yield indices * len(self) // count

    # ---- rows

    def _gathered(self, index_batches: Iterator[Tensor], epoch: int) -> Iterator[Batch]:
        if self._ahead:
            on_host = (indices.cpu() for indices in index_batches)
            for indices, rows in read_ahead(self.images, on_host, self.device):
                yield self._batch(indices, rows, epoch)
            return
        pixels = self.images.permute(0, 2, 3, 1)
        for indices in index_batches:
            # NHWC underneath: one contiguous copy; 7 times as fast as pixels[indices] (96 x 96, one core)
            yield self._batch(indices, pixels.index_select(0, indices).permute(0, 3, 1, 2), epoch)

    def _batch(self, indices: Tensor, images: Tensor, epoch: int) -> Batch:
        labels = None if self.labels is None else self.labels[indices]
        return Batch(images, labels, indices, hash_seeds(self.seed, epoch, indices))


class MixedBatches(Batches):
    """Batches of unlabelled images with some labelled ones spread evenly among them.

    images: (N, C, H, W) uint8, without labels; labelled: (n, C, H, W) with labels (n,) int64; batch_size: at least 2,
        `num_labelled(batch_size, n)` of them labelled
    Labels of the unlabelled are -1; the labelled have the indices N to N + n - 1, so that no two images share a seed.
    Each kind has its own order: an epoch is a pass over the unlabelled, and the labelled come round as often as they
    must. All else (`len`, `batches`, `embed`) speaks of the unlabelled.
    """

    def __init__(
        self, images: Tensor, labelled: Tensor, labels: Tensor, *, batch_size: int, seed: int, device: torch.device
    ) -> None:
        count = num_labelled(batch_size, len(labelled))
        super().__init__(images, None, batch_size=batch_size - count, seed=seed, device=device)
        self.labelled = Batches(labelled, labels, batch_size=count, seed=seed, device=device)
        self._no_labels = torch.full((batch_size - count,), -1, device=device)
        # Spread, so that every part of a batch that is taken in parts (`accumulate`) has labelled images.
        chosen = torch.zeros(batch_size, dtype=torch.bool)
        chosen[torch.arange(count) * batch_size // count] = True
        before = chosen.cumsum(0)  # labelled images up to here, this one included
        places = torch.where(chosen, batch_size - count + before - 1, torch.arange(batch_size) - before)
        self._places = places.to(device)

    def at(self, step: int) -> Batch:
        one, other = super().at(step), self.labelled.at(step)
        assert other.labels is not None
        indices = other.indices + len(self)
        seeds = hash_seeds(self.seed, step // self.labelled.steps_per_epoch, indices)
        pairs = (
            (one.images, other.images), (self._no_labels, other.labels), (one.indices, indices), (one.seeds, seeds)
        )  # fmt: skip
        images, *rest = (torch.cat(pair).index_select(0, self._places) for pair in pairs)
        return Batch(images.contiguous(memory_format=torch.channels_last), *rest)

    def close(self) -> None:
        super().close()
        self.labelled.close()


def num_labelled(batch_size: int, available: int) -> int:
    """Labelled images in a mixed batch: half of it, or all there are, so that none is in a batch twice."""
    return min(batch_size // 2, available)


def _from(step: int) -> Iterator[int]:
    while True:
        yield step
        step += 1
