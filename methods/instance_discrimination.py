"""Instance discrimination: every image is a class of its own, and the classifier's weights are features seen before.

Wu, Xiong, Yu & Lin, "Unsupervised feature learning via non-parametric instance discrimination", CVPR 2018 (arXiv
1805.01978). A bank keeps one normalised feature per training image.

Where this differs. The softmax over the whole bank (eq. 2) is computed as it is: noise-contrastive estimation replaces it
in the paper (section 3.2) because ImageNet has 1.3 million images; it needs a constant guessed from the first batch, and
only approaches the softmax on CIFAR-10 as its negatives grow (table 1). The bank starts with what the untrained network
says of each image, not with random vectors, which are the targets of the whole first epoch: 0.920 against 0.745, and
0.800 for the untrained network itself (quick recipe of 4 epochs on MNIST, seed 10, validation top-1 of a linear probe on
pooled features, 200 of 1,000 labelled images). The proximal term (section 3.3), which damps a target that is seen once
per epoch, is left to the moving average of each feature, as in the authors' code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.contracts import Batch, Choice, DatasetInfo, Encoder, Method, PretrainingData, Range, setting
from harness.heads import matrix_product, num_pretraining_images, unit_rows
from harness.views import ViewConfig, ViewMaker

__all__ = ["InstanceDiscrimination", "instance_discrimination_loss"]


def _logits(features: Tensor, bank: Tensor, temperature: float) -> Tensor:
    return matrix_product(unit_rows(features), unit_rows(bank).T) / temperature


def instance_discrimination_loss(features: Tensor, bank: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """Eqs. 2 and 3 averaged over the batch: -log of the own row's share in the softmax over the bank.

    features (B, D), of images `indices` (B,); bank (N, D) -> scalar, at least float32. Chance is log N.
    """
    return functional.cross_entropy(_logits(features, bank, temperature), indices)


class InstanceDiscrimination(Method):
    """Instance discrimination"""

    tier = "ranked"
    family = "contrastive"
    year = 2018
    idea = "classify every image as itself, against a memory bank of all images' features"
    source = "Wu, Xiong, Yu & Lin, CVPR 2018, arXiv 1805.01978"

    class Config(ViewConfig):
        temperature: float = setting(
            0.07, "divides the cosines", source="0.07 (section 3.1)", search=Range(0.05, 1, log=True), gt=0
        )
        kept: float = setting(
            0.5,
            "share of an image's old feature that stays in the bank when a new one comes",
            source="0 in the paper (section 3.1), 0.5 in the authors' code",
            search=Range(0, 0.9),
            ge=0,
            lt=1,
        )
        out: int = setting(128, "features of an image", source="section 4", search=Choice((64, 128, 256)), ge=1)

    bank: Tensor

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.views = ViewMaker.of(config, info)
        self.head = nn.Linear(encoder.pool(torch.zeros(1, *encoder.map_shape)).shape[1], config.out)
        rows = num_pretraining_images(info) or 1
        self.register_buffer("bank", unit_rows(torch.randn(rows, config.out)))

    @torch.no_grad()
    def prepare(self, data: PretrainingData) -> None:
        self.bank = self.bank.new_zeros(len(data), self.config.out)
        for batch in data.batches():
            self.bank[batch.indices] = unit_rows(self.features(batch.images))

    def features(self, images: Tensor) -> Tensor:
        """What the bank remembers of an image, before normalisation: (B, C, H, W) -> (B, D)."""
        features: Tensor = self.head(self.encoder.pool(self.encoder(images)))
        return features

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        features = self.features(self.preview(batch)["view"])
        # The logits normalise the bank, which copies it: what the backward pass needs may be overwritten after them.
        logits = _logits(features, self.bank, self.config.temperature)
        self._remember(features.detach(), batch.indices)
        top1 = (logits.detach().argmax(1) == batch.indices).float().mean()
        return {"loss": functional.cross_entropy(logits, batch.indices), "retrieval": top1}

    def _remember(self, features: Tensor, indices: Tensor) -> None:
        old, kept = self.bank.index_select(0, indices), self.config.kept
        new = unit_rows(kept * old + (1 - kept) * unit_rows(features))
        self.bank.index_copy_(0, indices, new.to(self.bank.dtype))

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The view."""
        return {"view": self.views(batch.images, batch.seeds, "instance_discrimination")}
