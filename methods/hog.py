"""Floor: histograms of oriented gradients read by an SVM: what a good hand-made feature gives on the same labels.

Dalal & Triggs (CVPR 2005), as scikit-image computes it: 9 orientations, blocks of 2 x 2 cells, L2-Hys; for colour the
channel of the strongest gradient. Their 8-pixel cells were for 64 x 128 px; ours are a seventh of the shorter side
(4 px at 28, 14 px at 96), so that small images keep a grid of about 7 x 7 cells.
"""

from __future__ import annotations

import numpy as np
import torch
from skimage.feature import hog
from torch import Tensor

from harness.augment import to_float
from harness.contracts import DatasetInfo, Encoder, HarnessError
from harness.methods.pixels import PixelEncoder, Pixels

ORIENTATIONS = 9
BLOCK = 2


class HogEncoder(PixelEncoder):
    """No parameters: the map is (B, 36, rows, columns), one histogram per block; computed image by image on the CPU."""

    readouts = ("hog",)

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info, "hog")
        self.cell = max(2, round(min(info.image_size) / 7))
        rows, columns = (side // self.cell - BLOCK + 1 for side in info.image_size)
        if min(rows, columns) < 1:
            raise HarnessError(
                f"hog needs images of at least {BLOCK} x {BLOCK} cells of {self.cell} px; "
                f"these are {info.image_size[0]} x {info.image_size[1]} px"
            )
        self._map_shape = (ORIENTATIONS * BLOCK * BLOCK, rows, columns)

    @property
    def map_shape(self) -> tuple[int, int, int]:
        return self._map_shape

    def forward(self, images: Tensor) -> Tensor:
        pictures = to_float(images).permute(0, 2, 3, 1).cpu().numpy()
        maps = np.stack([self._describe(picture) for picture in pictures])
        return torch.from_numpy(maps).permute(0, 3, 1, 2).to(images.device, self.mean.dtype)

    def _describe(self, picture: np.ndarray) -> np.ndarray:
        blocks = hog(
            picture, ORIENTATIONS, (self.cell, self.cell), (BLOCK, BLOCK), feature_vector=False, channel_axis=-1
        )  # fmt: skip
        return blocks.reshape(*blocks.shape[:2], -1)


class Hog(Pixels):
    """Histograms of oriented gradients, SVM"""

    year = 2005
    source = "Dalal & Triggs, CVPR 2005"
    evaluators = ("svm",)

    @classmethod
    def own_encoder(cls, info: DatasetInfo) -> Encoder:
        return HogEncoder(info)
