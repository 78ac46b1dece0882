"""harness.image_operations against torchvision's, formula by formula; both ways of choosing give the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from harness import image_operations as operations
from harness.augment import hash_seeds
from harness.views import crop_boxes


def smooth(count: int, side: int = 32, channels: int = 3) -> Tensor:
    """Colours that vary slowly, as in photographs."""
    coarse = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=side, mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize(("side", "size"), [(8, None), (32, None), (96, None), (32, 96), (96, 40)])
def test_resampling_is_torchvisions(side: int, size: int | None) -> None:
    images = torch.rand(48, 3, side, side, generator=torch.Generator().manual_seed(1))
    boxes = crop_boxes(hash_seeds(0, 0, torch.arange(48)), "resample", (side, side), (0.08, 1.0))
    flip = torch.arange(48) % 2 == 1
    expected = torch.stack(
        [
            reference.resized_crop(image, *(int(part[i]) for part in boxes), [size or side] * 2, antialias=False)
            for i, image in enumerate(images)
        ]
    )
    assert (operations.resize_boxes(images, boxes, size=size) - expected).abs().max() < 1e-4
    mirrored = torch.where(flip[:, None, None, None], expected.flip(3), expected)
    assert (operations.resize_boxes(images, boxes, flip, size) - mirrored).abs().max() < 1e-4


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_are_torchvisions_in_every_order(channels: int) -> None:
    images = smooth(96, channels=channels)
    images[:4] = images[:4, :1]  # greys, where hue is undefined
    images[4, :, :8], images[5] = 0.0, 1.0
    drawn = torch.rand(96, 4, generator=torch.Generator().manual_seed(2))
    factors, turn = 0.2 + 1.6 * drawn[:, :3], drawn[:, 3] - 0.5
    order = torch.rand(96, 4, generator=torch.Generator().manual_seed(3)).argsort(1)
    steps = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue)
    amounts = torch.cat((factors, turn[:, None]), 1)
    expected = []
    for i, image in enumerate(images):
        for kind in order[i].tolist():
            image = steps[kind](image, float(amounts[i, kind]))
        expected.append(image)
    assert (operations.adjust_colours(images, factors, turn, order) - torch.stack(expected)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", range(4))
def test_each_colour_operation_alone(kind: int) -> None:
    images = smooth(16)
    amount = torch.linspace(-0.5, 0.5, 16) if kind == 3 else torch.linspace(0, 2, 16)
    factors, turn = torch.ones(16, 3), torch.zeros(16)
    if kind == 3:
        turn = amount
    else:
        factors[:, kind] = amount
    step = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue)
    expected = torch.stack([step[kind](image, float(a)) for image, a in zip(images, amount, strict=True)])
    found = operations.adjust_colours(images, factors, turn, torch.arange(4).expand(16, 4))
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0, 2.0])
def test_blur_is_torchvisions(sigma: float) -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    expected = reference.gaussian_blur(images, [9, 9], [sigma, sigma])
    assert (operations.blur(images, torch.full((4,), sigma), 9) - expected).abs().max() < 1e-6


def test_hue_of_pure_colours_and_greys() -> None:
    """Sixths of the circle by hand: red, yellow, green, cyan, blue, magenta; a grey has no hue to turn."""
    wheel = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1.0]])
    images = wheel.T[None, :, None, :].expand(13, 3, 1, 6).contiguous()
    turned = operations.turn_hue(images, torch.arange(-6, 7) / 6)
    for i, steps in enumerate(range(-6, 7)):
        assert (turned[i, :, 0] - wheel.roll(-steps, 0).T).abs().max() < 1e-5
    greys = torch.linspace(0, 1, 7)[:, None, None, None].expand(7, 3, 2, 2)
    assert torch.equal(operations.turn_hue(greys, torch.linspace(-0.5, 0.5, 7)), greys)


def test_inverting_bright_pixels_is_torchvisions() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(6)) / 255
    for threshold in (0.0, 128 / 255, 1.0):
        assert torch.equal(operations.invert_bright(images, threshold), reference.solarize(images, threshold))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_change_some_changes_those(share: float) -> None:
    images, amounts = torch.rand(50, 2, 3, 3), torch.arange(50.0)
    chosen = torch.rand(50, generator=torch.Generator().manual_seed(7)) < share
    out = operations.change_some(images, chosen, lambda some, by: some + by[:, None, None, None], amounts)
    for i in range(50):
        assert torch.equal(out[i], images[i] + i if chosen[i] else images[i])


def test_colours_that_change_nothing_leave_every_bit() -> None:
    images = smooth(8)
    order = torch.arange(4).expand(8, 4)
    assert torch.equal(operations.adjust_colours(images, torch.ones(8, 3), torch.zeros(8), order), images)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_colours_are_the_same_bits_with_and_without_choosing(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images = smooth(120, side=9, channels=channels)
    drawn = torch.rand(120, 4, generator=torch.Generator().manual_seed(2))
    factors, turn = 0.2 + 1.6 * drawn[:, :3], drawn[:, 3] - 0.5
    factors[drawn[:, :3] < 0.2], turn[drawn[:, 3] < 0.2] = 1.0, 0.0  # some of the four change nothing
    order = torch.rand(120, 4, generator=torch.Generator().manual_seed(3)).argsort(1)
    before = images.clone()
    chosen = operations.adjust_colours(images, factors, turn, order)
    monkeypatch.setattr(operations, "chooses", lambda *_: False)
    assert torch.equal(chosen, operations.adjust_colours(images, factors, turn, order))
    assert torch.equal(images, before)
    assert (chosen != images).any()


def test_quarter_turns() -> None:
    images = torch.randint(0, 256, (9, 2, 5, 5), dtype=torch.uint8)
    turns = torch.tensor([3, 0, 1, 2, 2, 1, 0, 3, 1])
    turned = operations.quarter_turns(images, turns)
    for image, turn, out in zip(images, turns.tolist(), turned, strict=True):
        for _ in range(turn):
            image = image.mT.flip(1)
        assert torch.equal(out, image)


def test_cut_squares() -> None:
    images = torch.randint(0, 256, (5, 3, 10, 13), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(8)
    corners = torch.stack([torch.randint(high, (5, 6), generator=generator) for high in (10 - 4 + 1, 13 - 4 + 1)], 2)
    squares = operations.cut_squares(images, corners, 4)
    assert squares.shape == (5, 6, 3, 4, 4) and squares.dtype == torch.uint8
    for i in range(5):
        for p in range(6):
            top, left = corners[i, p].tolist()
            assert torch.equal(squares[i, p], images[i, :, top : top + 4, left : left + 4])
