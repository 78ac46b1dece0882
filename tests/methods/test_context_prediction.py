"""Context prediction: patches never overlap and carry the right label; colours are dropped; it learns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo, HarnessError
from harness.encoders import build
from harness.methods.context_prediction import ContextPrediction, drop_colours

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(28, 28), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3, counts={},
    licence="", citation="", default_encoder="convnet_small", pretrain_split="train", mirror_keeps_label=False,
)  # fmt: skip


def method_of(size: tuple[int, int] = (28, 28), **config: Any) -> ContextPrediction:
    torch.manual_seed(0)
    info = replace(INFO, image_size=size)
    return ContextPrediction(build("convnet_small", info), ContextPrediction.Config(**config), info)


def batch_of(count: int = 8, size: tuple[int, int] = (28, 28), epoch: int = 0) -> Batch:
    images = torch.randint(0, 256, (count, 3, *size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Batch(images, None, torch.arange(count), hash_seeds(0, epoch, torch.arange(count)))


@pytest.mark.parametrize("size", [(28, 28), (32, 40), (96, 96)])
def test_patches_lie_inside_never_overlap_and_on_their_side(size: tuple[int, int]) -> None:
    method = method_of(size)
    corners = method.corners(hash_seeds(0, 0, torch.arange(200)))
    assert corners.min() >= 0
    assert (corners + method.side <= torch.tensor(size)).all()
    for first in range(9):
        for second in range(first):
            apart = (corners[:, first] - corners[:, second]).abs().amax(1)
            assert (apart >= method.side).all()
    for place, corner in enumerate(corners.unbind(1)):
        moved = corner - corners[:, 4]
        for axis, direction in enumerate((place // 3 - 1, place % 3 - 1)):
            if direction == 0:
                assert (moved[:, axis].abs() <= method.jitter).all()
            else:
                assert (moved[:, axis] * direction >= method.side).all()
    assert len({tuple(row) for row in corners[:, 0].tolist()}) > 1  # jittered


def test_proportions_of_the_paper_where_there_is_room() -> None:
    method = method_of((432, 432))
    assert (method.side, method.jitter) == (96, 14)
    assert method_of((28, 28)).side == 8


def test_each_pair_is_the_middle_and_its_neighbour_under_the_right_label() -> None:
    """With patches that say their own place, the pair head must see (middle, k-th neighbour) under label k."""
    method, seen = method_of(), []
    method.pair.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    method.each.register_forward_hook(lambda *_: torch.arange(8 * 9.0)[:, None].expand(-1, 256))
    out = method.loss(batch_of(), torch.tensor(0))
    places = seen[0].unflatten(0, (8, 8))
    neighbours = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8])
    for image in range(8):
        assert (places[image, :, 0] == 9 * image + 4).all()
        assert torch.equal(places[image, :, -1].long(), 9 * image + neighbours)
    scores = method.pair(seen[0]).double().tolist()
    terms = [math.log(math.fsum(map(math.exp, row))) - row[number % 8] for number, row in enumerate(scores)]
    assert float(out["loss"].detach()) == pytest.approx(math.fsum(terms) / len(terms), rel=1e-5)


def test_one_channel_is_kept_and_the_others_are_noise() -> None:
    squares, seeds = torch.rand(300, 3, 8, 8), hash_seeds(0, 0, torch.arange(300))
    found = drop_colours(squares, seeds, "test")
    kept = (found == squares).all(3).all(2)
    assert (kept.sum(1) == 1).all()
    assert kept.double().mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=0.1)
    for square, source, own in zip(found[:20], squares, kept, strict=False):
        channel = int(own.long().argmax())
        for other in {0, 1, 2} - {channel}:
            noise = square[other] - source[channel].mean()
            assert noise.abs().max() < 0.02 * source[channel].std()
            assert noise.std() > 0.003 * source[channel].std()


def test_grey_images_keep_their_one_channel() -> None:
    info = replace(INFO, channels=1, mean=(0.5,), std=(0.25,))
    method = ContextPrediction(build("convnet_small", info), ContextPrediction.Config(), info)
    assert not method.drops
    batch = batch_of()
    grey = Batch(batch.images[:, :1], None, batch.indices, batch.seeds)
    corner = method.corners(batch.seeds)[3, 4].tolist()
    cut = batch.images[3, :1, corner[0] : corner[0] + 8, corner[1] : corner[1] + 8] / 255
    assert torch.equal(method.patches(grey)[3, 4], cut)


def test_step_is_one_graph() -> None:
    method, batch, step = method_of(), batch_of(), torch.tensor(0)
    compiled = torch.compile(method.loss, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for loss in (method.loss, compiled):
        value = loss(batch, step)["loss"]
        found.append((value, *torch.autograd.grad(value, list(method.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_it_learns_where_a_patch_of_a_ramp_lies() -> None:
    method = method_of(drop_colours=False)
    ramp = (torch.arange(28)[:, None] * 5 + torch.arange(28) * 3).to(torch.uint8).expand(16, 3, 28, 28)
    optimiser = torch.optim.Adam(method.parameters(), lr=3e-3)
    for epoch in range(12):
        indices = torch.arange(16)
        out = method.loss(Batch(ramp, None, indices, hash_seeds(0, epoch, indices)), torch.tensor(epoch))
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
    assert float(out["top1"]) > 0.8


def test_small_images_are_refused_and_awkward_encoders_are_fed_enlarged_patches() -> None:
    with pytest.raises(HarnessError, match=r"12 x 12 px give cells of 4 px, which hold no patches of 4 px with a gap"):
        method_of((12, 12))
    method = method_of((16, 16))  # patches of 4 px are too small for this network by themselves
    assert method.side == 4 and method.squares.size == (16, 16)
    assert torch.isfinite(method.loss(batch_of(size=(16, 16)), torch.tensor(0))["loss"])
