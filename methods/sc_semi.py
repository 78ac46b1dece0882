"""Spatial contrasting and a supervised loss at once, on labelled and unlabelled images together.

Hoffer, Hubara & Ailon, "Deep unsupervised learning through spatial contrasting", 2016 (arXiv 1610.00243), train first without
labels and fine-tune afterwards; learning from both at once they leave for later, so how it is done is our choice. A step
takes one batch of unlabelled and labelled images through the network once. The SC term is sc's, on every image of the
batch, labels unread; the supervised term is the cross-entropy of the published net's own classifier on the labelled ones.

It sees the labels of its budget, so it stands in label-budget comparisons only, beside `supervised` and fine-tuning. Half of
a batch is labelled (fewer where the budget is smaller), so `images_seen` is that of any other method. Where the labelled
images are pretraining images too, one may meet itself among its negatives: 128 images, half of them labelled, out of
60,000 hold 0.07 such pairs. `--set method.pairs=shuffled` is its null control: the same loss without information in SC.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harness.contracts import Batch, DatasetInfo, Encoder, HarnessError, Range, setting
from harness.methods.sc import SpatialContrasting

__all__ = ["SpatialContrastingSemi", "labelled_cross_entropy"]


def labelled_cross_entropy(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and top-1 over the labelled rows: scores (B, K), labels (B,) with -1 for none -> two 0-d.

    Both are 0 when no row is labelled.
    """
    count = (labels >= 0).sum().clamp_min(1)
    losses = functional.cross_entropy(scores, labels, ignore_index=-1, reduction="sum")
    return losses / count, (scores.detach().argmax(1) == labels).sum() / count


class SpatialContrastingSemi(SpatialContrasting):
    """Spatial contrasting with labels"""

    tier = "ported"
    supervised = True
    sees_unlabelled = True
    idea = "sc on every image of a batch, and cross-entropy on those of them that have a label"
    source = "Hoffer, Hubara & Ailon, 2016, arXiv 1610.00243, named as future work"
    null_control = None

    class Config(SpatialContrasting.Config):
        weight: float = setting(
            1.0, "of the SC term beside the cross-entropy", source="not stated", search=Range(0.1, 10, log=True), ge=0
        )

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        if info.num_classes < 2:
            raise HarnessError(f"sc_semi needs labels of at least 2 classes; {info.name} has {info.num_classes}")
        self.classifier = encoder.classifier(info.num_classes)

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        if batch.labels is None:
            raise HarnessError("sc_semi was given a batch without labels")
        *maps, last = self._maps_and_last(self.view(batch))
        terms = [term for place, each in enumerate(maps) for term in self.criterion(each, batch.seeds, place)]
        contrasting, retrieval = (torch.stack(values).mean() for values in zip(*terms, strict=True))
        supervised, top1 = labelled_cross_entropy(self.classifier(last).float(), batch.labels)
        return {
            "loss": supervised + self.config.weight * contrasting,
            "supervised": supervised, "sc": contrasting, "top1": top1, "retrieval": retrieval,
        }  # fmt: skip

    def _maps_and_last(self, images: Tensor) -> tuple[Tensor, ...]:
        """The maps that carry the criterion, then the map that the classifier reads, in one pass."""
        if not self.config.layers:
            feature_map = self.encoder(images)
            return feature_map, feature_map
        return self.encoder.forward_layers(images, (*self.config.layers, self.encoder.layers[-1]))
