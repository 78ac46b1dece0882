"""BYOL: predict what a slowly moving average of the network says about the other view of an image; no negatives.

Grill, Strub, Altché et al., "Bootstrap your own latent", NeurIPS 2020 (arXiv 2006.07733). The views are SimCLR's, the
same for both sides: the paper's different blur and solarisation per side are left out. Both views of a batch pass each
network in one forward pass, and the teacher normalises by the batch, as the online network does.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.contracts import Batch, Choice, DatasetInfo, Encoder, Method, Range, setting
from harness.heads import momentum_update, projector, wide
from harness.views import ViewConfig, ViewMaker

__all__ = ["BYOL", "byol_loss", "teacher_momentum"]


def byol_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Eq. 2: squared distance on the unit sphere, 2 - 2 cos, averaged over rows: (N, D) and (N, D) -> scalar in [0, 4].

    No gradient reaches the targets. At least float32.
    """
    return 2 - 2 * functional.cosine_similarity(wide(predictions), wide(targets.detach()), dim=1).mean()


def teacher_momentum(progress: Tensor, base: float) -> Tensor:
    """tau of section 3.2 (implementation): `base` at progress 0, 1 at progress 1, along half a cosine."""
    return 1 - (1 - base) * (torch.cos(math.pi * progress) + 1) / 2


class BYOL(Method):
    """BYOL"""

    tier = "ranked"
    family = "self-distillation"
    year = 2020
    idea = "predict what a slow average of the network says of the other view; no negatives"
    source = "Grill, Strub, Altché et al., NeurIPS 2020, arXiv 2006.07733"
    views_per_image = 2

    class Config(ViewConfig):
        momentum: float = setting(
            0.99,
            "of the teacher at the start; it rises to 1",
            source="0.996 for 1000 epochs, 0.99 for 300 (section 3.3, appendix)",
            search=Range(0.9, 0.999),
            ge=0,
            le=1,
        )
        hidden: int = setting(
            512, "hidden units of projector and predictor", source="4096", search=Choice((256, 512, 1024)), ge=1
        )
        out: int = setting(128, "outputs of projector and predictor", source="256", search=Choice((64, 128, 256)), ge=1)

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.views = ViewMaker.of(config, info)
        features = encoder.pool(torch.zeros(1, *encoder.map_shape)).shape[1]
        self.projector = projector(features, config.hidden, config.out)
        self.predictor = projector(config.out, config.hidden, config.out)
        self.teacher_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.teacher_projector = copy.deepcopy(self.projector).requires_grad_(False)

    @staticmethod
    def _project(encoder: Encoder, head: nn.Module, views: Tensor) -> Tensor:
        projected: Tensor = head(encoder.pool(encoder(views)))
        return projected

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        views = torch.cat(tuple(self.preview(batch).values()))
        predictions = self.predictor(self._project(self.encoder, self.projector, views))
        with torch.no_grad():
            targets = self._project(self.teacher_encoder, self.teacher_projector, views)
        exchanged = targets.roll(len(batch), 0)  # each view's target is the other view
        spread = functional.normalize(wide(targets), dim=1).std(0).mean() * self.config.out**0.5
        # Rows of both directions are averaged together; the paper adds the two.
        return {"loss": 2 * byol_loss(predictions, exchanged), "target_spread": spread}

    @torch.no_grad()
    def after_step(self, progress: Tensor) -> None:
        tau = teacher_momentum(progress, self.config.momentum)
        momentum_update(self.teacher_encoder, self.encoder, tau)
        momentum_update(self.teacher_projector, self.projector, tau)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The two views."""
        return {f"view {view}": self.views(batch.images, batch.seeds, f"byol.{view}") for view in (1, 2)}
