"""Denoising autoencoder: the noise has its law, the decoder fits any map, the error falls."""

from __future__ import annotations

import pytest
import torch

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo
from harness.encoders import build
from harness.heads import decoder
from harness.methods.denoising_autoencoder import DenoisingAutoencoder, add_gaussian, mask_pixels

SEEDS = hash_seeds(0, 0, torch.arange(64))
INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(16, 16), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3, counts={},
    licence="", citation="", default_encoder="convnet_small", pretrain_split="train", mirror_keeps_label=False,
)  # fmt: skip


def test_masking_takes_whole_pixels_at_its_level() -> None:
    images = torch.rand(64, 3, 16, 16) * 0.9 + 0.1
    found = mask_pixels(images, SEEDS, "test", 0.3)
    gone = found == 0
    assert torch.equal(gone.all(1), gone.any(1))
    assert float(gone.float().mean()) == pytest.approx(0.3, abs=0.015)
    assert torch.equal(found[~gone], images[~gone])


def test_gaussian_noise_has_its_moments_and_stays_in_range() -> None:
    noise = add_gaussian(torch.full((64, 3, 16, 16), 0.5), SEEDS, "test", 0.1) - 0.5
    assert float(noise.mean()) == pytest.approx(0, abs=0.002)
    assert float(noise.std()) == pytest.approx(0.1, rel=0.02)
    assert float((noise.abs() < 0.1).float().mean()) == pytest.approx(0.6827, abs=0.01)
    strong = add_gaussian(torch.rand(64, 1, 8, 8), SEEDS, "test", 0.9)
    assert strong.min() >= 0 and strong.max() <= 1


@pytest.mark.parametrize(
    ("map_shape", "image_shape"),
    [((5, 1, 1), (3, 28, 28)), ((8, 8, 8), (1, 8, 8)), ((4, 7, 5), (3, 29, 33)), ((4, 3, 3), (3, 96, 96))],
)
def test_decoder_reaches_any_size(map_shape: tuple[int, int, int], image_shape: tuple[int, int, int]) -> None:
    assert decoder(map_shape, image_shape, 6)(torch.randn(2, *map_shape)).shape == (2, *image_shape)


@pytest.mark.parametrize("noise", ["masking", "gaussian"])
def test_it_comes_nearer_to_the_clean_image_than_its_input(noise: str) -> None:
    torch.manual_seed(0)
    method = DenoisingAutoencoder(
        build("convnet_small", INFO), DenoisingAutoencoder.Config(noise=noise, hidden=16), INFO
    )
    coarse = torch.rand(64, 3, 2, 2)
    images = (torch.nn.functional.interpolate(coarse, size=16, mode="bilinear") * 255).to(torch.uint8)
    optimiser = torch.optim.Adam(method.parameters(), lr=3e-3)
    indices = torch.arange(64)
    for epoch in range(40):
        out = method.loss(Batch(images, None, indices, hash_seeds(0, epoch, indices)), torch.tensor(epoch))
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
    assert float(out["error_share"]) < 0.7
