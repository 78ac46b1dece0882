"""The networks that are kept: the paper's, small-image and standard ResNets, a ViT, any torchvision or timm model.

The paper's nets (Hoffer, Hubara & Ailon, 2016) are RECONSTRUCTIONS, since the appendix table is not readable in the
copies at hand: `paper_cifar10` follows an independent replication that says it uses the paper's network
(dlacombejr/SpatialContrastingNetwork); `paper_stl10` (Network-in-Network style) and `paper_mnist` fill the gaps by
choice. Ours too: LeakyReLU's slope 0.1, 3/2 poolings padded by 1 so that 96 px give 24 x 24 cells, no bias before a
normalisation, torch's default weights. Every encoder ends at the map the criterion is put on; what followed it in the
published net is `classifier(num_classes)`. Groups of GroupNorm have 16 channels (Wu & He, 2018, table 3).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.batch_norm import BatchNorm2d, InOrder, in_order
from harness.contracts import Batch, Config, DatasetInfo, Encoder, HarnessError, setting
from harness.conv_encoder import ConvEncoder
from harness.encoder_names import ABOUT
from harness.max_pool import MaxPool2d
from harness.receptive_field import output_side, windowed
from harness.vit import REVISION, SIZES, ViTEncoder


class EncoderConfig(Config):
    """Which network, and two options of the small nets."""

    name: str = setting("convnet_small", "one of `harness list encoders`, torchvision:NAME or timm:NAME")
    norm: Literal["batch", "group"] = setting("batch", "normalisation of the small nets", source="Wu & He, 2018")
    padding: Literal["zeros", "reflect"] = setting("zeros", "padding of the small nets; zeros leak a cell's position")


# -------------------------------------------------------------------------------------------------- sequential nets


@dataclass(frozen=True)
class Conv:
    """conv (stride 1), [2 x 2 max pooling], normalisation, activation: one stage."""

    channels: int
    side: int
    same: bool = True
    pool: bool = False


@dataclass(frozen=True)
class Pool:
    """Max pooling by 2, with windows of 2, or of 3 padded by 1."""

    side: int


Layer = Conv | Pool | nn.Dropout

NETS: dict[str, tuple[Layer, ...]] = {
    "convnet_small": (Conv(16, 5, same=False, pool=True), Conv(32, 3), Conv(32, 3, pool=True), Conv(64, 3)),
    "paper_cifar10": (*(Conv(96, 3),) * 3, Pool(2), *(Conv(192, 3),) * 3, Pool(2)),
    "paper_mnist": (Conv(32, 5), Pool(2), Conv(64, 3), Conv(64, 3), Pool(2), Conv(128, 3)),
    "paper_stl10": (
        *(Conv(64, 5), Conv(160, 1), Conv(96, 1), Pool(3)),
        *(Conv(192, 5), Conv(192, 1), Conv(192, 1), Pool(3)),
        *(Conv(192, 3), Conv(192, 1), Conv(192, 1)),
    ),
}
# What follows the map in the published net; then a linear layer, or a 1 x 1 convolution and its mean over the map.
TAILS: dict[str, tuple[tuple[Layer, ...], Literal["mean of scores", "linear"]]] = {
    "paper_cifar10": ((Conv(192, 3), Conv(192, 1)), "mean of scores"),
    "paper_mnist": ((), "mean of scores"),
    "paper_stl10": ((Conv(256, 3), Pool(3), nn.Dropout(0.5), Conv(128, 3), nn.Dropout(0.5)), "linear"),
}


class SequentialEncoder(ConvEncoder):
    """One of NETS: stages `conv1`, `conv2`, ... and `pool1`, ... where pooling stands by itself."""

    def __init__(self, config: EncoderConfig, info: DatasetInfo) -> None:
        super().__init__(config.name, info)
        self.options = config
        self.body = nn.ModuleDict()
        channels = info.channels
        for layer in NETS[config.name]:
            kind = "pool" if isinstance(layer, Pool) else "conv"
            number = 1 + sum(name.startswith(kind) for name in self.body)
            self.body[f"{kind}{number}"] = self._stage(layer, channels)
            channels = getattr(layer, "channels", channels)

    def _stage(self, layer: Layer, channels: int) -> nn.Module:
        if isinstance(layer, nn.Dropout):
            return nn.Dropout(layer.p)
        if isinstance(layer, Pool):
            return MaxPool2d(layer.side, stride=2, padding=layer.side // 2 if layer.side % 2 else 0)
        padding = layer.side // 2 if layer.same else 0
        mode = self.options.padding
        parts: list[nn.Module] = [
            nn.Conv2d(channels, layer.channels, layer.side, padding=padding, padding_mode=mode, bias=False)
        ]
        if layer.pool:
            parts.append(MaxPool2d(2))
        if self.options.norm == "batch":
            parts.append(BatchNorm2d(layer.channels))
        else:
            parts.append(nn.GroupNorm(max(1, layer.channels // 16), layer.channels))
        parts.append(nn.LeakyReLU(0.1) if self.name == "paper_cifar10" else nn.ReLU())
        return InOrder(*parts)

    def stages(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        return dict(self.body.items())

    def main_path(self, stage: str) -> list[nn.Module]:
        return windowed([self.body[stage]])

    def classifier(self, num_classes: int) -> nn.Module:
        if self.name not in TAILS:
            return super().classifier(num_classes)
        channels, rows, columns = self.map_shape
        layers, ending = TAILS[self.name]
        parts: list[nn.Module] = []
        for layer in layers:
            parts.append(self._stage(layer, channels))
            channels = getattr(layer, "channels", channels)
        if ending == "mean of scores":
            return nn.Sequential(*parts, nn.Conv2d(channels, num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        path = windowed(parts)
        cells = output_side(path, rows) * output_side(path, columns)
        return nn.Sequential(*parts, nn.Flatten(), nn.Linear(channels * cells, num_classes))


# ----------------------------------------------------------------------------------------------------------- ResNets


class ResNetEncoder(ConvEncoder):
    """A torchvision ResNet without its last two layers; its tensors keep torchvision's names.

    small: 3 x 3 stem of stride 1 and no pooling, for images of 28 to 64 px (He et al., 2016, section 4.2)
    """

    def __init__(self, name: str, model: Any, info: DatasetInfo, small: bool = False) -> None:
        super().__init__(name, info)
        if small:
            model.conv1 = nn.Conv2d(info.channels, 64, 3, padding=1, bias=False)
            model.maxpool = nn.Identity()
        elif info.channels != 3:
            model.conv1 = with_channels(model.conv1, info.channels)
        if small or info.channels != 3:
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # torchvision's own rule
        for child in (*_STEM, *_BLOCKS):
            self.add_module(child, getattr(model, child))

    def _stem(self, images: Tensor) -> Tensor:
        return in_order([self.get_submodule(child) for child in _STEM], images)

    def stages(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        return {"stem": self._stem, **{name: self.get_submodule(name) for name in _BLOCKS}}

    def main_path(self, stage: str) -> list[nn.Module]:
        if stage == "stem":
            return windowed([self.get_submodule("conv1"), self.get_submodule("maxpool")])
        blocks = self.get_submodule(stage).children()
        return windowed(child for block in blocks for name, child in block.named_children() if name.startswith("conv"))


_STEM = ("conv1", "bn1", "relu", "maxpool")
_BLOCKS = ("layer1", "layer2", "layer3", "layer4")


def with_channels(conv: nn.Conv2d, channels: int) -> nn.Conv2d:
    """The same convolution, new, for another number of input channels."""
    side, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    assert isinstance(padding, int)
    return nn.Conv2d(channels, conv.out_channels, side, stride, padding, bias=conv.bias is not None)


# ------------------------------------------------------------------------------------------------------------- by name

RESNETS = ("resnet18_small", "resnet18", "resnet50")
OWN_NAMES = (*NETS, *RESNETS, *SIZES)
# ResNets, 1: convolutions over small maps are products on some CPUs (harness/small_maps.py)
REVISIONS = dict.fromkeys(RESNETS, 1) | dict.fromkeys(SIZES, REVISION)


def multiply_adds(encoder: Encoder, info: DatasetInfo) -> int:
    """Multiply-adds of convolutions and linear layers in one forward pass of one image."""
    counts: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        channels = output.shape[-1 if isinstance(module, nn.Linear) else 1]
        counts.append(weight.numel() * output[0].numel() // channels)

    layers = [module for module in encoder.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    was_training = encoder.training
    with torch.no_grad():
        encoder.eval()(torch.zeros(1, info.channels, *info.image_size))
    encoder.train(was_training)
    for handle in handles:
        handle.remove()
    return sum(counts)


def about(name: str) -> str:
    """One line on an encoder of `names` or on a prefix."""
    return ABOUT[name]


def names() -> tuple[str, ...]:
    """Encoders that need no prefix; besides these there are `torchvision:NAME` and `timm:NAME`."""
    return OWN_NAMES


def revision(name: str) -> int | None:
    """Of the arithmetic of a network, where that has changed since NUMBERS_VERSION was last bumped: only runs that use it
    become other runs."""
    return REVISIONS.get(name)


def same_kind(name: str, other: str) -> bool:
    """Whether both are sizes of one architecture, the ViT: what trains one of them can train the other."""
    return name in SIZES and other in SIZES


def build(config: EncoderConfig | str, info: DatasetInfo) -> Encoder:
    """Make an encoder for images of `info`'s size and channels, with fresh weights from torch's global generator.

    Raises HarnessError, with the numbers, for an unknown name, an option of another net, or images that do not fit.
    """
    config = EncoderConfig(name=config) if isinstance(config, str) else config
    name = config.name
    if name in NETS:
        return SequentialEncoder(config, info).fit()
    if (config.norm, config.padding) != ("batch", "zeros"):
        raise HarnessError(f"encoder {name}: encoder.norm and encoder.padding are options of {', '.join(NETS)} only")
    if name in SIZES:
        return ViTEncoder(name, info).fit()
    if name in OWN_NAMES:
        from harness import resnet

        small = name == "resnet18_small"
        model = resnet.make("resnet18" if small else name)
        return ResNetEncoder(name, model, info, small).fit()
    prefix, _, rest = name.partition(":")
    if rest and prefix in ("torchvision", "timm"):
        from harness import outside_encoders

        make = outside_encoders.from_torchvision if prefix == "torchvision" else outside_encoders.from_timm
        return make(rest, info).fit()
    near = difflib.get_close_matches(name, OWN_NAMES, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(OWN_NAMES)}"
    raise HarnessError(f"unknown encoder {name!r}: {hint} (also torchvision:NAME and timm:NAME)")


def set_batch_norm_statistics(encoder: nn.Module, batches: Iterable[Batch]) -> None:
    """Replace the running statistics of every batch norm by their mean over `batches`; weights stay as they are.

    The honest form of an untrained encoder: with the initial statistics (0, 1) its features would be badly scaled.
    """
    norms = [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    modes = {module: module.training for module in encoder.modules()}
    momenta = [norm.momentum for norm in norms]
    encoder.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # cumulative average: every batch counts the same
    with torch.no_grad():
        for batch in batches:
            if len(batch) > 1:
                encoder(batch.images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, mode in modes.items():
        module.training = mode
