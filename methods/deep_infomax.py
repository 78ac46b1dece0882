"""Deep InfoMax: a summary of the whole image must fit every place of its own feature map, and no place of another's.

Hjelm, Fedorov, Lavoie-Marchildon, Grewal, Bachman, Trischler & Bengio, "Learning deep representations by mutual
information estimation and maximization", ICLR 2019 (arXiv 1808.06670), the local objective (eq. 6) with the
Jensen-Shannon estimator (eq. 4) and the encode-and-dot-product critic.

Where we differ: the local features are the cells of the encoder's map and the summary is made by a head that is thrown
away, so that what is kept is the map, as for every method here; the global term and the match to a prior (eq. 7)
are left out: DIM(L), their best for classification. Both sides of the critic are plain two-layer networks with batch norm.

It suffers from the quick recipe's SGD at 0.1 (the authors train with Adam), which overrides what a method asks for. MNIST,
1,000 labels, test top-1 with gap and spatial, seeds 10 and 11: SGD 79.7 / 89.5 and 81.8 / 92.0; AdamW at 0.001 without
weight decay 83.4 / 92.6 and 84.5 / 93.2; random_init 82.4 / 94.0 and 72.7 / 93.0. With gap it then gains, with the grid it
does not, though the loss falls from 1.4 (chance) to 0.33 and 7 of 10 summaries find their own map among 128. A guess, not
tested: places come to say what the whole image shares, its strokes' width and slant, and no longer what is there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.augment import shift_and_mirror, to_float
from harness.contracts import Batch, Choice, Config, DatasetInfo, Encoder, HarnessError, Method, setting
from harness.heads import projector, wide

__all__ = ["DeepInfoMax", "jensen_shannon_loss"]


def jensen_shannon_loss(scores: Tensor) -> Tensor:
    """Eq. 4, negated: scores (B, B, P) of summary i with place p of image j -> scalar. Chance is 2 log 2.

    -E softplus(-T) of own pairs and -E softplus(T) of all others.
    """
    own = scores.diagonal().T  # (B, P)
    others = functional.softplus(scores).mean(2)
    count = len(scores)
    return functional.softplus(-own).mean() + (others.sum() - others.diagonal().sum()) / (count * (count - 1))


class DeepInfoMax(Method):
    """Deep InfoMax (local)"""

    family = "contrastive"
    year = 2019
    idea = "a summary of the image must fit every place of its own map"
    source = "Hjelm et al., ICLR 2019, arXiv 1808.06670"

    class Config(Config):
        units: int = setting(
            128, "dimensions in which summary and places are compared", source="2048",
            search=Choice((64, 128, 256)), ge=1,
        )  # fmt: skip
        code: int = setting(64, "dimensions of the summary", source="64", ge=1)
        shift: int = setting(2, "largest translation, pixels", source="none in the paper", ge=0)

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        channels, rows, columns = encoder.map_shape
        if rows * columns < 2:
            raise HarnessError(
                f"deep_infomax: a map of {rows} x {columns} cells has one place only, which is its own summary"
            )
        self.mirror = info.mirror_keeps_label
        self.summary = nn.Sequential(nn.Flatten(), projector(math.prod(encoder.map_shape), config.units, config.code))
        self.of_summary = projector(config.code, config.units, config.units)
        self.of_place = nn.Sequential(
            nn.Conv2d(channels, config.units, 1, bias=False), nn.BatchNorm2d(config.units), nn.ReLU(),
            nn.Conv2d(config.units, config.units, 1),
        )  # fmt: skip

    def view(self, batch: Batch) -> Tensor:
        """The images, mildly augmented, same type as `batch.images`."""
        return shift_and_mirror(batch.images, batch.seeds, "deep_infomax", self.config.shift, self.mirror)

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        feature_map = self.encoder(self.view(batch))
        summaries = wide(self.of_summary(self.summary(feature_map)))
        places = wide(self.of_place(feature_map).flatten(2))  # (B, units, P)
        with torch.autocast(batch.images.device.type, enabled=False):
            flat = places.transpose(1, 2).flatten(0, 1)  # (B * P, units)
            scores = (summaries @ flat.T).unflatten(1, (len(batch), -1)) / self.config.units**0.5
        own = torch.arange(len(batch), device=scores.device)
        top1 = (scores.detach().mean(2).argmax(1) == own).float().mean()
        return {"loss": jensen_shannon_loss(scores), "retrieval": top1}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The view."""
        return {"view": to_float(self.view(batch))}
