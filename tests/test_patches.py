"""Patches: where they lie, what they depend on, how often they are drawn."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats

from harness.augment import hash_seeds
from harness.contracts import HarnessError, ReceptiveField
from harness.patches import (
    PatchGeometry,
    PatchSampler,
    crop_windows,
    hand_statistics,
    patch_means,
    patches_at,
    sample_patches,
)

STL = PatchGeometry((24, 24), (96, 96), 7, ReceptiveField(27, 4))
SEEDS = hash_seeds(5, 0, torch.arange(20_000))


def brute_force_disjoint(geometry: PatchGeometry) -> float:
    """Enumerate pixel sets along both axes, on the border-free plane."""
    field, cells = geometry.field, geometry.cells
    assert field is not None
    side = field.side + (cells - 1) * field.stride
    hits = total = 0
    rows, columns = geometry.places
    for r1, c1, r2, c2 in itertools.product(range(rows), range(columns), range(rows), range(columns)):
        common_rows = set(range(r1 * field.stride, r1 * field.stride + side)) & set(
            range(r2 * field.stride, r2 * field.stride + side)
        )
        common_columns = set(range(c1 * field.stride, c1 * field.stride + side)) & set(
            range(c2 * field.stride, c2 * field.stride + side)
        )
        hits += not (common_rows and common_columns)
        total += 1
    return hits / total


def test_published_figures() -> None:
    """paper.md, measured: sides 32 of 28, 34 of 32, 36 of 28 px; 18% disjoint at 7 of 24 cells, none at 13."""
    assert PatchGeometry((6, 6), (28, 28), 3, ReceptiveField(24, 4)).input_side == 32
    assert PatchGeometry((8, 8), (32, 32), 4, ReceptiveField(22, 4)).input_side == 34
    assert PatchGeometry((7, 7), (28, 28), 4, ReceptiveField(24, 4)).input_side == 36
    assert STL.p_disjoint == pytest.approx(0.1766, abs=1e-4)
    assert PatchGeometry((24, 24), (96, 96), 13, ReceptiveField(27, 4)).p_disjoint == 0
    for map_size, image, cells, side in (((6, 6), 28, 3, 24), ((8, 8), 32, 4, 22), ((7, 7), 28, 4, 24)):
        assert PatchGeometry(map_size, (image, image), cells, ReceptiveField(side, 4)).p_disjoint == 0


@pytest.mark.parametrize(
    ("map_size", "cells", "field"),
    [((8, 8), 2, ReceptiveField(5, 2)), ((5, 9), 2, ReceptiveField(6, 4)), ((6, 6), 1, ReceptiveField(9, 4))],
)
def test_p_disjoint_is_the_brute_force_count(map_size: tuple[int, int], cells: int, field: ReceptiveField) -> None:
    geometry = PatchGeometry(map_size, (32, 32), cells, field)
    assert geometry.p_disjoint == pytest.approx(brute_force_disjoint(geometry), rel=1e-12)


def test_windows_lie_where_the_arithmetic_says() -> None:
    """convnet_small at 28 px: cell (0, 0) begins 8 px before the image (conv5, pool, three padded 3 x 3 and a pool)."""
    geometry = PatchGeometry((6, 6), (28, 28), 1, ReceptiveField(24, 4))
    assert geometry.window((0, 0)) == (0, 16, 0, 16)
    assert geometry.window((2, 5)) == (0, 24, 12, 28)
    assert PatchGeometry((4, 4), (32, 32), 2, None).window((1, 2)) == (8, 24, 16, 32)


def test_patches_against_slices() -> None:
    maps = torch.randn(5, 3, 7, 6)
    corners = torch.tensor([[0, 0], [4, 3], [1, 2], [2, 0], [4, 1]])
    cut = patches_at(maps, 3, corners)
    for n, (row, column) in enumerate(corners.tolist()):
        assert torch.equal(cut[n], maps[n, :, row : row + 3, column : column + 3].permute(1, 2, 0))
    again = patches_at(maps, 3, corners[:2], torch.tensor([4, 0]))
    assert torch.equal(again[0], maps[4, :, 0:3, 0:3].permute(1, 2, 0))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_means_against_slices(layout: torch.memory_format) -> None:
    maps = torch.randn(4, 3, 7, 6, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    corners = torch.tensor([[[0, 0], [4, 3]], [[1, 2], [1, 2]], [[2, 0], [0, 1]], [[4, 1], [3, 2]]])
    means = patch_means(maps, 3, corners)
    expected = torch.stack([
        torch.stack([maps[n, :, r : r + 3, c : c + 3].mean((1, 2)) for r, c in corners[n].tolist()]) for n in range(4)
    ])  # fmt: skip
    assert torch.allclose(means, expected, rtol=1e-12)
    weights = torch.randn_like(means)
    mine, theirs = (torch.autograd.grad((out * weights).sum(), maps)[0] for out in (means, expected))
    assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-15)
    assert patch_means(maps.bfloat16(), 3, corners).dtype == torch.float32


def test_sample_patches() -> None:
    maps = torch.randn(6, 2, 5, 8)
    seeds = SEEDS[:6]
    cut = sample_patches(maps, 3, seeds=seeds)
    assert cut.shape == (6, 3, 3, 2)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.equal(sample_patches(maps[order], 3, seeds=seeds[order]), cut[order])
    draws = [sample_patches(maps, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    with pytest.raises(HarnessError, match="6 x 6 cells does not fit a map of 5 x 8"):
        sample_patches(maps, 6)


def test_sample_patches_is_uniform_over_places() -> None:
    places = torch.arange(35.0).reshape(1, 1, 5, 7).expand(len(SEEDS), 1, 5, 7)
    corner = sample_patches(places, 3, seeds=SEEDS)[:, 0, 0, 0].long()
    counts = torch.bincount(corner)
    assert stats.chisquare(counts[counts > 0]).pvalue > 1e-3 and (counts > 0).sum() == 3 * 5


def test_sampler_is_uniform_and_its_draws_independent() -> None:
    sampler = PatchSampler(PatchGeometry((6, 5), (28, 28), 3, ReceptiveField(24, 4)))
    drawn = sampler.draw(SEEDS, "test", 2)
    joint = torch.bincount(drawn[:, 0] * 12 + drawn[:, 1], minlength=144)
    assert stats.chisquare(joint).pvalue > 1e-3


def test_disjoint_draws_are_disjoint_and_uniform_over_pairs() -> None:
    geometry = PatchGeometry((8, 8), (32, 32), 2, ReceptiveField(5, 4))
    sampler = PatchSampler(geometry, disjoint=True)
    first, second = sampler.draw(SEEDS, "test", 2).T
    assert geometry.disjoint[first, second].all()
    places = len(geometry.corners)
    counts = torch.bincount(first * places + second, minlength=places**2)[geometry.disjoint.flatten()]
    assert stats.chisquare(counts).pvalue > 1e-3
    apart = (geometry.corners[first] - geometry.corners[second]).abs().amax(1) * 4
    assert (apart >= 9).all()


def test_stl_draws_share_no_pixel() -> None:
    sampler = PatchSampler(STL, disjoint=True)
    for first, second in sampler.draw(SEEDS[:300], "test", 2).tolist():
        a, b = (STL.window(tuple(STL.corners[place].tolist())) for place in (first, second))
        assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]


def test_hand_statistics() -> None:
    geometry = PatchGeometry((4, 4), (16, 16), 2, None)
    ramp = torch.arange(16.0).div(16).expand(1, 1, 16, 16)
    images = torch.cat((ramp, ramp.mT, torch.zeros(1, 1, 16, 16)))
    statistics = hand_statistics(images, geometry, torch.zeros(3, 2).long())
    assert statistics.shape == (3, 8)
    assert statistics[0, 0] == pytest.approx(3.5 / 16)
    assert statistics[0, 2:].tolist() == [1, 0, 0, 0, 0, 0]
    assert statistics[1, 2:].tolist() == [0, 0, 0, 1, 0, 0]
    assert statistics[2].tolist() == [0] * 8


def test_crops_have_the_size_of_the_images() -> None:
    images = torch.rand(3, 2, 28, 28)
    crops = crop_windows(images, PatchGeometry((6, 6), (28, 28), 1, ReceptiveField(24, 4)), torch.tensor([[0, 0]] * 3))
    assert crops.shape == images.shape and crops.min() >= 0 and crops.max() <= 1
