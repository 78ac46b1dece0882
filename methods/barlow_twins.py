"""Barlow Twins: each output must say the same of both views of an image, and nothing that another output says.

Zbontar, Jing, Misra, LeCun & Deny, "Barlow Twins: self-supervised learning via redundancy reduction", ICML 2021 (arXiv
2103.03230). What is trained is the mean over outputs where the paper has the sum: SGD's shared learning rate then fits
any width (the authors' code scales the sum by 0.024 for its 8192 outputs and uses LARS).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.contracts import Batch, Choice, DatasetInfo, Encoder, Method, Range, setting
from harness.heads import matrix_product, projector, wide
from harness.views import ViewConfig, ViewMaker

__all__ = ["BarlowTwins", "barlow_twins_loss", "cross_correlation"]

EPSILON = 1e-5  # added to variances, as batch norm does: an output that is constant over the batch correlates with none


def cross_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Eq. 2: correlations over the batch of each output for one view with each for the other, (N, D) twice -> (D, D)."""
    standardised = []
    for embeddings in (wide(first), wide(second)):
        centred = embeddings - embeddings.mean(0)
        standardised.append(centred * (centred.square().mean(0) + EPSILON).rsqrt())
    return matrix_product(standardised[0].T, standardised[1]) / len(first)


def barlow_twins_loss(first: Tensor, second: Tensor, redundancy: float) -> Tensor:
    """Eq. 1: squared distance of the correlations from the identity, off the diagonal times `redundancy` (lambda).

    first, second (N, D), row i of both from image i -> scalar, at least float32.
    """
    correlation = cross_correlation(first, second)
    diagonal = correlation.diagonal()
    off_diagonal = correlation.square().sum() - diagonal.square().sum()
    return (diagonal - 1).square().sum() + redundancy * off_diagonal


class BarlowTwins(Method):
    """Barlow Twins"""

    tier = "ranked"
    family = "decorrelation"
    year = 2021
    idea = "make the correlation matrix of two views' outputs the identity"
    source = "Zbontar, Jing, Misra, LeCun & Deny, ICML 2021, arXiv 2103.03230"
    views_per_image = 2

    class Config(ViewConfig):
        redundancy: float = setting(
            5e-3,
            "lambda, weight of the squared correlations between different outputs",
            source="5e-3 for 8192 outputs (section 2.2)",
            search=Range(1e-3, 1e-1, log=True),
            ge=0,
        )
        hidden: int = setting(512, "hidden units of the projector", source="8192, twice (section 2.2)", ge=1)
        out: int = setting(
            256, "outputs of the projector", source="8192 (section 2.2)", search=Choice((128, 256, 512)), ge=1
        )

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.views = ViewMaker.of(config, info)
        features = encoder.pool(torch.zeros(1, *encoder.map_shape)).shape[1]
        self.projector = projector(features, config.hidden, config.out)

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        # One view after the other, as in the paper: batch norm must not tell the network how the two differ.
        first, second = (self.projector(self.encoder.pool(self.encoder(v))) for v in self.preview(batch).values())
        loss = barlow_twins_loss(first, second, self.config.redundancy) / self.config.out
        with torch.no_grad():
            agreement = cross_correlation(first, second).diagonal().mean()
        return {"loss": loss, "agreement": agreement}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The two views."""
        return {f"view {view}": self.views(batch.images, batch.seeds, f"barlow_twins.{view}") for view in (1, 2)}
