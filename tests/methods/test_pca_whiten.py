"""pca_whiten: the identity as covariance of what was fitted, and scikit-learn's PCA component by component."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from harness.batches import Batches
from harness.contracts import DatasetInfo, HarnessError
from harness.methods.pca_whiten import PCAEncoder, PCAWhiten, principal_axes

INFO = DatasetInfo(
    name="toy", title="Toy", classes=("a", "b"), image_size=(8, 6), channels=3, mean=(0.3,) * 3, std=(0.2,) * 3,
    counts={}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train", mirror_keeps_label=False,
)  # fmt: skip


def images(count: int = 400, channels: int = 3, height: int = 8, width: int = 6) -> Tensor:
    """Noise, smoothed so that directions differ in variance."""
    generator = torch.Generator().manual_seed(count)
    noise = torch.rand(count, channels, height, width, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    return ((noise + 3 * smooth) * 50).to(torch.uint8)


def fitted(pixels: Tensor, info: DatasetInfo = INFO, batch_size: int = 64, **settings: Any) -> PCAWhiten:
    method = PCAWhiten(PCAWhiten.own_encoder(info), PCAWhiten.Config(**settings), info)
    method.prepare(Batches(pixels, None, batch_size=batch_size, seed=0, device=torch.device("cpu")))
    return method


@pytest.mark.parametrize("dimensions", [1, 10, 144])
def test_scikit_learns_components(dimensions: int) -> None:
    pixels = images()
    encoder = fitted(pixels, dimensions=dimensions, epsilon=0.0).encoder
    found = encoder.read(encoder(pixels), "whitened").numpy()
    rows = (pixels.double() / 255).flatten(1).numpy()
    expected = PCA(dimensions, whiten=True, svd_solver="full").fit_transform(rows)
    assert found.shape == expected.shape and found.dtype == np.float32
    signs = np.sign((found * expected).sum(0))
    np.testing.assert_allclose(found, expected * signs, atol=2e-3)
    np.testing.assert_allclose(np.cov(found.T.astype(np.float64)), np.eye(dimensions).squeeze(), atol=1e-3)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-3)


def test_epsilon_shrinks_each_component_by_what_it_should() -> None:
    pixels, epsilon = images(), 0.01
    encoder = fitted(pixels, dimensions=20, epsilon=epsilon).encoder
    features = encoder.pool(encoder(pixels)).double()
    variances = PCA(20).fit((pixels.double() / 255).flatten(1).numpy()).explained_variance_
    np.testing.assert_allclose(features.var(0).numpy(), variances / (variances + epsilon), rtol=1e-3)


def test_pixels_that_never_vary_do_no_harm() -> None:
    pixels = images()
    pixels[:, :, 0] = 7
    features = fitted(pixels, dimensions=144).encoder(pixels).flatten(1)
    assert torch.isfinite(features).all()
    # 18 of 144 directions hold no variance, so they come last and are zero but for rounding
    assert features[:, -18:].abs().max() < 1e-3 < features[:, :126].abs().max(0).values.min()


def test_signs_do_not_depend_on_the_solver() -> None:
    torch.manual_seed(0)
    half = torch.randn(30, 12, dtype=torch.float64)
    axes = principal_axes(half.T @ half, 12, 0.0)
    assert (axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all()


def test_batches_are_only_a_way_to_read() -> None:
    pixels = images()
    one, other = (fitted(pixels, batch_size=size).encoder.axes for size in (50, 400))
    torch.testing.assert_close(one, other)


def test_fitted_on_so_many_images_and_no_more() -> None:
    pixels = images()
    whole, part, spread = fitted(pixels), fitted(pixels, num_images=200), fitted(pixels[::2])
    assert torch.equal(part.encoder.axes, spread.encoder.axes)
    assert not torch.equal(part.encoder.axes, whole.encoder.axes)


def test_large_images_are_averaged_down() -> None:
    info = dataclasses.replace(INFO, image_size=(96, 96))
    pixels = images(40, 3, 96, 96)
    encoder = fitted(pixels, info, dimensions=16).encoder
    assert encoder.num_pixels == 3 * 32 * 32 and encoder.map_shape == (16, 1, 1)
    means = (pixels.double() / 255).reshape(40, 3, 32, 3, 32, 3).mean((3, 5)).flatten(1)
    torch.testing.assert_close(encoder.rows(pixels).double(), means, rtol=1e-5, atol=1e-6)


def test_saved_tensors_know_their_size() -> None:
    pixels = images()
    encoder = fitted(pixels, dimensions=17).encoder
    again = PCAEncoder(INFO)
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(pixels), encoder(pixels))
    assert again.classifier(5)(again(pixels)).shape == (400, 5)
    with pytest.raises(HarnessError, match="no readout 'gap'; it has whitened"):
        again.read(again(pixels), "gap")


def test_more_components_than_pixels_and_than_images() -> None:
    assert fitted(images(), dimensions=1000).count == 8 * 6 * 3
    with pytest.raises(HarnessError, match="20 images do not vary in 20 directions"):
        fitted(images(20), dimensions=20)


def test_what_it_says_of_itself() -> None:
    assert PCAWhiten.role is None and PCAWhiten.family == "floor" and not PCAWhiten.trains
