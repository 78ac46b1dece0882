"""A first convolution by blocks of pixels against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from harness import resnet
from harness.stem import Stem, by_blocks, fits, is_stem


def stem(outputs: int = 5) -> nn.Conv2d:
    return nn.Conv2d(3, outputs, 7, stride=2, padding=3, bias=False)


@pytest.mark.parametrize("size", [(2, 2), (8, 14), (96, 96)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_values_and_gradients(size: tuple[int, int], layout: torch.memory_format) -> None:
    images = torch.randn(3, 3, *size, dtype=torch.float64).contiguous(memory_format=layout)
    conv = stem().double()
    expected = conv(images)
    found = by_blocks(images, conv.weight, torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(out, conv.weight, gradient)[0] for out in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_which_convolutions_are_stems() -> None:
    assert is_stem(stem())
    for other in (nn.Conv2d(3, 5, 7, stride=2, padding=3), nn.Conv2d(1, 5, 7, stride=2, padding=3, bias=False),
                  nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.Conv2d(3, 5, 7, padding=3, bias=False)):  # fmt: skip
        assert not is_stem(other)
    assert [name for name, module in resnet.make("resnet18").named_modules() if isinstance(module, Stem)] == ["conv1"]


def test_a_cpu_has_torchs() -> None:
    conv = stem()
    conv.__class__ = Stem
    images = torch.randn(2, 3, 8, 8)
    assert not fits(conv, images)
    torch.testing.assert_close(conv(images), nn.functional.conv2d(images, conv.weight, None, 2, 3), rtol=0, atol=0)


def test_where_it_fits_blocks_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = stem()
    conv.__class__ = Stem
    images = torch.randn(2, 3, 8, 8)
    monkeypatch.setattr("harness.stem.fits", lambda *_: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv(images), by_blocks(images, conv.weight, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(8, 14), (96, 96), (33, 32)])
def test_on_cuda(size: tuple[int, int]) -> None:
    """Within bf16 of float64; a gradient for the images, or an odd side, is torch's."""
    conv = stem(64).cuda().to(memory_format=torch.channels_last)
    conv.__class__ = Stem
    images = torch.randn(16, 3, *size, device="cuda").contiguous(memory_format=torch.channels_last)

    def passed(images: Tensor) -> tuple[Tensor, Tensor]:
        out = conv(images)
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
        return out, torch.autograd.grad(out, conv.weight, gradient)[0]

    with torch.autocast("cuda", torch.bfloat16):
        assert fits(conv, images) == (size[0] % 2 == 0) and not fits(conv, images.clone().requires_grad_())
        found = passed(images)
        if fits(conv, images):
            assert torch.equal(found[0], by_blocks(images, conv.weight, torch.bfloat16))
            assert not fits(conv, images.double())
    assert found[0].dtype == torch.bfloat16 and found[0].is_contiguous(memory_format=torch.channels_last)
    conv.double()
    for one, other in zip(found, passed(images.double()), strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 1e-2
