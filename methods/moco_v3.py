"""MoCo v3, for convolutional networks: contrast predictions with a momentum teacher's keys of the same batch, no queue.

Chen, Xie & He, "An empirical study of training self-supervised vision transformers", ICCV 2021 (arXiv 2104.02057),
algorithm 1: MoCo's keys, BYOL's predictor, SimCLR's in-batch negatives. Heads have two layers with batch norm after the
first, as the other methods' have here; the paper's projector has three, its output batch norm too. Both views of a batch
pass each network in one forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harness.contracts import Batch, Choice, DatasetInfo, Encoder, Method, Range, setting
from harness.heads import MomentumTeacher, matrix_product, projector, unit_rows
from harness.views import ViewConfig, ViewMaker

__all__ = ["MoCoV3", "key_contrast_loss"]


def key_contrast_loss(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Algorithm 1's `ctr`: each query must be most like the key of its own image, times 2 temperature.

    queries, keys (N, D), row i of both from image i -> scalar, at least float32. No gradient reaches the keys. Chance is
    2 temperature log N; the factor keeps gradients of a size for all temperatures.
    """
    logits = matrix_product(unit_rows(queries), unit_rows(keys.detach()).T) / temperature
    return 2 * temperature * functional.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


class MoCoV3(Method):
    """MoCo v3"""

    tier = "ported"
    family = "contrastive"
    year = 2021
    idea = "MoCo with a predictor and the batch's own keys as negatives"
    source = "Chen, Xie & He, ICCV 2021, arXiv 2104.02057"
    views_per_image = 2

    class Config(ViewConfig):
        temperature: float = setting(
            0.2, "divides the cosines", source="0.2 for ViT-B (section 4)", search=Range(0.05, 1, log=True), gt=0
        )
        momentum: float = setting(
            0.99,
            "of the teacher at the start; it rises to 1",
            source="0.99 (section 4)",
            search=Range(0.9, 0.999),
            ge=0,
            le=1,
        )
        hidden: int = setting(
            512, "hidden units of projector and predictor", source="4096", search=Choice((256, 512, 1024)), ge=1
        )
        out: int = setting(128, "outputs of both", source="256", search=Choice((64, 128, 256)), ge=1)

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.views = ViewMaker.of(config, info)
        features = encoder.pool(torch.zeros(1, *encoder.map_shape)).shape[1]
        self.projector = projector(features, config.hidden, config.out)
        self.predictor = projector(config.out, config.hidden, config.out)
        self.teacher = MomentumTeacher(encoder, self.projector, config.momentum)

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        views = torch.cat(tuple(self.preview(batch).values()))
        queries = self.predictor(self.projector(self.encoder.pool(self.encoder(views)))).chunk(2)
        keys = self.teacher(views).chunk(2)
        there = key_contrast_loss(queries[0], keys[1], self.config.temperature)
        back = key_contrast_loss(queries[1], keys[0], self.config.temperature)
        return {"loss": there + back}

    def after_step(self, progress: Tensor) -> None:
        self.teacher.follow(self.encoder, self.projector, progress)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The two views."""
        return {f"view {view}": self.views(batch.images, batch.seeds, f"moco_v3.{view}") for view in (1, 2)}
