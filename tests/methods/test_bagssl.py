"""BagSSL: patches of one size cut from one image, VICReg's equation on them, and that it learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from harness.contracts import Batch, DatasetInfo, HarnessError
from harness.encoders import build
from harness.methods.bagssl import BagSSL

PLAIN: dict[str, Any] = {"jitter": 0.0, "grayscale": 0.0, "mirror": False, "blur": 0.0}


def test_patches_are_squares_of_one_size_of_the_image_itself(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method(BagSSL), make_batch(range(32))
    assert method.side == 8  # a quarter of the area of 16 x 16 px
    squares = method.squares(batch)
    assert squares.shape == (32, 2, 3, 8, 8) and squares.dtype == torch.uint8
    places = set()
    for image, pair in zip(batch.images, squares, strict=True):
        windows = image.unfold(1, 8, 1).unfold(2, 8, 1)  # (3, 9, 9, 8, 8)
        for patch in pair:
            same = (windows == patch[:, None, None]).flatten(3).all(3).all(0)
            assert same.sum() == 1
            places.add(tuple(same.nonzero()[0].tolist()))
    assert {row for row, _ in places} == {column for _, column in places} == set(range(9))  # anywhere, borders included
    apart = (squares[:, 0] != squares[:, 1]).flatten(1).any(1)
    assert apart.float().mean() > 0.9  # one pair in 81 is the same place


@pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
def test_a_view_is_its_whole_square_stretched(share: float, make_method: Any, make_batch: Any) -> None:
    """The view maker draws no second crop inside the square."""
    method, batch = make_method(BagSSL, crop_scale=share, **PLAIN), make_batch(range(6))
    squares, views = method.squares(batch), method.preview(batch)
    size = method.views.size
    assert size >= method.side == round(16 * share**0.5)
    for number in (0, 1):
        floats = squares[:, number].float() / 255
        expected = torch.nn.functional.interpolate(floats, (size, size), mode="bilinear", align_corners=False)
        torch.testing.assert_close(views[f"patch {number + 1}"], expected, rtol=0, atol=1e-5)


def test_loss_against_vicreg_s_equations_in_float64(make_method: Any, make_batch: Any) -> None:
    """A loop over patches and outputs: invariance, variance below 1, covariances; as the authors' code scales them."""
    method, batch = make_method(BagSSL, **PLAIN), make_batch(range(12))
    with torch.no_grad():
        value = method.loss(batch, torch.tensor(0))["loss"].item()
        first, second = (
            method.projector(method.encoder.pool(method.encoder(view))).double().tolist()
            for view in method.preview(batch).values()
        )
    n, d = 12, 16
    invariance = math.fsum((first[i][k] - second[i][k]) ** 2 for i in range(n) for k in range(d)) / (n * d)
    variance = covariance = 0.0
    for rows in (first, second):
        means = [math.fsum(row[k] for row in rows) / n for k in range(d)]
        for j in range(d):
            for k in range(d):
                cov = math.fsum((row[j] - means[j]) * (row[k] - means[k]) for row in rows) / (n - 1)
                if j == k:
                    variance += max(0.0, 1 - math.sqrt(cov + 1e-4)) / d / 2
                else:
                    covariance += cov**2 / d
    assert value == pytest.approx((25 * invariance + 25 * variance + covariance) / 51, rel=1e-4)


def test_the_encoder_sees_patches_apart(make_method: Any, make_batch: Any) -> None:
    """What lies outside its two patches has no part in an image's embeddings, unlike `sc`."""
    method, batch = make_method(BagSSL, **PLAIN), make_batch(range(4))
    method.eval()
    changed = batch.images.clone()
    for image, seed in zip(range(4), batch.seeds.tolist(), strict=True):
        one = Batch(batch.images[image : image + 1], None, batch.indices[image : image + 1], torch.tensor([seed]))
        for row in range(16):
            for column in range(16):
                trial = one.images.clone()
                trial[..., row, column] = 255 - trial[..., row, column]
                if torch.equal(method.squares(replace(one, images=trial)), method.squares(one)):
                    changed[image, :, row, column] = 255 - changed[image, :, row, column]
    other = replace(batch, images=changed)
    assert (changed != batch.images).flatten(1).any(1).all()
    for one_view, other_view in zip(method.preview(batch).values(), method.preview(other).values(), strict=True):
        assert torch.equal(method.encoder(one_view), method.encoder(other_view))


def test_step_is_one_graph(make_method: Any, make_batch: Any, assert_one_graph: Callable[..., None]) -> None:
    assert_one_graph(make_method(BagSSL), make_batch(range(8)))


def test_patches_of_an_image_come_together_and_no_further(make_method: Any) -> None:
    """Images of one noisy colour: after training, patches of one image lie nearer than those of two, and spread stays."""
    from harness.augment import hash_seeds

    method, indices = make_method(BagSSL, **PLAIN), torch.arange(16)
    generator = torch.Generator().manual_seed(1)
    colours = torch.rand(16, 3, 1, 1, generator=generator) * 0.6 + 0.2
    images = ((colours + 0.15 * torch.randn(16, 3, 16, 16, generator=generator)).clamp(0, 1) * 255).to(torch.uint8)
    optimiser = torch.optim.Adam(method.parameters(), lr=3e-3)
    history = []
    for epoch in range(40):
        out = method.loss(Batch(images, None, indices, hash_seeds(0, epoch, indices)), torch.tensor(epoch))
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        history.append({name: float(value.detach()) for name, value in out.items()})
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    with torch.no_grad():
        batch = Batch(images, None, indices, hash_seeds(0, 99, indices))
        one, two = (method.projector(method.encoder.pool(method.encoder(v))) for v in method.preview(batch).values())
        distances = torch.cdist(one, two)
    assert (distances.argmin(1) == indices).float().mean() > 0.6
    assert float(one.std(0).mean()) > 0.3


def test_patches_too_small_are_refused(toy_info: DatasetInfo) -> None:
    info = replace(toy_info, image_size=(12, 16))
    with pytest.raises(HarnessError, match=r"0\.06 of 12 x 16 px has a side of 3 px, less than 4"):
        BagSSL(build("convnet_small", info), BagSSL.Config(crop_scale=0.06), info)
