"""Decoupled contrastive learning: SimCLR without the positive in the denominator.

Yeh, Hong, Hsu, Liu, Chen & LeCun, "Decoupled contrastive learning", ECCV 2022 (arXiv 2110.06848). In SimCLR's gradient a
factor vanishes once a positive is easy, the more so the fewer negatives there are; without the positive below the
fraction it is gone, and small batches do. Everything else, the views too, is SimCLR's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.contracts import Batch, Range, setting
from harness.heads import matrix_product, unit_rows
from harness.methods.simclr import SimCLR

__all__ = ["DCL", "dcl_loss"]


def _scores(first: Tensor, second: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Of each of 2N views: the partner's cosine over temperature (2N,), and all others' (2N, 2N), -inf for its own image."""
    points = unit_rows(torch.cat((first, second)))
    scores = matrix_product(points, points.T) / temperature
    image = torch.arange(len(points), device=points.device) % len(first)
    partner = torch.arange(len(points), device=points.device).roll(len(first))
    own = scores.gather(1, partner[:, None])[:, 0]
    return own, scores.masked_fill(image[:, None] == image, -torch.inf)


def dcl_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """The decoupled loss averaged over all 2N views: the log-sum over views of other images, minus the partner's score.

    first, second (N, D), row i of both from image i, N > 1 -> scalar, at least float32. It has no lower bound of 0.
    """
    own, others = _scores(first, second, temperature)
    return (others.logsumexp(1) - own).mean()


class DCL(SimCLR):
    """Decoupled contrastive learning"""

    tier = "ported"
    year = 2022
    idea = "SimCLR with the positive left out of the denominator"
    source = "Yeh, Hong, Hsu, Liu, Chen & LeCun, ECCV 2022, arXiv 2110.06848"

    class Config(SimCLR.Config):
        temperature: float = setting(
            0.1,
            "divides the cosines",
            source="as for SimCLR on ImageNet: Chen et al., 2020",
            search=Range(0.05, 1, log=True),
            gt=0,
        )

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        views = torch.cat(tuple(self.preview(batch).values()))
        first, second = self.projector(self.encoder.pool(self.encoder(views))).chunk(2)
        own, others = _scores(first, second, self.config.temperature)
        found: dict[str, Any] = {"retrieval": (own > others.amax(1)).float().mean()}
        return {"loss": (others.logsumexp(1) - own).mean(), **found}
