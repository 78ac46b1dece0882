"""Jigsaw: the set of orders is far apart, the tiles are dealt as it says, standardised, and it learns."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo, HarnessError
from harness.encoders import build
from harness.methods.jigsaw import Jigsaw, distant_permutations, standardise_tiles

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(28, 28), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3,
    counts={"train": 64}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train",
    mirror_keeps_label=False,
)  # fmt: skip


def method_of(**config: Any) -> Jigsaw:
    torch.manual_seed(0)
    return Jigsaw(build("convnet_small", INFO), Jigsaw.Config(**config), INFO)


def batch_of(count: int = 8, epoch: int = 0) -> Batch:
    noise = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    images = (torch.nn.functional.interpolate(noise, size=28, mode="bilinear") * 255).to(torch.uint8)
    return Batch(images, None, torch.arange(count), hash_seeds(0, epoch, torch.arange(count)))


def test_orders_are_different_permutations_far_apart() -> None:
    orders = distant_permutations(9, 64)
    assert all(sorted(order) == list(range(9)) for order in orders.tolist())
    apart = (orders[:, None] != orders).sum(2)[~torch.eye(64, dtype=torch.bool)]
    assert apart.min() == 7  # the sum alone, as printed, gives 2
    assert float(apart.double().mean()) > 8.1  # 8 for random orders


def test_greedy_choice_against_a_slow_loop() -> None:
    every = list(permutations(range(4)))

    def apart(a: tuple[int, ...], b: tuple[int, ...]) -> int:
        return sum(x != y for x, y in zip(a, b, strict=True))

    chosen = [every[0]]
    while len(chosen) < 10:
        chosen.append(max(every, key=lambda e: (min(apart(e, c) for c in chosen), sum(apart(e, c) for c in chosen))))
    assert distant_permutations(4, 10).tolist() == [list(order) for order in chosen]
    assert len({tuple(order) for order in distant_permutations(4, 24).tolist()}) == 24


def test_tiles_are_dealt_in_the_order_of_the_label() -> None:
    method = method_of()
    cell, side, jitter = 9, method.side, method.jitter
    assert (side, jitter) == (8, 1)
    columns = torch.arange(28) // cell
    places = (columns[:, None].clamp(max=2) * 3 + columns.clamp(max=2)).to(torch.uint8)
    indices = torch.arange(40)
    batch = Batch(places.expand(40, 3, 28, 28), None, indices, hash_seeds(0, 0, indices))
    tiles, order = method.puzzle(batch)
    shown = (tiles * 255).round().long()
    for image in range(40):
        for position, place in enumerate(method.permutations[order[image]].tolist()):
            # the left-over pixel of 28 = 3 x 9 + 1 may show the neighbour's edge
            assert int(shown[image, position].mode().values.mode().values.mode().values) == place
    assert len(set(order.tolist())) > 20


def test_tiles_are_standardised_for_the_network() -> None:
    tiles = torch.rand(5, 9, 3, 8, 8) * 0.3 + 0.5
    found = standardise_tiles(tiles)
    assert torch.allclose(found.mean((3, 4)), torch.zeros(5, 9, 3), atol=1e-5)
    assert torch.allclose(found.std((3, 4), correction=0), torch.ones(5, 9, 3), atol=0.05)
    assert not standardise_tiles(torch.full((1, 1, 3, 8, 8), 0.7)).abs().max() > 1e-3
    method, seen = method_of(), []
    method.encoder.body["conv1"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    method.loss(batch_of(), torch.tensor(0))
    assert seen[0].mean((2, 3)).abs().max() < 1e-4


def test_loss_against_loops() -> None:
    method, batch, seen = method_of(), batch_of(), []
    method.all.register_forward_hook(lambda _, inputs, output: seen.append(output))
    loss = float(method.loss(batch, torch.tensor(0))["loss"].detach())
    _, order = method.puzzle(batch)
    rows = seen[0].double().tolist()
    terms = [math.log(math.fsum(map(math.exp, row))) - row[k] for row, k in zip(rows, order.tolist(), strict=True)]
    assert loss == pytest.approx(math.fsum(terms) / 8, rel=1e-5)


def test_step_is_one_graph() -> None:
    method, batch, step = method_of(), batch_of(), torch.tensor(0)
    compiled = torch.compile(method.loss, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for loss in (method.loss, compiled):
        value = loss(batch, step)["loss"]
        found.append((value, *torch.autograd.grad(value, list(method.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def trained(method: Jigsaw, epochs: int, lr: float = 3e-3) -> list[dict[str, float]]:
    optimiser = torch.optim.Adam(method.parameters(), lr=lr)
    history = []
    for epoch in range(epochs):
        out = method.loss(batch_of(32, epoch), torch.tensor(epoch))
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        history.append({name: float(value.detach()) for name, value in out.items()})
    return history


def test_it_learns_the_order() -> None:
    history = trained(method_of(num_permutations=4), 25)
    assert history[-1]["loss"] < 0.6 * math.log(4)


def test_refusals_and_small_sets() -> None:
    info = replace(INFO, image_size=(12, 16))
    with pytest.raises(HarnessError, match=r"12 x 16 px in 3 x 3 cells give tiles of 3 px, less than 4"):
        Jigsaw(build("convnet_small", info), Jigsaw.Config(), info)
    assert len(method_of(grid=2, num_permutations=200).permutations) == 24
