"""Single-layer k-means: whitening against scikit-learn, activations against loops, the encoder's state and its fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor

from harness import checkpoint
from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo, HarnessError
from harness.methods.coates_kmeans import CoatesKMeans, KMeansEncoder, normalise_contrast, triangle, zca

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(20, 20), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3, counts={},
    licence="", citation="", default_encoder="convnet_small", pretrain_split="train", mirror_keeps_label=False,
)  # fmt: skip


class Textures:
    """60 images of smoothed noise in batches of 16, as pretraining data."""

    def __init__(self, seed: int = 0, info: DatasetInfo = INFO) -> None:
        noise = torch.rand(60, info.channels, 10, 10, generator=torch.Generator().manual_seed(0))
        large = torch.nn.functional.interpolate(noise, info.image_size, mode="bilinear")
        self.images, self.seed = (large * 255).to(torch.uint8), seed

    def batches(self, limit: int | None = None) -> Iterator[Batch]:
        for indices in torch.arange(60)[:limit].split(16):
            yield Batch(self.images[indices], None, indices, hash_seeds(self.seed, 0, indices))

    def embed(self, function: Any, limit: int | None = None) -> Tensor:
        return torch.cat([function(batch.images) for batch in self.batches(limit)])


def fitted(info: DatasetInfo = INFO, seed: int = 0, **config: Any) -> CoatesKMeans:
    method = CoatesKMeans(KMeansEncoder(info), CoatesKMeans.Config(**({"num_centroids": 12} | config)), info)
    method.prepare(Textures(seed, info))
    return method


def test_whitening_makes_the_covariance_the_identity_and_is_symmetric() -> None:
    rows = torch.randn(4000, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) + 3
    mean, matrix = zca(rows, 1e-12)
    white = (rows - mean) @ matrix
    assert torch.allclose(white.T @ white / len(rows), torch.eye(12, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(matrix, matrix.T)
    # scikit-learn whitens along the principal axes (and divides by n - 1); turned back from them it is ZCA
    pca = PCA(whiten=True).fit(rows.numpy())
    expected = pca.transform(rows.numpy()) @ pca.components_ * math.sqrt(4000 / 3999)
    assert np.allclose(white.numpy(), expected, atol=1e-6)


def test_whitening_is_damped_by_epsilon() -> None:
    rows = torch.randn(500, 3, dtype=torch.float64) * torch.tensor([3.0, 1.0, 0.0])
    mean, matrix = zca(rows, 0.5)
    variances = ((rows - mean) @ matrix).var(0, correction=0)
    own = rows.var(0, correction=0)
    assert torch.allclose(variances, own / (own + 0.5), rtol=0.05, atol=1e-9)


def test_triangle_against_loops() -> None:
    points, centroids = torch.randn(7, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    found = triangle(points, centroids)
    for point, row in zip(points.tolist(), found.tolist(), strict=True):
        distances = [math.dist(point, centre) for centre in centroids.tolist()]
        mean = math.fsum(distances) / 4
        assert row == pytest.approx([max(0.0, mean - distance) for distance in distances], abs=1e-9)
    assert 0.2 < float((found == 0).double().mean()) < 0.8


def test_contrast_normalisation_has_the_paper_s_constant() -> None:
    """sqrt(var + 10) where pixels are 0 to 255 (Coates & Ng, 2012)."""
    patches = torch.randint(0, 256, (5, 27)).double()
    expected = (patches - patches.mean(1, keepdim=True)) / (patches.var(1, correction=0, keepdim=True) + 10).sqrt()
    assert torch.allclose(normalise_contrast(patches / 255), expected)


def test_map_against_loops_over_patches() -> None:
    method = fitted(side=5)
    encoder, image = method.encoder, Textures().images[3:4]
    found = encoder(image)[0].double()
    pixels = image[0].double() / 255
    cells = torch.zeros(12, 16, 16, dtype=torch.float64)
    for row in range(16):
        for column in range(16):
            patch = pixels[:, row : row + 5, column : column + 5].flatten()
            white = (normalise_contrast(patch) - encoder.patch_mean.double()) @ encoder.whitening.double()
            distances = (encoder.centroids.double() - white).square().sum(1).sqrt()
            cells[:, row, column] = (distances.mean() - distances).clamp_min(0)
    for i in (0, 1):
        for j in (0, 1):
            quadrant = cells[:, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].mean((1, 2))
            assert torch.allclose(found[:, i, j], quadrant, atol=1e-4)
    assert torch.allclose(encoder.read(encoder(image), "gap")[0].double(), cells.mean((1, 2)), atol=1e-4)
    assert encoder.read(encoder(image), "quadrants").shape == (1, 48)


def test_centroids_are_as_good_as_full_k_means() -> None:
    method = fitted(patches_per_image=40)
    encoder = method.encoder
    patches = normalise_contrast(torch.cat([method._patches(batch) for batch in Textures().batches()]))
    white = ((patches - encoder.patch_mean) @ encoder.whitening).numpy()
    ours = float(np.square(white[:, None] - encoder.centroids.numpy()).sum(2).min(1).sum())
    assert ours < 1.1 * KMeans(12, n_init=1, random_state=0).fit(white).inertia_


def test_seeds_decide_and_state_survives_a_file(tmp_path: Path) -> None:
    method, again, other = fitted(side=5), fitted(side=5), fitted(side=5, seed=1)
    images = Textures().images
    features = method.encoder(images)
    assert torch.equal(features, again.encoder(images))
    assert not torch.equal(features, other.encoder(images))
    checkpoint.save_encoder(tmp_path, method.encoder.state_dict(), {})
    saved = checkpoint.load_encoder(tmp_path)
    fresh = KMeansEncoder(INFO)  # does not know how many centroids of which side were asked for
    assert saved is not None
    fresh.load_state_dict(saved[0])
    assert torch.equal(features, fresh(images)) and fresh.map_shape == method.encoder.map_shape == (12, 2, 2)
    assert not list(method.parameters())


def test_chunks_change_nothing_and_large_images_are_averaged_down() -> None:
    info = replace(INFO, image_size=(96, 96))
    method = fitted(info)
    assert method.encoder.image_size == (32, 32)
    images = Textures(info=info).images
    assert torch.equal(method.encoder(images)[:3], method.encoder(images[:3]))


def test_refusals_name_the_numbers() -> None:
    small = replace(INFO, image_size=(6, 9))
    with pytest.raises(HarnessError, match="patches of 6 px leave no quadrants of images of 6 x 9 px"):
        CoatesKMeans(KMeansEncoder(small), CoatesKMeans.Config(), small)
    with pytest.raises(HarnessError, match="60 patches make no 100 clusters"):
        fitted(num_centroids=100, patches_per_image=1)
