"""The embedded digits: fixed order, fixed pixels, never a file needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from harness.contracts import HarnessError
from harness.datasets.digits import Digits
from harness.images import digest_split


@pytest.fixture
def digits(tmp_path: Path) -> Digits:
    return Digits(tmp_path / "not there")


def test_file_order_and_labels(digits: Digits) -> None:
    labels = load_digits().target
    train, test = digits.split("train"), digits.split("test")
    assert (len(train), len(test)) == (1297, 500)
    assert train.labels is not None and test.labels is not None
    np.testing.assert_array_equal(np.concatenate([train.labels, test.labels]), labels)


def test_pixels_are_a_bilinear_enlargement(digits: Digits) -> None:
    image = digits.split("train").images[0, 0].double()
    small = torch.from_numpy(load_digits().images[0]) * 255 / 16
    for row, column in ((0, 0), (13, 5), (27, 27), (4, 20)):
        y, x = (np.clip((at + 0.5) * 8 / 28 - 0.5, 0, 7) for at in (row, column))
        y0, x0 = min(int(y), 6), min(int(x), 6)
        dy, dx = y - y0, x - x0
        value = (
            small[y0, x0] * (1 - dy) * (1 - dx) + small[y0, x0 + 1] * (1 - dy) * dx
            + small[y0 + 1, x0] * dy * (1 - dx) + small[y0 + 1, x0 + 1] * dy * dx
        )  # fmt: skip
        assert abs(image[row, column] - value) <= 0.5 + 1e-9


def test_info_and_memory(digits: Digits) -> None:
    info = digits.info
    assert (info.image_size, info.channels, info.num_classes) == ((28, 28), 1, 10)
    assert dict(info.counts) == {"train": 1297, "test": 500}
    train = digits.split("train").images
    assert train.dtype == torch.uint8 and train.is_contiguous(memory_format=torch.channels_last)
    assert info.mean[0] == pytest.approx((train.double() / 255).mean().item(), rel=1e-12)
    assert digits.split("train") is digits.split("train")


def test_bits_are_the_recorded_ones(digits: Digits) -> None:
    assert digits.verify()[0].state == "published" and digits.verified("train")
    # golden: a change here changes every number ever measured on digits
    assert digest_split(digits.split("train")) == "60a84c592af64e713ac672e363a281cf69ba06e23e31aacb8dbf7c7edd8ff79d"
    assert digest_split(digits.split("test")) == "2c16d3b26397e5d910d56186156d12349348ca85904f0a59614dec743d799b7b"


def test_changed_values_are_noticed(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    values, labels = load_digits(return_X_y=True)
    values[5, 5] += 1
    monkeypatch.setattr("harness.datasets.digits.load_digits", lambda return_X_y: (values, labels))
    assert digits.verify()[0].state == "readable, not the published file" and not digits.verified("train")


def test_refusals(tmp_path: Path, digits: Digits) -> None:
    with pytest.raises(HarnessError, match="no split 'unlabeled'; it has train, test"):
        digits.split("unlabeled")
    with pytest.raises(HarnessError, match="--image-size 32"):
        Digits(tmp_path, image_size=32)
    Digits(tmp_path, image_size=28)
    with pytest.raises(HarnessError, match="no argument"):
        Digits(tmp_path, argument="x")
    assert digits.fetch(offline=True) == ["digits: nothing to fetch"]
