"""torchvision's ResNets with our batch norm, max pooling and convolutions; the same tensors and names."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.resnet import BasicBlock

from harness.batch_norm import BatchNorm2d, fits, in_order
from harness.max_pool import MaxPool2d
from harness.small_maps import Conv2d
from harness.stem import Stem, is_stem


class _BasicBlock(BasicBlock):
    """torchvision's block; normalisation, sum and activation are one operation where that `fits`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        out = self.conv2(in_order([self.conv1, self.bn1, self.relu], x))
        other = x if self.downsample is None else self.downsample(x)
        norm = cast(BatchNorm2d, self.bn2)
        if fits(norm, out) and out.dtype == other.dtype:
            return norm.activated(out, 0.0, other)
        out = norm(out)
        out += other
        return cast(Tensor, self.relu(out))


def make(name: str) -> Any:
    """torchvision's ResNet of that name with fresh weights."""
    model = get_model(name, weights=None, norm_layer=BatchNorm2d)
    for module in model.modules():
        if type(module) is BasicBlock:
            module.__class__ = _BasicBlock
        elif type(module) is nn.MaxPool2d:
            module.__class__ = MaxPool2d
        elif type(module) is nn.Conv2d:
            module.__class__ = Stem if is_stem(module) else Conv2d
    return model
