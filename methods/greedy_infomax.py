"""Greedy InfoMax: every stage of the network learns by its own contrastive loss; no gradient goes from stage to stage.

Löwe, O'Connor & Veeling, "Putting an end to end-to-end: gradient-isolated learning of representations", NeurIPS 2019
(arXiv 1905.11786). Contrastive predictive coding (see `cpc`), stage by stage: overlapping patches go through the network
one by one; of each stage's map of a patch the mean is taken; from it a linear map for each distance must tell which
patch lies that far below, among patches of the batch. As in their vision experiments there is no context network.

Where we differ: patches of 16 of 64 px become a quarter of the side every half patch, at least 8 px, stretched no more
than the network needs; every stage of the encoder that has weights is a module (there: three parts of a ResNet-50);
scores are divided by the root of their dimension; a negative is never the true patch itself. What is kept and
measured is the map of the whole image, as for every method here, where they average over patches.

The losses are summed: since they share no parameter, each stage gets the gradient of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from harness.augment import integers, shift_and_mirror, to_float
from harness.contracts import Batch, Choice, Config, DatasetInfo, Encoder, HarnessError, Method, setting
from harness.heads import SquareEncoder, wide
from harness.image_operations import cut_squares

__all__ = ["GreedyInfoMax", "sampled_info_nce_loss", "stages_with_weights"]

SHARE = 1 / 4  # of the image's side that is a patch's: 16 of 64 px
SMALLEST = 8  # pixels: below it most networks have no cell left


def sampled_info_nce_loss(predictions: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """InfoNCE with few negatives: mean of -log softmax of candidate 0 among 1 + K.

    predictions (N, D), candidates (N, 1 + K, D), the true one first -> scalar, at least float32, and how often the true
    one has the best score. Scores are products over the root of D. Chance is log(1 + K).
    """
    with torch.autocast(predictions.device.type, enabled=False):
        scores = (wide(candidates) @ wide(predictions)[:, :, None])[:, :, 0] / predictions.shape[1] ** 0.5
    hits = (scores.detach().argmax(1) == 0).float().mean()
    return -scores.log_softmax(1)[:, 0].mean(), hits


def stages_with_weights(encoder: Encoder, images: Tensor) -> dict[int, int]:
    """Which of `encoder.layers` have something to train, by position, and the channels of their maps.

    images (1, C, H, W), any that the encoder takes. A stage's map needs a gradient only if its own weights do.
    """
    training = encoder.training
    maps = encoder.eval().forward_apart(images)
    encoder.train(training)
    return {place: feature_map.shape[1] for place, feature_map in enumerate(maps) if feature_map.requires_grad}


class GreedyInfoMax(Method):
    """Greedy InfoMax"""

    family = "contrastive"
    year = 2019
    idea = "each stage of the network predicts the patches below by itself, with no gradient from the stage above"
    source = "Löwe, O'Connor & Veeling, NeurIPS 2019, arXiv 1905.11786"

    class Config(Config):
        distances: int = setting(
            3, "rows ahead that are predicted, at most", source="5", search=Choice((1, 2, 3, 4)), ge=1
        )
        negatives: int = setting(
            16, "patches of the batch that the true one is told from", source="16: authors' code",
            search=Choice((16, 64)), ge=1,
        )  # fmt: skip
        shift: int = setting(2, "largest translation, pixels", source="random crops", ge=0)

    grid: Tensor  # (rows * columns, 2)

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        height, width = info.image_size
        self.mirror = info.mirror_keeps_label
        self.side = max(SMALLEST, round(min(height, width) * SHARE))
        stride = self.side // 2
        self.rows, self.columns = ((pixels - self.side) // stride + 1 for pixels in (height, width))
        skipped = math.ceil(self.side / stride)  # rows down to the first patch that shares no pixel
        self.ahead = range(skipped, min(skipped + config.distances, max(self.rows, 0)))
        if min(height, width) < self.side or not self.ahead:
            raise HarnessError(
                f"greedy_infomax: {height} x {width} px hold {max(self.rows, 0)} rows of patches of {self.side} px, and "
                f"none lies clear of another ({skipped + 1} rows are needed)"
            )
        self.squares = SquareEncoder(encoder, info, self.side)
        channels = stages_with_weights(encoder, torch.zeros(1, info.channels, *self.squares.size))
        if len(channels) < 2:
            raise HarnessError(
                f"greedy_infomax: encoder {encoder.name} is one stage (of those with weights: {len(channels)}), and what is "
                "trained stage by stage needs at least 2"
            )
        self.places = tuple(channels)
        tops, lefts = (torch.arange(count) * stride for count in (self.rows, self.columns))
        self.register_buffer("grid", torch.cartesian_prod(tops, lefts), persistent=False)
        self.predict = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, width, bias=False) for _ in self.ahead) for width in channels.values()
        )

    def view(self, batch: Batch) -> Tensor:
        """The images, mildly augmented, same type as `batch.images`."""
        return shift_and_mirror(batch.images, batch.seeds, "greedy_infomax", self.config.shift, self.mirror)

    def stage_losses(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Scalars of each stage with weights: its loss, averaged over distances, and how often it is right."""
        squares = to_float(cut_squares(self.view(batch), self.grid.expand(len(batch), -1, -1), self.side))
        maps = self.encoder.forward_apart(self.squares.stretched(squares))
        losses, hits = [], []
        for place, heads in zip(self.places, self.predict, strict=True):
            vectors = wide(maps[place].mean((2, 3))).unflatten(0, (len(batch), self.rows, self.columns))
            assert isinstance(heads, nn.ModuleList)
            terms = [self._term(vectors, k, head, batch.seeds) for k, head in zip(self.ahead, heads, strict=True)]
            losses.append(torch.stack([loss for loss, _ in terms]).mean())
            hits.append(torch.stack([hit for _, hit in terms]).mean())
        return losses, hits

    def _term(self, vectors: Tensor, ahead: int, predict: nn.Module, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """vectors (B, rows, columns, D): from each, which one lies `ahead` rows below? Every stage gets the same draw."""
        predictions = predict(vectors[:, : self.rows - ahead].flatten(0, 2))
        below = vectors[:, ahead:].flatten(0, 2)
        count, own = len(below), torch.arange(len(below), device=below.device)
        shape = (count // len(seeds), self.config.negatives)
        others = 1 + integers(seeds, f"greedy_infomax.negatives.{ahead}", count - 1, shape).flatten(0, 1)
        places = torch.cat((own[:, None], (own[:, None] + others) % count), 1)
        candidates = below.index_select(0, places.flatten()).unflatten(0, places.shape)
        return sampled_info_nce_loss(predictions, candidates)

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        losses, hits = self.stage_losses(batch)
        return {"loss": torch.stack(losses).sum(), "retrieval": torch.stack(hits).mean(), "retrieval_last": hits[-1]}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The view that patches are cut from."""
        return {"view": to_float(self.view(batch))}
