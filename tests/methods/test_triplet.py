"""Patch triplets: equation 2 against loops, who is whose negative, its degenerate case, and that it learns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo, HarnessError
from harness.encoders import build
from harness.methods.triplet import Triplet, distance_ratio_loss

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(28, 28), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3,
    counts={"train": 64}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train",
    mirror_keeps_label=False,
)  # fmt: skip


def method_of(**config: Any) -> Triplet:
    torch.manual_seed(0)
    return Triplet(build("convnet_small", INFO), Triplet.Config(**config), INFO)


def batch_of(count: int = 8, epoch: int = 0) -> Batch:
    noise = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    images = (torch.nn.functional.interpolate(noise, size=28, mode="bilinear") * 255).to(torch.uint8)
    return Batch(images, None, torch.arange(count), hash_seeds(0, epoch, torch.arange(count)))


def test_loss_against_equation_2() -> None:
    anchors, positives, negatives = torch.randn(3, 9, 12, dtype=torch.float64)
    terms = []
    for a, p, n in zip(anchors.tolist(), positives.tolist(), negatives.tolist(), strict=True):
        near, far = math.exp(-math.dist(a, p)), math.exp(-math.dist(a, n))
        terms.append(-math.log(near / (near + far)))
    found = distance_ratio_loss(anchors, positives, negatives)
    assert found.item() == pytest.approx(math.fsum(terms) / 9, rel=1e-12)


def test_coinciding_points_give_log_2_and_no_gradient() -> None:
    points = torch.ones(4, 6, requires_grad=True)
    loss = distance_ratio_loss(points, points.detach(), points.detach())
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert points.grad is not None and not points.grad.any()


def test_no_underflow_far_apart() -> None:
    far = torch.tensor([[0.0], [0.0]]), torch.tensor([[2000.0], [0.0]]), torch.tensor([[0.0], [2000.0]])
    assert distance_ratio_loss(*far).item() == pytest.approx(1000)


def test_the_negative_is_the_next_image_s_patch() -> None:
    method, batch, seen = method_of(), batch_of(5), []
    method.head.register_forward_hook(lambda _, inputs, output: seen.append(output.detach().double()))
    loss = float(method.loss(batch, torch.tensor(0))["loss"].detach())
    vectors = seen[0].reshape(5, 2, -1)
    terms = []
    for i in range(5):
        near = math.dist(vectors[i, 0].tolist(), vectors[i, 1].tolist())
        far = math.dist(vectors[i, 0].tolist(), vectors[(i + 1) % 5, 1].tolist())
        terms.append(math.log1p(math.exp(near - far)))
    assert loss == pytest.approx(math.fsum(terms) / 5, rel=1e-4)


def test_patches_are_cut_from_their_own_image_at_every_place() -> None:
    method = method_of()
    indices = torch.arange(200)
    own = indices.to(torch.uint8)[:, None, None, None].expand(200, 3, 28, 28)
    patches = method.patches(Batch(own, None, indices, hash_seeds(0, 0, indices)))
    assert patches.shape == (200, 2, 3, 14, 14)
    assert torch.equal((patches * 255).round().long().amin((1, 2, 3, 4)), indices)
    assert torch.equal((patches * 255).round().long().amax((1, 2, 3, 4)), indices)
    ramp = torch.arange(28, dtype=torch.uint8).expand(200, 3, 28, 28)
    lefts = (method.patches(Batch(ramp, None, indices, hash_seeds(0, 0, indices)))[..., 0, 0] * 255).round()[:, :, 0]
    assert set(lefts.flatten().tolist()) == set(range(15))
    assert (lefts[:, 0] != lefts[:, 1]).double().mean() > 0.85


def test_step_is_one_graph() -> None:
    method, batch, step = method_of(), batch_of(), torch.tensor(0)
    compiled = torch.compile(method.loss, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for loss in (method.loss, compiled):
        value = loss(batch, step)["loss"]
        found.append((value, *torch.autograd.grad(value, list(method.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def trained(method: Triplet, epochs: int, lr: float = 3e-3) -> list[dict[str, float]]:
    optimiser = torch.optim.Adam(method.parameters(), lr=lr)
    history = []
    for epoch in range(epochs):
        out = method.loss(batch_of(32, epoch), torch.tensor(epoch))
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        history.append({name: float(value.detach()) for name, value in out.items()})
    return history


def test_it_brings_patches_of_an_image_together() -> None:
    history = trained(method_of(patch=0.7), 20)
    assert sum(each["top1"] for each in history[-5:]) / 5 > 0.85


def test_too_small_a_patch_is_refused() -> None:
    info = replace(INFO, image_size=(12, 16))
    with pytest.raises(HarnessError, match=r"a patch of 0.2 of 12 x 16 px has a side of 2 px, less than 4"):
        Triplet(build("convnet_small", info), Triplet.Config(patch=0.2), info)
