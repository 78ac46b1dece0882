"""SimSiam: predict the other view's embedding, and let no gradient into what is predicted; nothing else.

Chen & He, "Exploring simple Siamese representation learning", CVPR 2021 (arXiv 2011.10566): BYOL without a momentum
teacher. As for CIFAR-10 in the paper (appendix D) the projector has two layers, both followed by batch norm; the
predictor is a bottleneck and follows the learning-rate schedule like the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.contracts import Batch, Choice, DatasetInfo, Encoder, Method, setting
from harness.heads import projector, unit_rows, wide
from harness.views import ViewConfig, ViewMaker

__all__ = ["SimSiam", "negative_cosine_similarity"]


def negative_cosine_similarity(predictions: Tensor, targets: Tensor) -> Tensor:
    """Eq. 1 averaged over rows, in [-1, 1]: (N, D) and (N, D) -> scalar, at least float32.

    As printed: the gradient flows into both. Eq. 3, what is trained, is this with `targets.detach()`.
    """
    return -functional.cosine_similarity(wide(predictions), wide(targets), dim=1).mean()


class SimSiam(Method):
    """SimSiam"""

    tier = "ported"
    family = "self-distillation"
    year = 2021
    idea = "predict one view's embedding from the other's, with a stop-gradient and no teacher"
    source = "Chen & He, CVPR 2021, arXiv 2011.10566"
    views_per_image = 2

    class Config(ViewConfig):
        hidden: int = setting(512, "hidden units of the projector", source="2048 (section 3)", ge=1)
        out: int = setting(
            256, "outputs of projector and predictor", source="2048 (section 3)", search=Choice((128, 256, 512)), ge=1
        )
        bottleneck: int = setting(
            64,
            "hidden units of the predictor",
            source="512: a quarter of its outputs (section 3)",
            search=Choice((32, 64, 128)),
            ge=1,
        )

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.views = ViewMaker.of(config, info)
        features = encoder.pool(torch.zeros(1, *encoder.map_shape)).shape[1]
        # No scale and shift after the last layer: the predictor's first one could undo them.
        last = nn.BatchNorm1d(config.out, affine=False)
        self.projector = nn.Sequential(*projector(features, config.hidden, config.out), last)
        self.predictor = projector(config.out, config.bottleneck, config.out)

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        first, second = (self.projector(self.encoder.pool(self.encoder(v))) for v in self.preview(batch).values())
        there = negative_cosine_similarity(self.predictor(first), second.detach())
        back = negative_cosine_similarity(self.predictor(second), first.detach())
        # 1 for embeddings spread over the sphere, 0 for collapse (section 4.1 shows it against 1 / sqrt(D)).
        spread = unit_rows(second.detach()).std(0).mean() * self.config.out**0.5
        return {"loss": (there + back) / 2, "spread": spread}  # eq. 4

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The two views."""
        return {f"view {view}": self.views(batch.images, batch.seeds, f"simsiam.{view}") for view in (1, 2)}
