"""Layer-sequential unit variance: an untrained network whose every layer passes on signals of variance 1.

Mishkin & Matas, "All you need is a good init", ICLR 2016 (arXiv 1511.06422), Algorithm 1. The weights start as orthonormal
matrices (Saxe, McClelland & Ganguli, 2014); then, layer after layer from the input on, those whose output on one batch of
images does not have variance 1 are divided by its standard deviation. It is random_init with a better start: what it gains
is conditioning, and nothing of the images but that batch's variances has gone into it.

Under a normalisation a layer's scale has no effect: on nets that normalise after every convolution, as the small nets and
the ResNets do, what is left of the method is the orthonormal start. Where Algorithm 1 is open: biases start at 0, as in the
authors' code, and the batch stays the same for all layers, so that one division is enough for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harness.contracts import Config, DatasetInfo, Encoder, HarnessError, PretrainingData, setting
from harness.methods.random_init import RandomInit

__all__ = ["LSUV", "orthonormalise", "scale_to_unit_variance"]


def _layers(module: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]


def orthonormalise(module: nn.Module) -> None:
    """Weights of every convolution and linear layer, as matrices (out, in), to orthonormal rows or columns; no biases."""
    for layer in _layers(module):
        nn.init.orthogonal_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def scale_to_unit_variance(module: nn.Module, images: Tensor, tolerance: float, attempts: int) -> None:
    """Divide each layer's weights until |variance of its output - 1| < tolerance, `attempts` times at most.

    The layers are met in the order of one forward pass of images (B, C, H, W): each passes on its scaled output. Raises
    HarnessError when an output is constant.
    """

    def scale(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(layer.weight, Tensor)
        for _ in range(attempts):
            variance = output.var()
            if (variance - 1).abs() < tolerance:
                break
            if not variance > 0:
                raise HarnessError(f"lsuv: a layer's output does not vary over {len(images):,} images; are they blank?")
            layer.weight.div_(variance.sqrt())
            forward: Callable[..., Tensor] = layer.forward
            output = forward(*inputs)
        return output

    handles = [layer.register_forward_hook(scale) for layer in _layers(module)]
    try:
        module(images)
    finally:
        for handle in handles:
            handle.remove()


class LSUV(RandomInit):
    """Layer-sequential unit variance"""

    role = None
    year = 2016
    idea = "orthonormal weights, scaled layer by layer until outputs have variance 1; no training"
    source = "Mishkin & Matas, ICLR 2016, arXiv 1511.06422"

    class Config(Config):
        tolerance: float = setting(
            0.1, "how far from 1 an output's variance may be", source="Tol_var of Algorithm 1", gt=0, lt=1
        )
        attempts: int = setting(10, "divisions of one layer's weights, at most", source="T_max of Algorithm 1", ge=1)
        num_images: int = setting(256, "images that variances are taken over, spread evenly", ge=2)

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        orthonormalise(encoder)

    def prepare(self, data: PretrainingData) -> None:
        images = torch.cat([batch.images for batch in data.batches(self.config.num_images)])
        modes = {module: module.training for module in self.encoder.modules()}
        self.encoder.eval()
        for module in self.encoder.modules():  # a normalisation between layers acts as it does in training
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
        scale_to_unit_variance(self.encoder, images, self.config.tolerance, self.config.attempts)
        for module, mode in modes.items():
            module.training = mode
        super().prepare(data)
