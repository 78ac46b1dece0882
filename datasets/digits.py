"""Digits: 1,797 handwritten digits of 8x8 pixels that ship inside scikit-learn; the data set that needs no download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
(its test part). There is no official split: in file order, the first 1,297 images train and the last 500 test. Values
0..16 become value * 255 / 16, resized bilinearly to 28x28 so that nets made for MNIST fit.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from harness import images
from harness.contracts import Dataset, DatasetInfo, FileReport, HarnessError, Split

NUM_TRAIN = 1297
SIDE = 28
FILE = "digits.csv.gz (inside scikit-learn)"
# SHA-256 of the 1797 x 64 values and labels as bytes: scikit-learn has not changed them since it ships them.
RAW_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


class Digits(Dataset):
    """Handwritten digits, 1 channel, 28x28; embedded, so always there and never fetched."""

    name = "digits"
    title = "Digits (UCI, inside scikit-learn)"
    licence = "CC BY 4.0 (UCI Machine Learning Repository)"
    citation = (
        "E. Alpaydin, C. Kaynak. Optical Recognition of Handwritten Digits. UCI Machine Learning Repository, 1998. "
        "doi:10.24432/C50P49"
    )
    default_encoder = "convnet_small"
    mirror_keeps_label = False
    caution = "centred 8-pixel grey images, 500 of them for testing: nothing is claimed beyond this data set"

    def __init__(self, root: Path, image_size: int | None = None, argument: str | None = None) -> None:
        super().__init__(root, image_size, argument)
        if image_size not in (None, SIDE):
            raise HarnessError(f"digits has images of {SIDE} pixels: leave out --image-size {image_size}")
        if argument is not None:
            raise HarnessError("digits takes no argument: write --dataset digits")
        self._splits: dict[str, Split] | None = None
        self._info: DatasetInfo | None = None

    @property
    def info(self) -> DatasetInfo:
        """Facts of the embedded data (cached)."""
        if self._info is None:
            train = self.split("train")
            mean, std = images.channel_statistics(train.images)
            self._info = DatasetInfo(
                name=self.name, title=self.title, classes=tuple("0123456789"), image_size=(SIDE, SIDE), channels=1,
                mean=mean, std=std, counts={"train": len(train), "test": len(self._decoded()["test"])},
                licence=self.licence, citation=self.citation, default_encoder=self.default_encoder,
                pretrain_split=self.pretrain_split, mirror_keeps_label=self.mirror_keeps_label,
            )  # fmt: skip
        return self._info

    def split(self, name: str) -> Split:
        """Return `train` or `test`, uint8 (N, 1, 28, 28). Raises HarnessError for any other name."""
        if name not in ("train", "test"):
            raise HarnessError(f"data set digits has no split {name!r}; it has train, test")
        return self._decoded()[name]

    def _decoded(self) -> dict[str, Split]:
        if self._splits is None:
            values, labels = _raw()
            # float64 on purpose: the rounding to uint8 below must not depend on the machine's float32 kernels.
            small = torch.from_numpy(values.reshape(-1, 1, 8, 8)).double() * 255 / 16
            large = torch.nn.functional.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
            pixels = large.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
            self._splits = {
                "train": images.as_split(pixels[:NUM_TRAIN], labels[:NUM_TRAIN]),
                "test": images.as_split(pixels[NUM_TRAIN:], labels[NUM_TRAIN:]),
            }
        return self._splits

    def verify(self) -> list[FileReport]:
        """Compare the embedded values with the digest recorded here."""
        if self.verified("train"):
            return [FileReport(FILE, "published")]
        return [FileReport(FILE, "readable, not the published file", "its values differ from those recorded here")]

    def verified(self, split_expression: str) -> bool:
        """Whether the embedded values are the recorded ones (one digest covers both splits)."""
        values, labels = _raw()
        return hashlib.sha256(values.tobytes() + labels.tobytes()).hexdigest() == RAW_SHA256


def _raw() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 64) uint8 values 0..16 and (1797,) uint8 labels, in file order."""
    values, labels = load_digits(return_X_y=True)
    return values.astype(np.uint8), labels.astype(np.uint8)
