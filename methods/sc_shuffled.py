"""Control of sc: a network trained by sc whose weights are then shuffled within each layer.

What is left of the training is how large the weights of a layer are and how they are distributed; what they detected is gone.
As far as this control is better than random_init, a gain of sc is owed to the conditioning of the network; only the rest
is structure that was learnt. Permuting within layers is a probe of Frankle, Schwab & Morcos, "The early phase of neural
network training", ICLR 2020 (arXiv 2002.10365), there applied to weights that are trained on, here to the final ones.

A layer's weights, its biases and the scales and offsets of its normalisation are each shuffled among themselves, since
they are different quantities. The batch-norm statistics belonged to the unshuffled network, so they are set anew on
unlabelled images as random_init's are; left as they were, they would be a straw man.
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import nn

from harness.augment import mix, permutation
from harness.contracts import PretrainingData
from harness.encoders import set_batch_norm_statistics
from harness.methods.sc import SpatialContrasting

__all__ = ["ShuffledSpatialContrasting", "shuffle_weights"]

NUM_BATCHES = 64  # random_init's; written here because a run's identity is made of its own method's files


@torch.no_grad()
def shuffle_weights(module: nn.Module, seed: int) -> None:
    """Put the entries of each parameter, in place, into an order of its own that `seed` decides."""
    for number, parameter in enumerate(module.parameters()):
        order = permutation(seed, number, parameter.numel(), parameter.device)
        parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))


class ShuffledSpatialContrasting(SpatialContrasting):
    """Spatial contrasting, weights shuffled"""

    tier = "ported"
    family = "control"
    idea = "sc's trained weights in another order within each layer: their sizes without what they detect"
    source = "sc; shuffling within layers: Frankle, Schwab & Morcos, ICLR 2020, arXiv 2002.10365"
    null_control = None

    def after_training(self, data: PretrainingData) -> None:
        seeds = next(iter(data.batches(2))).seeds  # the same before and after a kill
        shuffle_weights(self.encoder, int(mix(seeds[:1])) & 0x7FFF_FFFF)
        set_batch_norm_statistics(self.encoder, islice(data.batches(), NUM_BATCHES))
