"""MoCo v2: an image's query must match its key among thousands of keys that a slow copy of the network made earlier.

He, Fan, Wu, Xie & Girshick, "Momentum contrast for unsupervised visual representation learning", CVPR 2020 (arXiv
1911.05722): queue and momentum encoder. Chen, Fan, Girshick & He, "Improved baselines with momentum contrastive
learning", 2020 (arXiv 2003.04297): the MLP head, SimCLR's views, temperature 0.2.

Where this differs. The momentum rises to 1, as in the methods since; the paper keeps it at 0.999, which suits a million
images. On small data an image comes round before its last key has left the queue; that key is no negative, so it is left
out. Batches are not shuffled: what is shuffled over GPUs in the paper is one batch here, and batch norm of a whole batch
does not see its order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.contracts import Batch, Choice, DatasetInfo, Encoder, Method, PretrainingData, Range, setting
from harness.heads import MomentumTeacher, Queue, QueueLength, matrix_product, unit_rows
from harness.views import ViewConfig, ViewMaker

__all__ = ["MoCoV2", "info_nce_loss"]


def _logits(
    queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float, excluded: Tensor | None = None
) -> Tensor:
    """Cosines over temperature: with the own key in column 0, then with the negatives; -inf where `excluded`."""
    queries, keys, negatives = unit_rows(queries), unit_rows(keys), unit_rows(negatives)
    others = matrix_product(queries, negatives.T)
    if excluded is not None:
        others = others.masked_fill(excluded, -torch.inf)
    return torch.cat(((queries * keys).sum(1, keepdim=True), others), 1) / temperature


def info_nce_loss(
    queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float, excluded: Tensor | None = None
) -> Tensor:
    """Eq. 1 averaged over queries: -log of the own key's share in the softmax over it and the negatives.

    queries, keys (N, D), row i of both from image i; negatives (K, D); excluded (N, K) bool: what is no negative for a
    query -> scalar, at least float32. Chance is log(K + 1).
    """
    logits = _logits(queries, keys, negatives, temperature, excluded)
    return functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


class MoCoV2(Method):
    """MoCo v2"""

    tier = "ranked"
    family = "contrastive"
    year = 2020
    idea = "tell an image's key, made by a slow copy of the network, from a queue of earlier keys"
    source = "Chen, Fan, Girshick & He, 2020, arXiv 2003.04297; He et al., CVPR 2020, arXiv 1911.05722"
    views_per_image = 2

    class Config(ViewConfig):
        queue: QueueLength = setting(
            "auto",
            "keys kept as negatives; auto: a quarter of the images, 4096 at most",
            source="65,536 of 1.3 million images (section 4); 4096 of 50,000 in the authors' CIFAR-10 demonstration",
            search=Choice(("auto", 256, 1024, 4096)),
        )
        momentum: float = setting(
            0.99,
            "of the key encoder at the start; it rises to 1",
            source="0.999 throughout (section 4); 0.99 in the authors' CIFAR-10 demonstration",
            search=Range(0.9, 0.999),
            ge=0,
            le=1,
        )
        temperature: float = setting(
            0.2,
            "divides the cosines",
            source="0.2: Chen, Fan et al., 2020, section 3; 0.07: He et al., 2020",
            search=Range(0.05, 1, log=True),
            gt=0,
        )
        hidden: int = setting(256, "hidden units of the projector", source="2048: the width of its ResNet-50", ge=1)
        out: int = setting(
            128, "outputs of the projector", source="He et al., 2020, 3.3", search=Choice((64, 128, 256)), ge=1
        )

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.views = ViewMaker.of(config, info)
        features = encoder.pool(torch.zeros(1, *encoder.map_shape)).shape[1]
        self.projector = nn.Sequential(
            nn.Linear(features, config.hidden), nn.ReLU(inplace=True), nn.Linear(config.hidden, config.out)
        )
        self.teacher = MomentumTeacher(encoder, self.projector, config.momentum)
        self.queue = Queue(config.queue, config.out, info)

    def prepare(self, data: PretrainingData) -> None:
        self.queue.fit(len(data))

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        first, second = self.preview(batch).values()
        queries = self.projector(self.encoder.pool(self.encoder(first)))
        keys = unit_rows(self.teacher(second))
        # The logits normalise the queue, which copies it: what the backward pass needs may be overwritten after them.
        own = self.queue.of_images(batch.indices)
        logits = _logits(queries, keys, self.queue.embeddings, self.config.temperature, own)
        self.queue.push(keys, batch.indices)
        matched = torch.zeros(len(batch), dtype=torch.int64, device=logits.device)
        top1 = (logits.detach().argmax(1) == matched).float().mean()
        return {"loss": functional.cross_entropy(logits, matched), "retrieval": top1}

    def after_step(self, progress: Tensor) -> None:
        self.teacher.follow(self.encoder, self.projector, progress)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The query's and the key's view."""
        return {f"view {view}": self.views(batch.images, batch.seeds, f"moco_v2.{view}") for view in (1, 2)}
