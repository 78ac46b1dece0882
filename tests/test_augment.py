"""The counter-based randomness and the mild views, against slow references."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from scipy import stats

from harness import augment

MASK = (1 << 64) - 1


def slow_mix(x: int) -> int:
    """SplitMix64's finaliser in Python integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_uniform(seed: int, stream: str, counter: int) -> float:
    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
    return (slow_mix((slow_mix((seed + key) & MASK) + counter) & MASK) >> 40) * 2.0**-24


def test_uniform_matches_python_integers() -> None:
    seeds = augment.hash_seeds(3, 7, torch.arange(5))
    drawn = augment.uniform(seeds, "a stream", (2, 3))
    for row, seed in enumerate(seeds.tolist()):
        expected = [slow_uniform(seed & MASK, "a stream", c) for c in range(6)]
        assert drawn[row].flatten().tolist() == expected


def test_hash_seeds_matches_python_integers() -> None:
    expected = [slow_mix((slow_mix((slow_mix(11) + 4) & MASK) + i) & MASK) for i in range(4)]
    assert [s & MASK for s in augment.hash_seeds(11, 4, torch.arange(4)).tolist()] == expected


def test_uniform_is_uniform_and_streams_are_independent() -> None:
    seeds = augment.hash_seeds(0, 0, torch.arange(20_000))
    a, b = (augment.uniform(seeds, name).numpy() for name in ("one", "two"))
    assert stats.kstest(a, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.03
    assert a.min() >= 0 and a.max() < 1


def test_a_sample_does_not_depend_on_its_batch() -> None:
    indices = torch.arange(64)
    whole = augment.uniform(augment.hash_seeds(1, 2, indices), "s", (5,))
    parts = torch.cat([augment.uniform(augment.hash_seeds(1, 2, part), "s", (5,)) for part in indices.split(7)])
    assert torch.equal(whole, parts)


def test_integers_cover_the_range_evenly() -> None:
    seeds = augment.hash_seeds(5, 0, torch.arange(9_000))
    counts = torch.bincount(augment.integers(seeds, "k", 9), minlength=9).numpy()
    assert len(counts) == 9
    assert stats.chisquare(counts).pvalue > 1e-3


def test_permutation_is_one_and_changes_with_the_epoch() -> None:
    first, second = (augment.permutation(0, epoch, 1_000) for epoch in (0, 1))
    assert torch.equal(first.sort().values, torch.arange(1_000))
    assert (first == second).float().mean() < 0.02


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_shift_and_mirror_against_a_loop(mirror: bool, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, channels, 9, 11), dtype=torch.uint8, generator=generator)
    seeds = augment.hash_seeds(0, 0, torch.arange(6))
    out = augment.shift_and_mirror(images, seeds, "v", 2, mirror)
    moves = augment.integers(seeds, "v.shift", 5, (2,)) - 2
    flips = augment.uniform(seeds, "v.mirror") < 0.5
    for i in range(6):
        dy, dx = moves[i].tolist()
        for y in range(9):
            for x in range(11):
                column = 10 - x if mirror and flips[i] else x
                source = images[i, :, min(max(y + dy, 0), 8), min(max(column + dx, 0), 10)]
                assert torch.equal(out[i, :, y, x], source)
    assert out.dtype == torch.uint8
    assert augment.shift_and_mirror(images, seeds, "v", 0, False) is images


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moving_rows_or_pixels_gives_the_same(
    shift: int, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU moves rows, everything else pixels."""
    images = torch.rand(40, 3, 7, 10, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=layout)
    seeds = augment.hash_seeds(2, 0, torch.arange(40))
    rows = augment.shift_and_mirror(images, seeds, "v", shift, True)
    monkeypatch.setattr(augment, "chooses", lambda *_: False)
    pixels = augment.shift_and_mirror(images, seeds, "v", shift, True)
    assert torch.equal(rows, pixels) and rows.stride() == pixels.stride()
    assert not torch.equal(rows, images)


def test_draws_and_mild_views_can_be_compiled_whole() -> None:
    def step(images: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seeds = augment.hash_seeds(3, 1, indices)
        return augment.uniform(seeds, "s", (2,)), augment.shift_and_mirror(images, seeds, "v", 2, True)

    images, indices = torch.rand(6, 3, 5, 5), torch.arange(6)
    compiled = torch.compile(step, backend="eager", fullgraph=True)(images, indices)
    for one, two in zip(compiled, step(images, indices), strict=True):
        assert torch.equal(one, two)


def test_numbers_of_many_streams_at_once_are_those_of_each() -> None:
    seeds = augment.hash_seeds(3, 1, torch.arange(50))
    wanted: dict[str, tuple[int, ...]] = {"one": (), "two": (4,), "three": (2, 3)}
    found = augment.uniforms(seeds, wanted)
    assert list(found) == list(wanted)
    for stream, shape in wanted.items():
        assert torch.equal(found[stream], augment.uniform(seeds, stream, shape))
