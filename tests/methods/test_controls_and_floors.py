"""random_init, supervised, pixels, pixels_svm, hog: what every run is measured beside."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo, HarnessError
from harness.encoders import EncoderConfig, build
from harness.methods.hog import Hog
from harness.methods.pixels import Pixels
from harness.methods.pixels_svm import PixelsSVM
from harness.methods.random_init import RandomInit
from harness.methods.supervised import Supervised

INFO = DatasetInfo(
    name="toy", title="Toy", classes=("a", "b"), image_size=(28, 28), channels=1, mean=(0.3,), std=(0.2,),
    counts={"train": 8}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train",
    mirror_keeps_label=True,
)  # fmt: skip
STEP = torch.tensor(0)


class Noise:
    """96 images of noise, class 1 brighter, as pretraining data that counts how often it is read."""

    def __init__(self, size: int = 28, channels: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(96) % 2
        images = torch.randint(0, 128, (96, channels, size, size), generator=generator, dtype=torch.uint8)
        self.images = images + 100 * self.labels.to(torch.uint8)[:, None, None, None]
        self.read = 0

    def batch(self, indices: Tensor, labelled: bool = False) -> Batch:
        labels = self.labels[indices] if labelled else None
        return Batch(self.images[indices], labels, indices, hash_seeds(0, 0, indices))

    def batches(self, limit: int | None = None) -> Iterator[Batch]:
        for indices in torch.arange(96)[:limit].split(32):
            self.read += len(indices)
            yield self.batch(indices)

    def embed(self, function: Any, limit: int | None = None) -> Tensor:
        return torch.cat([function(batch.images) for batch in self.batches(limit)])


def test_random_init_sets_batch_norm_statistics_and_nothing_else() -> None:
    encoder, data = build("convnet_small", INFO), Noise()
    before = {key: value.clone() for key, value in encoder.named_parameters()}
    method = RandomInit(encoder, RandomInit.Config(), INFO)
    method.prepare(data)
    norm = next(module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d))
    assert data.read == 96 and norm.num_batches_tracked == 3 and norm.momentum == 0.1
    assert not torch.allclose(norm.running_mean, torch.zeros(16))
    assert all(torch.equal(before[key], value) for key, value in encoder.named_parameters())
    features = encoder.eval()(data.images)  # a standard normal after ReLU has standard deviation 0.58
    assert 0.4 < features.std() < 0.8
    assert not RandomInit.trains and RandomInit.role == "control"


def test_random_init_without_batch_norm_reads_nothing() -> None:
    encoder, data = build(EncoderConfig(norm="group"), INFO), Noise()
    RandomInit(encoder, RandomInit.Config(), INFO).prepare(data)
    assert data.read == 0


def test_supervised_learns_and_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    method, data = Supervised(build("paper_mnist", INFO), Supervised.Config(), INFO), Noise()
    assert method.mirror and Supervised.supervised
    optimiser = torch.optim.SGD(method.parameters(), lr=0.05)
    history = []
    for _ in range(4):
        for indices in torch.arange(96).split(32):
            out = method.loss(data.batch(indices, labelled=True), STEP)
            optimiser.zero_grad()
            out["loss"].backward()
            optimiser.step()
            history.append(out["loss"].item())
    assert history[-1] < 0.5 * history[0]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in method.parameters())


def test_supervised_refuses_what_has_no_labels() -> None:
    unlabelled = dataclasses.replace(INFO, classes=None)
    with pytest.raises(HarnessError, match="toy has 0"):
        Supervised(build("convnet_small", INFO), Supervised.Config(), unlabelled)
    method = Supervised(build("convnet_small", INFO), Supervised.Config(), INFO)
    with pytest.raises(HarnessError, match="without labels"):
        method.loss(Noise().batch(torch.arange(4)), STEP)


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3)])
def test_pixels(size: int, channels: int) -> None:
    info = dataclasses.replace(
        INFO, image_size=(size, size), channels=channels, mean=(0.3,) * channels, std=(0.2,) * channels
    )
    images = Noise(size, channels).images
    encoder = Pixels.own_encoder(info)
    assert encoder.readouts == ("pixels",) and not list(encoder.parameters())
    features = encoder.read(encoder(images), "pixels")
    assert torch.equal(features, (images.float() / 255).flatten(1))
    assert tuple(encoder(images).shape[1:]) == encoder.map_shape
    assert encoder.classifier(5)(encoder(images)).shape == (96, 5)
    with pytest.raises(HarnessError, match="no readout 'gap'; it has pixels"):
        encoder.read(encoder(images), "gap")
    assert Pixels.evaluators == ("linear_probe", "knn") and PixelsSVM.evaluators == ("svm",)
    assert {PixelsSVM.role, Pixels.role, Hog.role} == {"floor"}


@pytest.mark.parametrize(("size", "channels", "cell"), [(28, 1, 4), (32, 3, 5), (96, 3, 14), (8, 1, 2)])
def test_hog_is_scikit_images(size: int, channels: int, cell: int) -> None:
    from skimage.feature import hog

    info = dataclasses.replace(INFO, image_size=(size, size), channels=channels)
    images = Noise(size, channels).images[:3]
    encoder = Hog.own_encoder(info)
    features = encoder.read(encoder(images), "hog")
    assert tuple(encoder(images).shape[1:]) == encoder.map_shape and features.dtype == torch.float32
    for image, row in zip(images, features, strict=True):
        picture = (image.float() / 255).permute(1, 2, 0).numpy()
        reference = hog(picture, 9, (cell, cell), (2, 2), channel_axis=-1, block_norm="L2-Hys")
        np.testing.assert_allclose(np.sort(row.numpy()), np.sort(reference), atol=1e-6)


def test_hog_refuses_tiny_images() -> None:
    with pytest.raises(HarnessError, match="these are 3 x 3 px"):
        Hog.own_encoder(dataclasses.replace(INFO, image_size=(3, 3)))
