"""torchvision's ResNets with the batch norm of harness.batch_norm; the same tensors, names and, on a CPU, arithmetic."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from torchvision.models import get_model
from torchvision.models.resnet import BasicBlock

from harness.batch_norm import BatchNorm2d, in_order


class _BasicBlock(BasicBlock):
    """torchvision's block; its first normalisation and the activation behind it may be one operation."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        out = self.bn2(self.conv2(in_order([self.conv1, self.bn1, self.relu], x)))
        out += x if self.downsample is None else self.downsample(x)
        return cast(Tensor, self.relu(out))


def make(name: str) -> Any:
    """torchvision's ResNet of that name with fresh weights."""
    model = get_model(name, weights=None, norm_layer=BatchNorm2d)
    for module in model.modules():
        if type(module) is BasicBlock:
            module.__class__ = _BasicBlock
    return model
