"""Views made by our kernels against those of torch's operations; interpreted by test_interpreted_kernels.py, compiled on CUDA."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from harness import device_views
from harness.augment import hash_seeds, shift_and_mirror
from harness.contracts import DatasetInfo
from harness.views import ViewConfig, ViewMaker

# height, width, channels, side of the views, settings
CASES: list[tuple[int, int, int, int | None, dict[str, float]]] = [
    (21, 21, 3, None, {"blur": 0.5, "solarise": 0.3, "crop_scale": 0.08}),
    (20, 33, 3, 13, {"blur": 0.5, "solarise": 0.3}),
    (16, 12, 1, None, {"blur": 0.5, "solarise": 0.3}),
    (12, 40, 3, None, {"blur": 0.0, "crop_scale": 0.99}),  # no box of an allowed shape fits
    (40, 12, 3, None, {"blur": 0.0, "crop_scale": 0.99}),
    (30, 30, 3, None, {"jitter": 0.0, "grayscale": 0.0, "blur": 1.0}),
    (30, 30, 3, None, {"jitter": 1.0, "jitter_probability": 1.0, "blur": 0.0}),
]


def batch(count: int, height: int, width: int, channels: int, device: str) -> tuple[Tensor, Tensor]:
    """Smooth pictures, a grey, a black and a white one among them, and seeds."""
    coarse = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1).mul(255)
    images[0], images[1], images[2] = images[0, :1], 0, 255
    images = images.to(torch.uint8).contiguous(memory_format=torch.channels_last)
    return images.to(device), hash_seeds(7, 3, torch.arange(count)).to(device)


@contextlib.contextmanager
def used() -> Iterator[None]:
    with mock.patch.multiple(device_views, applicable=lambda *_: True, usable=lambda _: True):
        yield


def maker_of(height: int, width: int, channels: int, size: int | None, settings: dict[str, float]) -> ViewMaker:
    info = DatasetInfo(
        name="drawn", title="", classes=None, image_size=(height, width), channels=channels, mean=(0.5,) * channels,
        std=(0.25,) * channels, counts={}, licence="", citation="", default_encoder="", pretrain_split="",
        mirror_keeps_label=True,
    )  # fmt: skip
    return ViewMaker.of(ViewConfig(**settings), info, size=size)  # type: ignore[arg-type]


def check_strong(case: tuple[int, int, int, int | None, dict[str, float]], count: int, device: str) -> None:
    """To rounding, but for a box or a threshold that rounding decides otherwise: at most one image in a hundred."""
    height, width, channels, *_ = case
    images, seeds = batch(count, height, width, channels, device)
    maker = maker_of(*case)
    with mock.patch.object(device_views, "applicable", lambda *_: False):
        expected = maker(images, seeds, "one")
    layouts = (torch.channels_last, torch.contiguous_format) if case is CASES[0] else (torch.channels_last,)
    for layout in layouts:
        with used():
            found = maker(images.contiguous(memory_format=layout), seeds, "one")
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert found.min() >= 0 and found.max() <= 1
        different = (found - expected).abs().flatten(1).amax(1) > 5e-5
        assert different.double().mean() <= 0.01


def check_mild(count: int, device: str) -> None:
    for channels in (1, 3):
        images, seeds = batch(count, 19, 23, channels, device)
        for shift, mirror in ((3, True), (0, True), (4, False)):
            with mock.patch.object(device_views, "applicable", lambda *_: False):
                expected = shift_and_mirror(images, seeds, "mild", shift, mirror)
            with used():
                assert torch.equal(shift_and_mirror(images, seeds, "mild", shift, mirror), expected)


def check_all_interpreted() -> None:
    for case in CASES:
        check_strong(case, 10 if case is CASES[0] else 5, "cpu")
    check_mild(4, "cpu")


def test_a_cpu_has_torchs() -> None:
    assert not device_views.fits(*batch(4, 12, 12, 3, "cpu"))


def test_where_a_kernel_cannot_be_started_it_is_said_once() -> None:
    nowhere = torch.device("cpu")  # Triton compiles nothing for it
    device_views.usable.cache_clear()
    with pytest.warns(UserWarning, match="kernels for views cannot be used on cpu .*; torch's own kernels are"):
        assert not device_views.usable(nowhere)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not device_views.usable(nowhere)
    device_views.usable.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, (96, 96, 3, None, {"blur": 0.5}), (32, 32, 3, None, {"blur": 0.5})], ids=str)
def test_on_cuda(case: tuple[int, int, int, int | None, dict[str, float]]) -> None:
    assert device_views.fits(*batch(4, 12, 12, 3, "cuda"))
    check_strong(case, 1000, "cuda")


@pytest.mark.gpu
def test_mild_views_on_cuda() -> None:
    check_mild(1000, "cuda")
