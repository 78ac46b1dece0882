"""Encoders from other people's model collections: whatever yields a feature map, cut before its global pooling."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from harness.contracts import DatasetInfo, HarnessError
from harness.conv_encoder import ConvEncoder
from harness.encoders import ResNetEncoder, with_channels


class OutsideEncoder(ConvEncoder):
    """A module from (B, C, H, W) floats to a map, as one stage called `features`; its receptive field is not known."""

    def __init__(self, name: str, features: nn.Module, info: DatasetInfo) -> None:
        super().__init__(name, info)
        self.features = features

    def stages(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        return {"features": self.features}


class _OnlyEntry(nn.Module):
    """Unwrap the one-entry dict that a torchvision feature extractor returns."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, images: Tensor) -> Tensor:
        return next(iter(self.graph(images).values()))


def from_torchvision(short: str, info: DatasetInfo) -> ConvEncoder:
    """`torchvision:NAME`, untrained. Raises HarnessError for an unknown name and for models without a feature map."""
    from torchvision import models

    known = models.list_models(module=models)
    if short not in known:
        near = difflib.get_close_matches(short, known, n=3) or known[:3]
        raise HarnessError(f"torchvision has no classification model {short!r}; near: {', '.join(near)}")
    if short.startswith("vit_"):
        raise HarnessError(
            f"torchvision:{short} is refused: a vision transformer makes tokens, and what is read from it "
            "(its class token) is not part of a feature map"
        )
    options: dict[str, object] = {}
    if short in ("googlenet", "inception_v3"):
        options = {"init_weights": True, "aux_logits": False}
    if short.startswith("maxvit"):
        options = {"input_size": info.image_size}
    try:
        model = models.get_model(short, weights=None, **options)
    except ValueError as error:
        size = " x ".join(map(str, info.image_size))
        raise HarnessError(
            f"torchvision:{short} does not fit {size} px images: {str(error).splitlines()[0]}"
        ) from error
    if isinstance(model, models.ResNet):
        return ResNetEncoder(f"torchvision:{short}", model, info)
    return OutsideEncoder(f"torchvision:{short}", _before_pooling(model, info.channels), info)


def _before_pooling(model: nn.Module, channels: int) -> nn.Module:
    """Cut `model` where its last global average pooling begins; its first convolution takes `channels`."""
    from torchvision.models import SqueezeNet
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    first = next(key for key, child in model.named_modules() if isinstance(child, nn.Conv2d))
    if channels != 3:
        parent, _, key = first.rpartition(".")
        conv = model.get_submodule(first)
        assert isinstance(conv, nn.Conv2d)
        setattr(model.get_submodule(parent), key, with_channels(conv, channels))
        if hasattr(model, "transform_input"):
            setattr(model, "transform_input", False)  # noqa: B010  (its three-channel rescaling)
    if isinstance(model, SqueezeNet):  # pools only after the class scores
        return model.get_submodule("features")
    pools = {key for key, child in model.named_modules() if isinstance(child, nn.AdaptiveAvgPool2d)}
    nodes = get_graph_node_names(model)[1]
    last = max(
        place for place, node in enumerate(nodes) if node in pools or node in ("mean", "adaptive_avg_pool2d")
    )  # fmt: skip
    return _OnlyEntry(create_feature_extractor(model, [nodes[last - 1]]))


def from_timm(short: str, info: DatasetInfo) -> ConvEncoder:
    """`timm:NAME`, untrained, where the extra is installed and `forward_features` gives a (B, C, H, W) map."""
    try:
        import timm
    except ImportError as error:
        raise HarnessError(f"timm:{short} needs timm; install it with: pip install 'harness[timm]'") from error

    if not timm.is_model(short):
        near = difflib.get_close_matches(short, timm.list_models(), n=3)
        raise HarnessError(f"timm has no model {short!r}" + (f"; near: {', '.join(near)}" if near else ""))
    model = timm.create_model(short, pretrained=False, in_chans=info.channels, num_classes=0)
    encoder = OutsideEncoder(f"timm:{short}", _Features(model), info).fit()
    if encoder.map_shape[0] != model.num_features:
        raise HarnessError(
            f"timm:{short} is refused: its features have shape {encoder.map_shape}, not "
            f"({model.num_features}, rows, columns)"
        )
    return encoder


class _Features(nn.Module):
    """A timm model's features before pooling."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)  # type: ignore[operator]
