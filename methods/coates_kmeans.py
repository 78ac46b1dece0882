"""One layer of k-means: small patches, whitened, described by which of K centroids they are nearer to than usual.

Coates, Lee & Ng, "An analysis of single-layer networks in unsupervised feature learning", AISTATS 2011, sections 3.1-3.2,
with its best settings: whitening, stride 1, 6 px patches of 32 px images, the soft "triangle" activation, quadrants.

Where we differ: fewer centroids by default (up to 4,000 in the paper; the probe reads four times as many features);
scikit-learn's mini-batch k-means in place of full passes; quadrants are averaged, not summed, which standardising
the features undoes; larger images are averaged down to about 32 px first, the size that the paper worked at.
The two small constants are those of Coates & Ng, "Learning feature representations with k-means", 2012, section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn
from torch.nn import functional

from harness.augment import integers, mix, to_float
from harness.contracts import (
    Batch,
    Choice,
    Config,
    DatasetInfo,
    Encoder,
    HarnessError,
    Method,
    PretrainingData,
    Range,
    setting,
)
from harness.image_operations import cut_squares
from harness.methods.pixels import PixelEncoder

__all__ = ["CoatesKMeans", "KMeansEncoder", "normalise_contrast", "triangle", "zca"]

SIDE = 32  # pixels that images are averaged down to
CONTRAST_FLOOR = 10 / 255**2  # added to a patch's variance: 10 where pixels are 0 to 255
CHUNK = 4_000_000  # numbers of the K-channel map held at once
BUFFERS = ("patch_mean", "whitening", "centroids")


def normalise_contrast(patches: Tensor) -> Tensor:
    """Each patch (..., D) to mean 0 and, nearly, standard deviation 1."""
    centred = patches - patches.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + CONTRAST_FLOOR).rsqrt()


def zca(patches: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Mean (D,) and symmetric whitening matrix (D, D) of patches (N, D): V (E + epsilon)^-1/2 V^T, both float64."""
    rows = patches.double()
    mean = rows.mean(0)
    energy, axes = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    return mean, (axes * (energy.clamp_min(0) + epsilon).rsqrt()) @ axes.T


def triangle(points: Tensor, centroids: Tensor) -> Tensor:
    """max(0, mean distance - distance) to each centroid: (..., D) and (K, D) -> (..., K). About half are 0."""
    squared = points.square().sum(-1, keepdim=True) - 2 * points @ centroids.T + centroids.square().sum(1)
    distances = squared.clamp_min(0).sqrt()
    return functional.relu(distances.mean(-1, keepdim=True) - distances)


class KMeansEncoder(PixelEncoder):
    """No parameters, three buffers. The map is the 2 x 2 grid of quadrants: (B, K, 2, 2)."""

    readouts = ("quadrants", "gap")
    patch_mean: Tensor  # (D,)
    whitening: Tensor  # (D, D)
    centroids: Tensor  # (K, D)

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info, "kmeans")
        self.shrink = max(1, round(min(info.image_size) / SIDE))
        self.image_size = (info.image_size[0] // self.shrink, info.image_size[1] // self.shrink)
        self.make_room(side=1, count=1)
        # Which sizes were chosen is not known before the method is built, but saved tensors say it.
        self.register_load_state_dict_pre_hook(_take_sizes)

    def make_room(self, side: int, count: int) -> None:
        """Buffers for `count` centroids of patches of `side` pixels, all zero."""
        self.side, width = side, self.channels * side**2
        for name, shape in zip(BUFFERS, ((width,), (width, width), (count, width)), strict=True):
            self.register_buffer(name, torch.zeros(shape, device=self.mean.device))

    @property
    def map_shape(self) -> tuple[int, int, int]:
        return (len(self.centroids), 2, 2)

    def shrunk(self, images: Tensor) -> Tensor:
        """uint8 or floats in [0, 1] -> float32, averaged down."""
        images = to_float(images).to(self.mean.dtype)
        return functional.avg_pool2d(images, self.shrink) if self.shrink > 1 else images

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            images = self.shrunk(images)
            cells = images.shape[2] * images.shape[3]
            chunks = images.split(max(1, CHUNK // (len(self.centroids) * cells)))
            return torch.cat([self._quadrants(chunk) for chunk in chunks])

    def _quadrants(self, images: Tensor) -> Tensor:
        rows, columns = (side - self.side + 1 for side in images.shape[2:])
        patches = functional.unfold(images, self.side).transpose(1, 2)  # (B, places, D)
        white = (normalise_contrast(patches) - self.patch_mean) @ self.whitening
        active = triangle(white, self.centroids).transpose(1, 2).unflatten(2, (rows, columns))
        return functional.adaptive_avg_pool2d(active, 2)

    def pool(self, feature_map: Tensor) -> Tensor:
        return feature_map.mean((2, 3))

    def read(self, feature_map: Tensor, readout: str) -> Tensor:
        return self.pool(feature_map) if readout == "gap" else super().read(feature_map, readout)


def _take_sizes(encoder: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    assert isinstance(encoder, KMeansEncoder)
    centroids = state.get(f"{prefix}centroids")
    if centroids is not None and centroids.shape != encoder.centroids.shape:
        count, width = centroids.shape
        encoder.make_room(round((width / encoder.channels) ** 0.5), count)


class CoatesKMeans(Method):
    """Single-layer k-means"""

    trains = False
    tier = "ranked"
    family = "dictionary"
    year = 2011
    idea = "describe small whitened patches by their distances to k-means centroids; no network, no gradient"
    source = "Coates, Lee & Ng, AISTATS 2011"

    class Config(Config):
        num_centroids: int = setting(
            400, "features per quadrant", source="100 to 4,000: section 4.3", search=Range(100, 1600, log=True), ge=2
        )
        side: int = setting(
            6, "side of a patch, pixels", source="6 is best: section 4.5", search=Choice((5, 6, 8)), ge=2
        )
        whitening: float = setting(
            0.1, "added to the variances before whitening", source="0.1: Coates & Ng, 2012",
            search=Range(0.01, 1, log=True), gt=0,
        )  # fmt: skip
        num_images: int = setting(8000, "images that patches come from, spread evenly, at most", ge=1)
        patches_per_image: int = setting(16, "patches of each", source="400,000 in all: Coates & Ng, 2012", ge=1)

    encoder: KMeansEncoder

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.size = self.encoder.image_size
        if min(self.size) <= config.side:
            raise HarnessError(
                f"coates_kmeans: patches of {config.side} px leave no quadrants of images of "
                f"{self.size[0]} x {self.size[1]} px; lower method.side"
            )
        self.encoder.make_room(config.side, config.num_centroids)

    @classmethod
    def own_encoder(cls, info: DatasetInfo) -> Encoder:
        return KMeansEncoder(info)

    def prepare(self, data: PretrainingData) -> None:
        """Draw patches, whiten them, cluster them. The seeds of the data decide every draw."""
        parts, salt = [], 0
        for batch in data.batches(self.config.num_images):
            parts.append(self._patches(batch).cpu())
            salt = salt or int(mix(batch.seeds[:1])) & 0x7FFF_FFFF
        patches = normalise_contrast(torch.cat(parts)).double()
        if len(patches) < self.config.num_centroids:
            raise HarnessError(
                f"coates_kmeans: {len(patches):,} patches make no {self.config.num_centroids:,} clusters; "
                "lower method.num_centroids"
            )
        mean, whitening = zca(patches, self.config.whitening)
        white = ((patches - mean) @ whitening).float().numpy()
        # 3 random starts on a sample, then the best goes on: scikit-learn's own defaults but for the larger batch.
        kmeans = MiniBatchKMeans(self.config.num_centroids, batch_size=4096, n_init=3, random_state=salt).fit(white)
        found = (mean, whitening, torch.from_numpy(kmeans.cluster_centers_))
        for name, value in zip(BUFFERS, found, strict=True):
            getattr(self.encoder, name).copy_(value)

    def _patches(self, batch: Batch) -> Tensor:
        """(N, D) patches, as `unfold` lays them out."""
        images, side = self.encoder.shrunk(batch.images), self.config.side
        corners = [
            integers(batch.seeds, f"coates_kmeans.{axis}", pixels - side + 1, (self.config.patches_per_image,))
            for axis, pixels in enumerate(images.shape[2:])
        ]
        return cut_squares(images, torch.stack(corners, 2), side).flatten(0, 1).flatten(1)

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError("coates_kmeans is never trained")
