"""DeepCluster: predict the cluster in which k-means on the network's own features has put the image.

Caron, Bojanowski, Joulin & Douze, "Deep clustering for unsupervised learning of visual features", ECCV 2018 (arXiv
1807.05520), section 3. Before each epoch all images are embedded, reduced by PCA, whitened and clustered, and the
classifier starts anew. Against the trivial solution where most images share a cluster, an image's loss is weighted by
the inverse size of its cluster (as often as the paper samples it).

Where we differ: mini-batch k-means on at most `num_fitted` images finds the centroids, all images are assigned; tens to
hundreds of clusters, not 10,000, on small sets; Sobel filters, which the paper puts first, would change the encoder.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn
from torch.nn import functional

from harness.augment import hash_seeds, mix, shift_and_mirror, to_float, uniform
from harness.contracts import (
    Batch,
    Choice,
    Config,
    DatasetInfo,
    Encoder,
    Method,
    PretrainingData,
    Range,
    setting,
)
from harness.encoders import set_batch_norm_statistics

__all__ = ["DeepCluster", "balanced_weights", "whitened_components"]

NUM_BATCHES = 64  # that set the batch norms before the first clustering


def whitened_components(features: Tensor, fitted: Tensor, width: int) -> Tensor:
    """Project (N, D) on the first `width` principal axes of `fitted` (n, D), unit variance each, unit length each row."""
    rows = fitted.double()
    mean = rows.mean(0)
    energy, axes = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    width = min(width, int((energy > 1e-10 * energy[-1].clamp_min(1e-30)).sum()) or 1)
    projected = (features.double() - mean) @ (axes[:, -width:] * energy[-width:].clamp_min(1e-30).rsqrt())
    return functional.normalize(projected, dim=1)


def balanced_weights(assignments: Tensor, count: int) -> Tensor:
    """Weights (count,) of clusters: (N,) int64 -> inverse to the sizes, so that each cluster that has images weighs the
    same in all and the mean over images is 1."""
    sizes = assignments.bincount(minlength=count)
    return len(assignments) / (sizes.clamp_min(1) * (sizes > 0).sum())


class DeepCluster(Method):
    """DeepCluster"""

    family = "clustering"
    year = 2018
    idea = "predict the k-means cluster of the network's own features"
    source = "Caron, Bojanowski, Joulin & Douze, ECCV 2018, arXiv 1807.05520"

    class Config(Config):
        num_clusters: int = setting(
            64, "clusters", source="10,000 for the 1,000 classes of ImageNet", search=Range(16, 512, log=True), ge=2
        )
        components: int = setting(
            32, "principal components that are clustered", source="256", search=Choice((16, 32, 64)), ge=1
        )
        num_fitted: int = setting(20_000, "images, spread evenly, that PCA and centroids are fitted on, at most", ge=2)
        shift: int = setting(2, "largest translation, pixels", source="random crops in the paper", ge=0)

    assignments: Tensor  # (N,): the cluster of each pretraining image
    weights: Tensor  # (K,): of an image in that cluster

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        count = sum(number for split, number in info.counts.items() if split != "test")
        self.mirror = info.mirror_keeps_label
        self.register_buffer("assignments", torch.zeros(max(1, count), dtype=torch.int64))
        self.register_buffer("weights", torch.ones(config.num_clusters))
        features = encoder.pool(torch.zeros(1, *encoder.map_shape)).shape[1]
        self.classifier = nn.Linear(features, config.num_clusters)

    def prepare(self, data: PretrainingData) -> None:
        """The first clusters are those of the untrained network, which needs its batch-norm statistics for it."""
        set_batch_norm_statistics(self.encoder, islice(data.batches(), NUM_BATCHES))

    @torch.no_grad()
    def on_epoch_start(self, data: PretrainingData, epoch: int) -> None:
        """Embed, cluster, assign, and start the classifier anew, from the seeds of the data and the epoch alone."""
        training = self.encoder.training
        self.encoder.eval()
        features, indices, salt = [], [], torch.zeros(1, dtype=torch.int64)
        for batch in data.batches():
            features.append(self.encoder.pool(self.encoder(batch.images)).float().cpu())
            indices.append(batch.indices.cpu())
            salt = mix(batch.seeds[:1].cpu() + epoch)
        self.encoder.train(training)
        every = torch.cat(features)
        chosen = torch.arange(0, len(every), max(1, len(every) // self.config.num_fitted))
        points = whitened_components(every, every[chosen], self.config.components).float().numpy()
        clusters = min(self.config.num_clusters, max(1, len(chosen) // 2))
        kmeans = MiniBatchKMeans(clusters, batch_size=2048, n_init=1, random_state=int(salt) & 0x7FFF_FFFF)
        found = torch.from_numpy(kmeans.fit(points[chosen.numpy()]).predict(points)).long()
        self.assignments[torch.cat(indices).to(self.assignments.device)] = found.to(self.assignments.device)
        self.weights.copy_(balanced_weights(found, self.config.num_clusters))
        rows = hash_seeds(int(salt), epoch, torch.arange(self.config.num_clusters))
        bound = self.classifier.in_features**-0.5
        drawn = (2 * uniform(rows, "deep_cluster.classifier", (self.classifier.in_features,)) - 1) * bound
        self.classifier.weight.copy_(drawn)
        self.classifier.bias.zero_()

    def view(self, batch: Batch) -> Tensor:
        """The images, mildly augmented, same type as `batch.images`."""
        return shift_and_mirror(batch.images, batch.seeds, "deep_cluster", self.config.shift, self.mirror)

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        scores = self.classifier(self.encoder.pool(self.encoder(self.view(batch)))).float()
        cluster = self.assignments[batch.indices]
        each = functional.cross_entropy(scores, cluster, reduction="none")
        top1 = (scores.detach().argmax(1) == cluster).float().mean()
        return {"loss": (each * self.weights[cluster]).mean(), "top1": top1}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The view."""
        return {"view": to_float(self.view(batch))}
