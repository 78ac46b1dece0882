"""SupCon: SimCLR that is told the labels; all views of a class attract each other. A ceiling, not a rival.

Khosla, Teterwak, Wang, Sarna, Tian, Isola, Maschinot, Liu & Krishnan, "Supervised contrastive learning", NeurIPS 2020
(arXiv 2004.11362). It sees the labels of its budget, so it stands in label-budget comparisons only. Everything but the
criterion is SimCLR's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.contracts import Batch, DatasetInfo, Encoder, HarnessError, Range, setting
from harness.heads import matrix_product, unit_rows
from harness.methods.simclr import SimCLR

__all__ = ["SupCon", "supcon_loss"]


def supcon_loss(first: Tensor, second: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Eq. 2 (L_out) averaged over all 2N views; the mean over positives stands outside the logarithm.

    first, second (N, D), row i of both from image i, of class labels[i] (N,) -> scalar, at least float32. With every
    label different it is SimCLR's.
    """
    points = unit_rows(torch.cat((first, second)))
    itself = torch.eye(len(points), dtype=torch.bool, device=points.device)
    logits = (matrix_product(points, points.T) / temperature).masked_fill(itself, -torch.inf)
    classes = labels.repeat(2)
    positive = (classes[:, None] == classes) & ~itself
    log_shares = logits.log_softmax(1).masked_fill(~positive, 0.0)
    return -(log_shares.sum(1) / positive.sum(1)).mean()


class SupCon(SimCLR):
    """Supervised contrastive learning"""

    supervised = True
    tier = "ported"
    year = 2020
    idea = "SimCLR whose positives are all views of the same class: a ceiling with labels"
    source = "Khosla, Teterwak, Wang et al., NeurIPS 2020, arXiv 2004.11362"

    class Config(SimCLR.Config):
        temperature: float = setting(0.1, "divides the cosines", source="0.1", search=Range(0.05, 1, log=True), gt=0)

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        if info.num_classes < 2:
            raise HarnessError(f"supcon needs labels of at least 2 classes; {info.name} has {info.num_classes}")

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        if batch.labels is None:
            raise HarnessError("supcon was given a batch without labels")
        views = torch.cat(tuple(self.preview(batch).values()))
        first, second = self.projector(self.encoder.pool(self.encoder(views))).chunk(2)
        return {"loss": supcon_loss(first, second, batch.labels, self.config.temperature)}
