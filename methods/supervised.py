"""Control: the whole published network trained on the labels of the budget, with sc's views and no pretraining."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.nn import functional

from harness.augment import shift_and_mirror
from harness.contracts import Batch, Config, DatasetInfo, Encoder, HarnessError, Method, Range, setting


class Supervised(Method):
    """Supervised training"""

    role = "control"
    supervised = True
    family = "control"
    year = 2016
    source = "Hoffer, Hubara & Ailon, 2016, tables 1-3: the same net without SC"

    class Config(Config):
        shift: int = setting(2, "largest translation, pixels", source="'small translations'", search=Range(0, 4), ge=0)
        mirror: bool | Literal["auto"] = setting("auto", "flip half of the images; auto: where a class survives it")

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        if info.num_classes < 2:
            raise HarnessError(f"supervised needs labels of at least 2 classes; {info.name} has {info.num_classes}")
        self.mirror = info.mirror_keeps_label if config.mirror == "auto" else config.mirror
        self.classifier = encoder.classifier(info.num_classes)

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        if batch.labels is None:
            raise HarnessError("supervised was given a batch without labels")
        view = shift_and_mirror(batch.images, batch.seeds, "supervised", self.config.shift, self.mirror)
        scores = self.classifier(self.encoder(view)).float()
        top1 = (scores.detach().argmax(1) == batch.labels).float().mean()
        return {"loss": functional.cross_entropy(scores, batch.labels), "top1": top1}
