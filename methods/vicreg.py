"""VICReg: two views must agree, while every output keeps its variance over the batch and no two outputs covary.

Bardes, Ponce & LeCun, "VICReg: variance-invariance-covariance regularization for self-supervised learning", ICLR 2022
(arXiv 2105.04906). The weights 25, 25, 1 belong to the terms as the authors' code scales them, and so they are here: the
squared distance is averaged over outputs and the variance term over the views, where eqs. 5 and 6 print sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.contracts import Batch, Choice, DatasetInfo, Encoder, Method, Range, setting
from harness.heads import matrix_product, projector, wide
from harness.views import ViewConfig, ViewMaker

__all__ = ["VICReg", "VICRegTerms", "vicreg_loss", "vicreg_terms"]

EPSILON = 1e-4  # below the root of eq. 2, whose slope at no variance would be infinite (section 4.1)


class VICRegTerms(NamedTuple):
    """The three terms, each a scalar of at least float32, not weighted."""

    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def vicreg_terms(first: Tensor, second: Tensor) -> VICRegTerms:
    """The terms of section 4.1 for two views: first, second (N, D), N > 1, row i of both from image i."""
    first, second = wide(first), wide(second)
    variances, covariances = [], []
    for embeddings in (first, second):
        centred = embeddings - embeddings.mean(0)
        covariance = matrix_product(centred.T, centred) / (len(centred) - 1)  # eq. 3
        own = covariance.diagonal()
        variances.append((1 - (own + EPSILON).sqrt()).relu().mean())  # eqs. 1 and 2
        covariances.append((covariance.square().sum() - own.square().sum()) / len(own))  # eq. 4
    return VICRegTerms((first - second).square().mean(), sum(variances) / 2, sum(covariances))  # type: ignore[arg-type]


def vicreg_loss(
    first: Tensor, second: Tensor, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
) -> Tensor:
    """Eq. 6: the three terms of `vicreg_terms`, weighted; first, second (N, D) -> scalar, at least float32."""
    terms = vicreg_terms(first, second)
    return invariance * terms.invariance + variance * terms.variance + covariance * terms.covariance


class VICReg(Method):
    """VICReg"""

    tier = "ranked"
    family = "decorrelation"
    year = 2022
    idea = "agree across views, keep every output's variance, remove covariance"
    source = "Bardes, Ponce & LeCun, ICLR 2022, arXiv 2105.04906"
    views_per_image = 2

    class Config(ViewConfig):
        invariance: float = setting(
            25.0,
            "lambda, weight of the distance of the views",
            source="25 (section 4.2)",
            search=Range(1, 50, log=True),
            ge=0,
        )
        variance: float = setting(
            25.0, "mu, weight of the variance below 1", source="25 (section 4.2)", search=Range(1, 50, log=True), ge=0
        )
        covariance: float = setting(
            1.0, "nu, weight of the covariances", source="1 (section 4.2)", search=Range(0.1, 10, log=True), ge=0
        )
        hidden: int = setting(512, "hidden units of the projector", source="8192, twice (section 4.2)", ge=1)
        out: int = setting(
            256, "outputs of the projector", source="8192 (section 4.2)", search=Choice((128, 256, 512)), ge=1
        )

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.views = ViewMaker.of(config, info)
        features = encoder.pool(torch.zeros(1, *encoder.map_shape)).shape[1]
        self.projector = projector(features, config.hidden, config.out)

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        config = self.config
        # One view after the other, as in the paper: batch norm must not tell the network how the two differ.
        first, second = (self.projector(self.encoder.pool(self.encoder(v))) for v in self.preview(batch).values())
        terms = vicreg_terms(first, second)
        weights = config.invariance, config.variance, config.covariance
        loss = sum(weight * term for weight, term in zip(weights, terms, strict=True)) / sum(weights)
        return {"loss": loss, **{name: term.detach() for name, term in terms._asdict().items()}}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The two views."""
        return {f"view {view}": self.views(batch.images, batch.seeds, f"vicreg.{view}") for view in (1, 2)}
