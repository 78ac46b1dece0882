"""Encoders: the contract over every name, geometry against measurement, exact torchvision names, clear refusals."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from harness import encoders
from harness.contracts import Batch, DatasetInfo, HarnessError, ReceptiveField
from harness.encoders import EncoderConfig, build, set_batch_norm_statistics

INFO = DatasetInfo(
    name="toy", title="Toy", classes=tuple("abcdefg"), image_size=(28, 28), channels=1, mean=(0.3,), std=(0.2,),
    counts={"train": 8}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train",
    mirror_keeps_label=False,
)  # fmt: skip


def info_of(size: int | tuple[int, int], channels: int = 1) -> DatasetInfo:
    sides = (size, size) if isinstance(size, int) else size
    return dataclasses.replace(
        INFO, image_size=sides, channels=channels, mean=(0.3,) * channels, std=(0.2,) * channels
    )  # fmt: skip


def images_of(info: DatasetInfo, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, info.channels, *info.image_size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).contiguous(
        memory_format=torch.channels_last
    )


MAPS = {
    ("convnet_small", 28): (64, 6, 6),
    ("convnet_small", 32): (64, 7, 7),
    ("paper_mnist", 28): (128, 7, 7),
    ("paper_cifar10", 32): (192, 8, 8),
    ("paper_stl10", 48): (192, 12, 12),
    ("resnet18_small", 28): (512, 4, 4),
    ("resnet18", 32): (512, 1, 1),
    ("resnet50", 40): (2048, 2, 2),
    ("vit_tiny", 28): (128, 7, 7),
    ("vit_small", 28): (384, 7, 7),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "size"), MAPS)
def test_contract(name: str, size: int, channels: int) -> None:
    info = info_of(size, channels)
    encoder = build(name, info).eval()
    images = images_of(info)
    with torch.no_grad():
        feature_map = encoder(images)
        assert encoder.map_shape == MAPS[name, size] == tuple(feature_map.shape[1:])
        assert encoder.name == name
        torch.testing.assert_close(encoder(images.float() / 255), feature_map)
        maps = encoder.forward_layers(images, encoder.layers)
        torch.testing.assert_close(maps[-1], feature_map)
        torch.testing.assert_close(encoder.forward_to(images, encoder.layers[0]), maps[0])
        features, side = MAPS[name, size][:2]
        assert encoder.read(feature_map, "gap").shape == encoder.pool(feature_map).shape == (2, features)
        assert encoder.read(feature_map, "spatial").shape == (2, features * min(3, side) ** 2)
        assert encoder.classifier(7)(feature_map).shape == (2, 7)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(encoder(images)).all()
    assert (encoder.receptive_field() is None) == name.startswith("vit")
    assert encoder.receptive_field(encoder.layers[-1]) == encoder.receptive_field()


def test_every_name_is_covered() -> None:
    assert {name for name, _ in MAPS} == set(encoders.names())


def test_sizes_that_are_not_square() -> None:
    encoder = build("paper_mnist", info_of((20, 36), 3))
    assert encoder.map_shape == (128, 5, 9)
    assert tuple(encoder(images_of(info_of((20, 36), 3))).shape) == (2, 128, 5, 9)


def test_same_seed_same_weights() -> None:
    first, second = [], []
    for into in (first, second):
        torch.manual_seed(3)
        into += [tensor.clone() for tensor in build("convnet_small", INFO).state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_channels_last_is_kept() -> None:
    feature_map = build("paper_mnist", INFO).to(memory_format=torch.channels_last)(images_of(INFO))
    assert feature_map.is_contiguous(memory_format=torch.channels_last)


def test_options_of_small_nets() -> None:
    config = EncoderConfig(name="paper_cifar10", norm="group", padding="reflect")
    encoder = build(config, info_of(32, 3))
    kinds = {type(module) for module in encoder.modules()}
    assert nn.GroupNorm in kinds and nn.BatchNorm2d not in kinds
    assert {module.padding_mode for module in encoder.modules() if isinstance(module, nn.Conv2d)} == {"reflect"}
    assert encoder(images_of(info_of(32, 3))).shape == (2, 192, 8, 8)
    for options in ({"norm": "group"}, {"padding": "reflect"}):
        with pytest.raises(HarnessError, match="options of convnet_small"):
            build(EncoderConfig(name="resnet18", **options), info_of(64, 3))


# -------------------------------------------------------------------------------------------------- receptive fields


def measured_field(encoder: nn.Module, info: DatasetInfo) -> tuple[int, int]:
    """Side of the input region with a gradient from one middle cell, and how far it moves to the next cell."""
    for module in encoder.modules():
        for key, child in list(module.named_children()):
            if isinstance(child, nn.MaxPool2d):  # its gradient shows one pixel of a window; a mean shows them all
                setattr(module, key, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
            elif isinstance(child, nn.ReLU | nn.LeakyReLU | nn.BatchNorm2d):
                setattr(module, key, nn.Identity())
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.abs_()
    rows = []
    for step in (0, 1):
        images = torch.ones(1, info.channels, *info.image_size, dtype=torch.float64, requires_grad=True)
        feature_map = encoder(images)
        middle = feature_map.shape[2] // 2
        feature_map[0, 0, middle + step, middle].backward()
        assert images.grad is not None
        rows.append(images.grad.abs().sum((0, 1, 3)).nonzero().flatten())
    return len(rows[0]), int(rows[1][0] - rows[0][0])


@pytest.mark.parametrize(
    ("name", "size"),
    [("convnet_small", 64), ("paper_mnist", 64), ("paper_cifar10", 64), ("paper_stl10", 64), ("resnet18_small", 160)],
)
def test_receptive_field_against_gradient_support(name: str, size: int) -> None:
    info = info_of(size)
    encoder = build(name, info).double().eval()
    field = encoder.receptive_field()
    assert field is not None
    assert measured_field(encoder, info) == (field.side, field.stride)


def test_known_receptive_fields() -> None:
    def field(name: str, layer: str | None = None) -> ReceptiveField | None:
        return build(name, info_of(64, 3)).receptive_field(layer)

    assert field("convnet_small") == field("paper_mnist") == ReceptiveField(24, 4)
    assert field("paper_cifar10") == ReceptiveField(22, 4)
    assert field("paper_stl10") == ReceptiveField(27, 4)
    assert field("resnet18") == ReceptiveField(435, 32)
    assert field("resnet50") == ReceptiveField(427, 32)
    assert field("convnet_small", "conv1") == ReceptiveField(6, 2)


# ---------------------------------------------------------------------------------------------------------- outsiders


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_tensors_keep_torchvisions_names(name: str) -> None:
    from torchvision import models

    encoder = build(name, info_of(64, 3)).eval()
    state = {key: value for key, value in encoder.state_dict().items() if key not in ("mean", "std")}
    model = models.get_model(name, weights=None).eval()
    fc = {f"fc.{key}": value for key, value in model.fc.state_dict().items()}
    model.load_state_dict(state | fc, strict=True)
    images = images_of(info_of(64, 3))
    with torch.no_grad():
        torch.testing.assert_close(model(encoder.normalise(images)), model.fc(encoder.pool(encoder(images))))


@pytest.mark.parametrize("short", ["resnet34", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_torchvision_models(short: str) -> None:
    info = info_of(64, 1)
    encoder = build(f"torchvision:{short}", info)
    feature_map = encoder(images_of(info))
    assert tuple(feature_map.shape[1:]) == encoder.map_shape
    assert (encoder.receptive_field() is None) == (short != "resnet34")
    copy.deepcopy(encoder)
    feature_map.square().mean().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_refusals_name_the_numbers() -> None:
    cases = {
        ("convnet_smal", 28): "did you mean convnet_small",
        ("nonsense", 28): "there are convnet_small",
        ("torchvision:resnet19", 28): "near: resnet18",
        ("torchvision:vit_b_16", 32): "vision transformer",
        ("convnet_small", 7): "7 x 7 px images: its map would be 0 x 0",
        ("paper_cifar10", 3): "3 x 3 px",
    }
    for (name, size), words in cases.items():
        with pytest.raises(HarnessError, match=words) as caught:
            build(name, info_of(size))
        assert "\n" not in str(caught.value)
    encoder = build("convnet_small", INFO)
    with pytest.raises(HarnessError, match="no layer 'conv9'; it has conv1"):
        encoder.forward_to(images_of(INFO), "conv9")
    with pytest.raises(HarnessError, match="no readout 'cls'; it has gap, spatial"):
        encoder.read(encoder(images_of(INFO)), "cls")


def test_timm() -> None:
    try:
        import timm  # noqa: F401
    except ImportError:
        with pytest.raises(HarnessError, match=r"pip install 'harness\[timm\]'"):
            build("timm:resnet18", info_of(64, 3))
    else:
        encoder = build("timm:resnet18", info_of(64, 3))
        assert tuple(encoder(images_of(info_of(64, 3))).shape[1:]) == encoder.map_shape


# ------------------------------------------------------------------------------------------------ batch-norm statistics


def test_batch_norm_statistics_are_the_mean_over_batches() -> None:
    encoder = build("convnet_small", INFO)
    images = images_of(INFO, 16)
    indices = torch.arange(8)
    batches = [Batch(part, None, indices, indices) for part in images.split(8)]
    before = {key: value.clone() for key, value in encoder.named_parameters()}
    set_batch_norm_statistics(encoder, batches)
    first_norm = next(module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d))
    body = encoder.get_submodule("body.conv1")
    with torch.no_grad():
        means = [body[1](body[0](encoder.normalise(part))).mean((0, 2, 3)) for part in images.split(8)]
    torch.testing.assert_close(first_norm.running_mean, torch.stack(means).mean(0))
    assert first_norm.momentum == 0.1 and encoder.training
    assert all(torch.equal(before[key], value) for key, value in encoder.named_parameters())
