"""Convolutions over small maps as products: against float64, and left alone wherever they do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import small_maps
from harness.small_maps import Conv2d, fits

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products are right on every CPU, and worth it on some."""
    monkeypatch.setattr(small_maps, "has_matrix_units", lambda: True)


def layer(channels: int = 320, out: int = 320, side: int = 3, stride: int = 1, **words: Any) -> Conv2d:
    torch.manual_seed(0)
    words = {"padding": side // 2, "bias": False} | words
    return Conv2d(channels, out, side, stride, **words).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def maps(channels: int = 320, rows: int = 6, columns: int = 6, count: int = 3) -> Tensor:
    return torch.randn(count, channels, rows, columns).to(memory_format=torch.channels_last)


def passes(conv: nn.Conv2d, images: Tensor, slope: Tensor) -> list[Tensor]:
    """The map and the gradients of images, weights and bias, under autocast as a step has it."""
    with torch.autocast("cpu", BF16, enabled=slope.dtype is BF16):
        out = conv(images)
    return [out.detach(), *torch.autograd.grad(out, (images, *conv.parameters()), slope)]


@pytest.mark.parametrize(
    ("side", "stride", "rows", "columns", "words"),
    [
        (3, 1, 6, 6, {}), (3, 1, 3, 5, {}), (3, 2, 12, 11, {}), (3, 2, 7, 8, {}), (3, 1, 5, 5, {"padding": 0}),
        (1, 2, 12, 9, {"out": 640}), (1, 1, 4, 4, {"out": 640}), (3, 1, 6, 6, {"bias": True}), (2, 2, 6, 6, {"padding": 0}),
        (3, 1, 1, 1, {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("many", [False, True])
def test_values_and_gradients_are_those_of_a_convolution(
    monkeypatch: pytest.MonkeyPatch, side: int, stride: int, rows: int, columns: int, words: dict[str, Any], many: bool
) -> None:
    """Mean error against float64 on the same bf16 numbers: a rounding or two of bf16, 2^-9 of a value at most each."""
    if many:
        monkeypatch.setattr(small_maps, "MANY_WEIGHTS", 1)
    conv, images = layer(side=side, stride=stride, **words), maps(rows=rows, columns=columns).to(BF16)
    exact = nn.Conv2d(320, conv.out_channels, side, stride, conv.padding, bias=conv.bias is not None).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for mine, theirs in zip(exact.parameters(), conv.parameters(), strict=True):
            mine.copy_(theirs.to(BF16))
    with torch.autocast("cpu", BF16):
        assert fits(conv, images)
        slope = torch.randn_like(conv(images))
    found = passes(conv, images.clone().requires_grad_(), slope)
    expected = passes(exact, images.double().requires_grad_(), slope.double())
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert float((one.double() - other).abs().mean()) < 0.004 * float(other.abs().mean())


def test_it_is_used_and_is_as_close_as_torch_in_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of a ResNet in bf16: ours and torch's are as far from float32 as each other."""
    from harness import resnet

    torch.manual_seed(0)
    model = resnet.make("resnet18").to(memory_format=torch.channels_last)
    images = torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last)
    used: list[nn.Module] = []

    def gradients(least: int, enabled: bool = True) -> Tensor:
        monkeypatch.setattr(small_maps, "LEAST_WEIGHTS", least)
        with torch.autocast("cpu", BF16, enabled=enabled):
            loss = model(images).float().square().mean()
        return torch.cat([one.flatten() for one in torch.autograd.grad(loss, list(model.parameters()))])

    for module in model.modules():
        if isinstance(module, Conv2d):
            module.register_forward_pre_hook(lambda conv, inputs: used.append(conv) if fits(conv, inputs[0]) else None)
    least = small_maps.LEAST_WEIGHTS
    ours, count = gradients(least), len(used)
    torchs = gradients(10**9)
    assert count == len(used) == 9  # of the last two stages; layer3's 1 x 1 convolution has too few weights
    exact = gradients(least, enabled=False)
    off_ours, off_torchs = (float((one - exact).norm()) for one in (ours, torchs))
    assert off_ours < 1.2 * off_torchs


def test_elsewhere_a_convolution_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, images = layer(), maps()
    assert not fits(conv, images)  # float32
    with torch.autocast("cpu", BF16):
        assert fits(conv, images)
        with torch.no_grad():
            assert not fits(conv, images)
        assert not fits(conv, maps(rows=7))
        assert fits(layer(out=640), maps(rows=8, columns=8))  # more weights, more pixels
        assert not fits(layer(32, 32), maps(32))
        assert not fits(conv, images[0]) and not fits(conv, images[:0])
        assert not fits(layer(padding=0), maps(rows=2))  # the error of a kernel larger than the map is torch's
        for words in ({"groups": 2}, {"dilation": 2}, {"padding_mode": "reflect"}, {"padding": "same"}):
            assert not fits(layer(**words), images)
        assert not fits(Conv2d(320, 320, (1, 3)), images)
        conv.requires_grad_(False)
        assert not fits(conv, images)
        conv.requires_grad_()
        monkeypatch.setattr(small_maps, "has_matrix_units", lambda: False)
        assert not fits(conv, images)


def test_what_comes_out_may_be_changed_in_place() -> None:
    conv, images = layer(bias=True), maps().requires_grad_()
    with torch.autocast("cpu", BF16):
        out = conv(images)
        out += 1
        out.relu_().sum().backward()
    assert images.grad is not None and conv.weight.grad is not None


def test_inside_vmap_it_is_torchs() -> None:
    conv, images = layer(), maps()
    names = list(dict(conv.named_parameters()))
    stacked = {name: torch.stack([value, 2 * value]) for name, value in conv.named_parameters()}
    with torch.autocast("cpu", BF16):
        out = torch.vmap(
            lambda weights: torch.func.functional_call(conv, weights, (images,)), (dict.fromkeys(names, 0),)
        )(stacked)
    assert torch.allclose(out[1].float(), 2 * out[0].float(), rtol=0.02, atol=0.02)
    with torch.autocast("cpu", BF16):
        slopes = torch.func.grad(lambda weights: torch.func.functional_call(conv, weights, (images,)).sum())(
            dict(conv.named_parameters())
        )
    assert slopes.keys() == set(names)
