"""The network as it was initialised, batch-norm statistics set on unlabelled data: where every gain starts.

An encoder whose running statistics were left at (0, 1) would be a straw man, and a trained one has seen the data's.
"""

from __future__ import annotations

from itertools import islice

from torch import Tensor

from harness.contracts import Batch, Method, PretrainingData
from harness.encoders import set_batch_norm_statistics

NUM_BATCHES = 64


class RandomInit(Method):
    """Random initialisation"""

    role = "control"
    trains = False
    family = "control"
    year = 2016
    source = "the untrained encoder of the same seed"

    def prepare(self, data: PretrainingData) -> None:
        set_batch_norm_statistics(self.encoder, islice(data.batches(), NUM_BATCHES))

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError("random_init is never trained")
