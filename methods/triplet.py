"""Patch triplets: a patch of an image lies nearer to another patch of it than to a patch of another image.

The loss is the distance ratio of Hoffer & Ailon, "Deep metric learning using triplet network", 2015 (arXiv 1412.6622), in
the form of eq. 2 of Hoffer, Hubara & Ailon, 2016 (arXiv 1610.00243): what spatial contrasting starts from.
Patches are cut out of the image and go through the network one by one, where `sc` cuts them out of the feature map.

Where we differ: Hoffer & Ailon square the softmax's share of the wrong side instead of taking a logarithm; the negative is a
patch of the next image of the batch, which is any other image, since batches are shuffled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.augment import integers, to_float
from harness.contracts import Batch, Choice, Config, DatasetInfo, Encoder, HarnessError, Method, Range, setting
from harness.heads import SquareEncoder, pair_distances
from harness.image_operations import cut_squares

__all__ = ["Triplet", "distance_ratio_loss"]

SMALLEST = 4  # pixels


def distance_ratio_loss(anchors: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Eq. 2: mean of -log(e^-d+ / (e^-d+ + e^-d-)), d un-squared L2; three times (N, D) -> scalar. Chance is log 2."""
    near, far = pair_distances(anchors, positives), pair_distances(anchors, negatives)
    return functional.softplus(near - far).mean()


class Triplet(Method):
    """Patch triplets"""

    family = "contrastive"
    year = 2015
    idea = "two patches of an image lie nearer than patches of two images"
    source = "Hoffer & Ailon, 2015, arXiv 1412.6622; Hoffer, Hubara & Ailon, 2016, eq. 2"
    views_per_image = 2

    class Config(Config):
        patch: float = setting(
            0.5, "side of a patch, share of the image's", source="about 0.3 of the image: Hoffer et al., 2016",
            search=Range(0.3, 0.9), gt=0, lt=1,
        )  # fmt: skip
        out: int = setting(
            64,
            "dimensions of the embedding",
            search=Choice((32, 64, 128)),
            ge=1,
        )

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.image_size = info.image_size
        self.side = round(min(info.image_size) * config.patch)
        if self.side < SMALLEST:
            raise HarnessError(
                f"triplet: a patch of {config.patch:g} of {info.image_size[0]} x {info.image_size[1]} px has a side of "
                f"{self.side} px, less than {SMALLEST}"
            )
        self.squares = SquareEncoder(encoder, info, self.side)
        self.head = nn.Linear(self.squares.features, config.out)

    def patches(self, batch: Batch) -> Tensor:
        """(B, 2, C, side, side) in [0, 1], anywhere in the image."""
        corners = [
            integers(batch.seeds, f"triplet.{axis}", pixels - self.side + 1, (2,))
            for axis, pixels in enumerate(self.image_size)
        ]
        return to_float(cut_squares(batch.images, torch.stack(corners, 2), self.side))

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        vectors = self.head(self.squares(self.encoder, self.patches(batch)).flatten(1)).unflatten(0, (-1, 2))
        anchors, positives = vectors.unbind(1)
        negatives = positives.roll(-1, 0)
        with torch.no_grad():
            nearer = pair_distances(anchors, positives) < pair_distances(anchors, negatives)
        return {"loss": distance_ratio_loss(anchors, positives, negatives), "top1": nearer.float().mean()}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The two patches, enlarged."""
        size = list(batch.images.shape[2:])
        patches = [functional.interpolate(each, size, mode="bilinear") for each in self.patches(batch).unbind(1)]
        return {f"patch {number}": patch.clamp(0, 1) for number, patch in enumerate(patches, 1)}
