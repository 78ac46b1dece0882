"""Inpainting: the hole has its size and place, only it counts, and it is painted better than by the mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo, HarnessError
from harness.encoders import build
from harness.methods.inpainting import Inpainting, hole_loss, square_holes

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(16, 16), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3,
    counts={"train": 64}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train",
    mirror_keeps_label=False,
)  # fmt: skip


def method_of(**config: Any) -> Inpainting:
    torch.manual_seed(0)
    return Inpainting(build("convnet_small", INFO), Inpainting.Config(**config), INFO)


def batch_of(count: int = 8, epoch: int = 0) -> Batch:
    noise = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    images = (torch.nn.functional.interpolate(noise, size=16, mode="bilinear") * 255).to(torch.uint8)
    return Batch(images, None, torch.arange(count), hash_seeds(0, epoch, torch.arange(count)))


def test_holes_are_squares_at_every_place_with_their_ring() -> None:
    hole, ring = square_holes(hash_seeds(0, 0, torch.arange(300)), "test", (10, 12), 5, 1)
    corners = set()
    for mask, edge in zip(hole[:, 0], ring[:, 0], strict=True):
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        top, left = int(rows[0]), int(columns[0])
        assert mask.sum() == 25 and mask[top : top + 5, left : left + 5].all()
        assert edge.sum() == 16 and not edge[top + 1 : top + 4, left + 1 : left + 4].any() and (mask | ~edge).all()
        corners.add((top, left))
    assert len(corners) == 6 * 8


def test_loss_against_loops_over_the_hole() -> None:
    painted, image = torch.rand(2, 3, 4, 5, 6, dtype=torch.float64)
    weight = torch.randint(0, 3, (3, 1, 5, 6)).double()
    total = counted = 0.0
    for b in range(3):
        for y in range(5):
            for x in range(6):
                for c in range(4):
                    share = float(weight[b, 0, y, x])
                    total += share * float(painted[b, c, y, x] - image[b, c, y, x]) ** 2
                    counted += share
    assert hole_loss(painted, image, weight).item() == pytest.approx(total / counted, rel=1e-12)


def test_the_hole_shows_the_mean_and_the_rest_is_the_image() -> None:
    method, batch = method_of(), batch_of()
    image, holed, weight = method.cut(batch)
    changed = (image != holed).any(1, keepdim=True)
    assert not (changed & (weight == 0)).any()
    assert float((weight > 0).double().mean()) == 0.25
    assert holed.permute(0, 2, 3, 1)[(weight > 0)[:, 0]].unique().tolist() == [0.5]
    assert weight.unique().tolist() == [0, 1, 10]


def test_what_is_outside_the_hole_does_not_count() -> None:
    method, batch = method_of(), batch_of()
    _, _, weight = method.cut(batch)
    pictures = []
    method.decoder.register_forward_hook(lambda _, inputs, output: pictures.append(output))
    loss = method.loss(batch, torch.tensor(0))["loss"]
    (slope,) = torch.autograd.grad(loss, pictures[0])
    assert not (slope * (weight == 0)).any() and (slope * (weight > 0)).any()


def test_step_is_one_graph() -> None:
    method, batch, step = method_of(), batch_of(), torch.tensor(0)
    compiled = torch.compile(method.loss, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for loss in (method.loss, compiled):
        value = loss(batch, step)["loss"]
        found.append((value, *torch.autograd.grad(value, list(method.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def trained(method: Inpainting, epochs: int, lr: float = 3e-3) -> list[dict[str, float]]:
    optimiser = torch.optim.Adam(method.parameters(), lr=lr)
    history = []
    for epoch in range(epochs):
        out = method.loss(batch_of(32, epoch), torch.tensor(epoch))
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        history.append({name: float(value.detach()) for name, value in out.items()})
    return history


def test_it_paints_better_than_the_mean_colour() -> None:
    assert trained(method_of(hidden=16), 30)[-1]["error_share"] < 0.8


def test_too_small_a_hole_is_refused() -> None:
    info = replace(INFO, image_size=(12, 16))
    with pytest.raises(HarnessError, match=r"a hole of 0.1 of 12 x 16 px has a side of 1 px, less than 2"):
        Inpainting(build("convnet_small", info), Inpainting.Config(hole=0.1), info)
