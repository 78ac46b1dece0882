"""SimCLR: of all views in the batch, the one most like a view must be the other view of its own image.

Chen, Kornblith, Norouzi & Hinton, "A simple framework for contrastive learning of visual representations", ICML 2020
(arXiv 2002.05709). Both views go through the network in one forward pass, so batch norm sees them together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harness.contracts import Batch, Choice, DatasetInfo, Encoder, Method, Range, setting
from harness.heads import projector, wide
from harness.views import ViewConfig, ViewMaker

__all__ = ["SimCLR", "nt_xent_loss"]


def _similarities(first: Tensor, second: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cosines over temperature (2N, 2N), -inf for a view with itself, and the row of each view's partner (2N,)."""
    with torch.autocast(first.device.type, enabled=False):
        points = functional.normalize(wide(torch.cat((first, second))), dim=1)
        logits = points @ points.T / temperature
    own = torch.eye(len(points), dtype=torch.bool, device=points.device)
    partner = torch.arange(len(points), device=points.device).roll(len(first))
    return logits.masked_fill(own, -torch.inf), partner


def nt_xent_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Eq. 1 averaged over all 2N views: first, second (N, D), row i of both from image i -> scalar, at least float32.

    Chance is log(2N - 1).
    """
    return functional.cross_entropy(*_similarities(first, second, temperature))


class SimCLR(Method):
    """SimCLR"""

    tier = "ranked"
    family = "contrastive"
    year = 2020
    idea = "find the other view of an image among all views of the batch"
    source = "Chen, Kornblith, Norouzi & Hinton, ICML 2020, arXiv 2002.05709"
    views_per_image = 2

    class Config(ViewConfig):
        temperature: float = setting(
            0.5,
            "divides the cosines",
            source="0.5 for CIFAR-10 (appendix B.9), 0.1 for ImageNet",
            search=Range(0.05, 1, log=True),
            gt=0,
        )
        hidden: int = setting(
            256, "hidden units of the projector", source="2048: the width of its ResNet-50 (section 2.1)", ge=1
        )
        out: int = setting(128, "outputs of the projector", source="section 2.1", search=Choice((64, 128, 256)), ge=1)

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.views = ViewMaker.of(config, info)
        features = encoder.pool(torch.zeros(1, *encoder.map_shape)).shape[1]
        self.projector = projector(features, config.hidden, config.out)

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        views = torch.cat(tuple(self.preview(batch).values()))
        first, second = self.projector(self.encoder.pool(self.encoder(views))).chunk(2)
        logits, partner = _similarities(first, second, self.config.temperature)
        top1 = (logits.detach().argmax(1) == partner).float().mean()
        return {"loss": functional.cross_entropy(logits, partner), "retrieval": top1}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The two views."""
        return {f"view {view}": self.views(batch.images, batch.seeds, f"simclr.{view}") for view in (1, 2)}
