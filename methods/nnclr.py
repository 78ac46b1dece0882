"""NNCLR: the positive of a view is not another view of its image but the nearest of the images seen before.

Dwibedi, Aytar, Tompson, Sermanet & Zisserman, "With a little help from my friends: nearest-neighbor contrastive learning
of visual representations", ICCV 2021 (arXiv 2104.14548). The projector has two layers in place of three. On small data
an image comes round before its last embedding has left the support set: that one is never its neighbour here, or the
method would fall back to SimCLR.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harness.contracts import Batch, Choice, DatasetInfo, Encoder, Method, PretrainingData, Range, setting
from harness.heads import Queue, QueueLength, matrix_product, projector, unit_rows
from harness.views import ViewConfig, ViewMaker

__all__ = ["NNCLR", "nearest", "nnclr_loss"]


def nearest(embeddings: Tensor, support: Tensor, excluded: Tensor | None = None) -> Tensor:
    """NN(z, Q) of section 3.2: the row of the support set with the largest cosine to each embedding; no gradient.

    embeddings (N, D), support (K, D) of unit length -> (N, D)
    excluded (N, K) bool: which rows must not be taken
    """
    with torch.no_grad():
        cosines = matrix_product(unit_rows(embeddings), unit_rows(support).T)
        if excluded is not None:
            cosines = cosines.masked_fill(excluded, -torch.inf)
        return support.index_select(0, cosines.argmax(1))


def nnclr_loss(neighbours: Tensor, predictions: Tensor, temperature: float) -> Tensor:
    """The loss of section 3.2 averaged over images.

    The neighbour of a view must be most like the prediction for the other view of its image.
    neighbours, predictions (N, D), row i of both from image i -> scalar, at least float32. Chance is log N.
    """
    scores = matrix_product(unit_rows(neighbours), unit_rows(predictions).T) / temperature
    return functional.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


class NNCLR(Method):
    """NNCLR"""

    tier = "ported"
    family = "contrastive"
    year = 2021
    idea = "contrast a view with the nearest neighbour of the image's other view"
    source = "Dwibedi, Aytar, Tompson, Sermanet & Zisserman, ICCV 2021, arXiv 2104.14548"
    views_per_image = 2

    class Config(ViewConfig):
        queue: QueueLength = setting(
            "auto",
            "embeddings kept as neighbours to choose from; auto: a quarter of the images, 4096 at most",
            source="98,304 of 1.3 million images (section 4.1)",
            search=Choice(("auto", 256, 1024, 4096)),
        )
        temperature: float = setting(
            0.1, "divides the cosines", source="0.1 (section 4.1)", search=Range(0.05, 1, log=True), gt=0
        )
        hidden: int = setting(
            512, "hidden units of projector and predictor", source="2048 and 4096 (section 4.1)", ge=1
        )
        out: int = setting(128, "outputs of both", source="256 (section 4.1)", search=Choice((64, 128, 256)), ge=1)

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.views = ViewMaker.of(config, info)
        features = encoder.pool(torch.zeros(1, *encoder.map_shape)).shape[1]
        self.projector = projector(features, config.hidden, config.out)
        self.predictor = projector(config.out, config.hidden, config.out)
        self.queue = Queue(config.queue, config.out, info)

    def prepare(self, data: PretrainingData) -> None:
        self.queue.fit(len(data))

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        views = torch.cat(tuple(self.preview(batch).values()))
        embeddings = self.projector(self.encoder.pool(self.encoder(views)))
        predictions = self.predictor(embeddings).chunk(2)
        own = self.queue.of_images(batch.indices)
        neighbours = [nearest(each.detach(), self.queue.embeddings, own) for each in embeddings.chunk(2)]
        # Symmetric, as in the paper's experiments: each view's neighbour with the other view's prediction.
        losses = [
            nnclr_loss(neighbour, prediction, self.config.temperature)
            for neighbour, prediction in zip(neighbours, reversed(predictions), strict=True)
        ]
        self.queue.push(unit_rows(embeddings.detach()[: len(batch)]), batch.indices)
        return {"loss": (losses[0] + losses[1]) / 2}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The two views."""
        return {f"view {view}": self.views(batch.images, batch.seeds, f"nnclr.{view}") for view in (1, 2)}
