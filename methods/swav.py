"""SwAV: guess from one view of an image to which prototypes its other view was assigned, all prototypes used alike.

Caron, Misra, Mairal, Goyal, Bojanowski & Joulin, "Unsupervised learning of visual features by contrasting cluster
assignments", NeurIPS 2020 (arXiv 2006.09882). Codes are the batch's assignment under the constraint that every prototype
gets the same share of it, found by Sinkhorn & Knopp's iteration; without it one prototype would take all images.

Where this differs: fewer prototypes than images in a batch, so that the paper's queue for small batches is not needed;
prototypes learn from the first step on (the paper holds them for an epoch).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness.contracts import Batch, Choice, DatasetInfo, Encoder, Method, Range, setting
from harness.heads import matrix_product, projector, unit_rows, wide
from harness.multi_crop import NUM_GLOBAL, NUM_LOCAL, MultiCrop, MultiCropConfig

__all__ = ["SwAV", "sinkhorn", "swav_loss"]


@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Eq. 3 to 5: codes (..., B, K) of scores (..., B, K); a row sums to 1, a column to about B / K.

    `iterations` times: columns to equal sums, then rows. In logarithms, where exp(score / epsilon) cannot overflow.
    """
    logs = wide(scores) / epsilon
    for _ in range(iterations):
        logs = logs - logs.logsumexp(-2, keepdim=True)
        logs = logs - logs.logsumexp(-1, keepdim=True)
    return logs.exp()


def swav_loss(
    scores: Tensor, num_global: int, *, temperature: float = 0.1, epsilon: float = 0.05, iterations: int = 3
) -> Tensor:
    """Eq. 2, generalised to many crops as in eq. 6: cross-entropy of each view under the codes of the other global ones.

    scores (V, B, K): cosines of views to prototypes, `num_global` global views first -> scalar, the mean over pairs of
    different views and images. No gradient reaches the codes.
    """
    codes = sinkhorn(scores[:num_global], epsilon=epsilon, iterations=iterations)
    predicted = (wide(scores) / temperature).log_softmax(2)
    with torch.autocast(scores.device.type, enabled=False):
        pairs = torch.einsum("gbk,vbk->gv", codes, predicted)
    same = pairs.diagonal().sum()
    return (same - pairs.sum()) / (num_global * (len(scores) - 1) * scores.shape[1])


class SwAV(Method):
    """SwAV"""

    family = "clustering"
    year = 2020
    idea = "predict a view's balanced cluster assignment from another view of the image"
    source = "Caron, Misra, Mairal, Goyal, Bojanowski & Joulin, NeurIPS 2020, arXiv 2006.09882"
    views_per_image: ClassVar[int] = NUM_GLOBAL + NUM_LOCAL

    class Config(MultiCropConfig):
        prototypes: int = setting(
            100, "clusters", source="3000 with 4096 images a batch", search=Choice((50, 100, 300)), ge=2
        )
        temperature: float = setting(
            0.1, "divides the scores", source="appendix A.1", search=Range(0.05, 0.5, log=True), gt=0
        )
        epsilon: float = setting(
            0.05, "smoothness of the codes", source="appendix A.1", search=Range(0.02, 0.1, log=True), gt=0
        )
        iterations: int = setting(3, "of Sinkhorn & Knopp", source="section 3.1", ge=1)
        hidden: int = setting(256, "hidden units of the projector", source="2048 (appendix A.1)", ge=1)
        out: int = setting(32, "outputs of the projector", source="128 (appendix A.1)", ge=1)

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.crops = MultiCrop.of("swav", config, info, encoder)
        features = encoder.pool(torch.zeros(1, *encoder.map_shape)).shape[1]
        self.projector = projector(features, config.hidden, config.out)
        self.prototypes = nn.Parameter(torch.randn(config.prototypes, config.out))

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        parts = [self.projector(self.encoder.pool(self.encoder(v))) for v in self.crops.by_size(batch) if v is not None]
        embeddings = unit_rows(torch.cat(parts))
        scores = matrix_product(embeddings, unit_rows(self.prototypes).T).unflatten(0, (-1, len(batch)))
        config = self.config
        loss = swav_loss(
            scores, NUM_GLOBAL, temperature=config.temperature, epsilon=config.epsilon, iterations=config.iterations
        )
        hard = scores.detach()[:NUM_GLOBAL].argmax(2)
        return {"loss": loss, "agreement": (hard[0] == hard[1]).float().mean()}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Global and local views."""
        return self.crops.views(batch)
