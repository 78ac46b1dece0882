"""W-MSE: pull two views together after whitening the batch, so that its spread cannot be lost.

Ermolov, Siarohin, Sangineto & Sebe, "Whitening for self-supervised representation learning", ICML 2021 (arXiv
2007.06346). A batch is whitened as a whole where the paper averages over random parts of it, and its covariance is mixed
with a little of the identity, so that a batch smaller than the embedding is wide has a whitening too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harness.contracts import Batch, Choice, DatasetInfo, Encoder, Method, Range, setting
from harness.heads import matrix_product, projector, wide
from harness.views import ViewConfig, ViewMaker

__all__ = ["WMSE", "w_mse_loss", "whitened"]


def whitened(embeddings: Tensor, shrinkage: float = 0.0) -> Tensor:
    """Section 3.1: rows of no mean and identity covariance, (N, D) -> (N, D), in float32 or float64.

    shrinkage: share of the identity in the covariance that is undone; 0 needs N > D. By the inverse of the Cholesky
    factor, whose failure is not looked for, which would make the host wait: it shows as a non-finite loss.
    """
    centred = wide(embeddings)
    centred = centred - centred.mean(0)
    covariance = matrix_product(centred.T, centred) / (len(centred) - 1)
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    factor, _ = torch.linalg.cholesky_ex((1 - shrinkage) * covariance + shrinkage * identity)
    return torch.linalg.solve_triangular(factor, centred.T, upper=False).T


def w_mse_loss(first: Tensor, second: Tensor, shrinkage: float = 0.0) -> Tensor:
    """Section 3, two views: 2 - 2 cos between them, each whitened over the batch, averaged over images.

    first, second (N, D), row i of both from image i -> scalar in [0, 4], at least float32.
    """
    cosines = functional.cosine_similarity(whitened(first, shrinkage), whitened(second, shrinkage), dim=1)
    return 2 - 2 * cosines.mean()


class WMSE(Method):
    """W-MSE"""

    tier = "ported"
    family = "decorrelation"
    year = 2021
    idea = "whiten the batch, then pull the views of an image together"
    source = "Ermolov, Siarohin, Sangineto & Sebe, ICML 2021, arXiv 2007.06346"
    views_per_image = 2

    class Config(ViewConfig):
        shrinkage: float = setting(
            1e-3,
            "share of the identity in the covariance",
            source="0 in the paper",
            search=Range(1e-4, 1e-1, log=True),
            gt=0,
            lt=1,
        )
        hidden: int = setting(256, "hidden units of the projector", source="1024 (section 4)", ge=1)
        out: int = setting(
            64,
            "outputs of the projector; at most half the batch",
            source="64 for CIFAR-10 (section 4)",
            search=Choice((32, 64)),
            ge=1,
        )

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.views = ViewMaker.of(config, info)
        features = encoder.pool(torch.zeros(1, *encoder.map_shape)).shape[1]
        self.projector = projector(features, config.hidden, config.out)

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        first, second = (self.projector(self.encoder.pool(self.encoder(v))) for v in self.preview(batch).values())
        return {"loss": w_mse_loss(first, second, self.config.shrinkage)}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The two views."""
        return {f"view {view}": self.views(batch.images, batch.seeds, f"w_mse.{view}") for view in (1, 2)}
