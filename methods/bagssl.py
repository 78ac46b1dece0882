"""BagSSL: patches of one size that occur in the same image, each encoded by itself, must agree; VICReg keeps them apart.

Chen, Bardes, Li & LeCun, "Bag of image patch embedding behind the success of self-supervised learning", TMLR 2023 (arXiv
2206.08954; first called "Intra-instance VICReg"). A joint-embedding loss on crops of one fixed scale learns which
patches occur together, and an image is the mean of its patches' embeddings. The paper tries several losses; here it is
VICReg's, so that `vicreg` differs by the crops alone, and `sc` by cutting its patches out of the map of the whole image.

A patch is a square, cut anywhere in the image, stretched only where the network needs more pixels, and recoloured by
itself as a view of VICReg is.

Where we differ: the mean over patches is that over the cells of the whole image's map (the readout `gap`), as for every
method here: a cell sees a patch in its surroundings, where a crop ends at its border and may have been stretched. The
map of a patch is padded at its own border, which lies inside the image. Projectors are those of `vicreg` here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.augment import integers
from harness.contracts import Batch, DatasetInfo, Encoder, HarnessError, Range, setting
from harness.heads import SquareEncoder
from harness.image_operations import cut_squares
from harness.methods.vicreg import VICReg
from harness.views import ViewMaker

__all__ = ["BagSSL"]

SMALLEST = 4  # pixels


class BagSSL(VICReg):
    """BagSSL"""

    tier = "ported"
    year = 2023
    idea = "patches of one size from the same image agree, each encoded by itself; VICReg on fixed-scale crops"
    source = "Chen, Bardes, Li & LeCun, TMLR 2023, arXiv 2206.08954"

    class Config(VICReg.Config):
        crop_scale: float = setting(
            0.25,
            "area of every patch, share of the image's (of its shorter side's square)",
            source="fixed, several tried; 32 of 224 px are 0.02",
            search=Range(0.1, 0.6),
            gt=0,
            lt=1,
        )

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.image_size = info.image_size
        self.side = round(min(info.image_size) * config.crop_scale**0.5)
        if self.side < SMALLEST:
            raise HarnessError(
                f"bagssl: a patch of {config.crop_scale:g} of {info.image_size[0]} x {info.image_size[1]} px has a side "
                f"of {self.side} px, less than {SMALLEST}"
            )
        shown = SquareEncoder(encoder, info, self.side).size[0]
        self.views = ViewMaker.of(config, info, scale=(1.0, 1.0), size=shown)  # the whole of each square

    def squares(self, batch: Batch) -> Tensor:
        """(B, 2, C, side, side), same type as `batch.images`: two patches, each anywhere in the image."""
        corners = [
            integers(batch.seeds, f"bagssl.{axis}", pixels - self.side + 1, (2,))
            for axis, pixels in enumerate(self.image_size)
        ]
        return cut_squares(batch.images, torch.stack(corners, 2), self.side)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The two patches."""
        patches = self.squares(batch).unbind(1)
        return {f"patch {n}": self.views(patch, batch.seeds, f"bagssl.{n}") for n, patch in enumerate(patches, 1)}
