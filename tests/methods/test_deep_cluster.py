"""DeepCluster: whitening, balanced weights, the loss and clusters against loops and scikit-learn, the pass per epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo
from harness.encoders import build
from harness.methods.deep_cluster import DeepCluster, balanced_weights, whitened_components

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(16, 16), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3,
    counts={"train": 64}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train",
    mirror_keeps_label=False,
)  # fmt: skip


def method_of(**config: Any) -> DeepCluster:
    torch.manual_seed(0)
    return DeepCluster(build("convnet_small", INFO), DeepCluster.Config(**config), INFO)


def batch_of(count: int = 8, epoch: int = 0) -> Batch:
    noise = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    images = (torch.nn.functional.interpolate(noise, size=16, mode="bilinear") * 255).to(torch.uint8)
    return Batch(images, None, torch.arange(count), hash_seeds(0, epoch, torch.arange(count)))


class Stripes:
    """64 images of four kinds of stripes under noise, in batches of 20 (the last of 4)."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.kinds = seed, torch.arange(64) % 4
        place = torch.arange(16)
        across, down = (place // 2 % 2).expand(16, 16), (place // 4 % 2).expand(16, 16)
        kinds = torch.stack((across, across.T, down, down.T)) * 150
        noise = torch.randint(0, 60, (64, 3, 16, 16), generator=torch.Generator().manual_seed(0))
        self.images = (kinds[self.kinds][:, None] + noise).to(torch.uint8)

    def batch(self, indices: Tensor, epoch: int = 0) -> Batch:
        return Batch(self.images[indices], None, indices, hash_seeds(self.seed, epoch, indices))

    def batches(self, limit: int | None = None) -> Iterator[Batch]:
        for indices in torch.arange(64)[:limit].split(20):
            yield self.batch(indices)

    def embed(self, function: Any, limit: int | None = None) -> Tensor:
        return torch.cat([function(batch.images) for batch in self.batches(limit)])


def test_components_are_white_and_rows_have_unit_length() -> None:
    rows = torch.randn(300, 10, dtype=torch.float64) @ torch.randn(10, 10, dtype=torch.float64) + 2
    found = whitened_components(rows, rows, 4)
    expected = torch.from_numpy(PCA(4, whiten=True, svd_solver="full").fit_transform(rows.numpy())).flip(1)
    expected = torch.nn.functional.normalize(expected, dim=1)
    signs = (found * expected).sum(0).sign()
    assert torch.allclose(found, expected * signs, atol=1e-8)
    dead = torch.cat((rows, torch.zeros(300, 6)), 1)  # a feature that never fires has no axis
    assert whitened_components(dead, dead, 16).shape == (300, 10)


def test_clusters_weigh_the_same() -> None:
    assignments = torch.tensor([0] * 6 + [2] * 3 + [3])
    weights = balanced_weights(assignments, 5)
    each = weights[assignments]
    assert float(each.mean()) == pytest.approx(1)
    for cluster in (0, 2, 3):
        assert float(each[assignments == cluster].sum()) == pytest.approx(10 / 3)


def test_loss_against_loops() -> None:
    method, batch, seen = method_of(num_clusters=5), batch_of(), []
    method.assignments[:8] = torch.tensor([0, 0, 0, 0, 0, 1, 1, 4])
    method.weights.copy_(balanced_weights(method.assignments[:8], 5))
    method.classifier.register_forward_hook(lambda _, inputs, output: seen.append(output))
    loss = float(method.loss(batch, torch.tensor(0))["loss"].detach())
    total = 0.0
    for row, cluster in zip(seen[0].double().tolist(), method.assignments[:8].tolist(), strict=True):
        size = {0: 5, 1: 2, 4: 1}[cluster]
        total += (math.log(math.fsum(map(math.exp, row))) - row[cluster]) * 8 / (3 * size)
    assert loss == pytest.approx(total / 8, rel=1e-5)


def test_an_epoch_starts_with_clusters_of_like_images_and_a_new_classifier() -> None:
    method, data = method_of(num_clusters=4, components=8), Stripes()
    method.prepare(data)
    method.train()
    places = method.assignments.data_ptr(), method.classifier.weight.data_ptr()
    method.on_epoch_start(data, 0)
    assert normalized_mutual_info_score(data.kinds, method.assignments) > 0.6
    assert method.encoder.training
    first = {name: value.clone() for name, value in method.state_dict().items()}
    method.on_epoch_start(data, 0)
    assert all(torch.equal(first[name], value) for name, value in method.state_dict().items())
    method.on_epoch_start(data, 1)
    assert not torch.equal(first["classifier.weight"], method.classifier.weight)
    assert first["classifier.weight"].abs().max() <= 64**-0.5 and first["classifier.weight"].std() > 0.05
    assert places == (method.assignments.data_ptr(), method.classifier.weight.data_ptr())  # what a graph has captured


def test_clusters_stand_still_within_an_epoch_and_carry_no_gradient() -> None:
    """The loss sees the clusters as given: training the network moves none of them, only the next epoch's start does."""
    method, data = method_of(num_clusters=4, components=8), Stripes()
    method.prepare(data)
    method.on_epoch_start(data, 0)
    before = method.assignments.clone(), method.weights.clone()
    optimiser = torch.optim.SGD(method.parameters(), lr=0.5)
    for step in range(3):
        method.loss(data.batch(torch.arange(64)), torch.tensor(step))["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert torch.equal(method.assignments, before[0]) and torch.equal(method.weights, before[1])
    assert not method.assignments.requires_grad and not method.weights.requires_grad
    method.on_epoch_start(data, 1)
    assert not torch.equal(method.assignments, before[0])
    assert method.classifier.weight.requires_grad and method.classifier.weight.is_leaf


def test_seeds_of_the_data_decide() -> None:
    weights = []
    for seed in (0, 0, 1):
        method = method_of(num_clusters=4)
        method.on_epoch_start(Stripes(seed), 0)
        weights.append(method.classifier.weight.detach().clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_step_is_one_graph() -> None:
    method, batch, step = method_of(), batch_of(), torch.tensor(0)
    compiled = torch.compile(method.loss, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for loss in (method.loss, compiled):
        value = loss(batch, step)["loss"]
        found.append((value, *torch.autograd.grad(value, list(method.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_it_learns_its_clusters() -> None:
    method, data = method_of(num_clusters=4, components=8, shift=0), Stripes()
    method.prepare(data)
    optimiser = torch.optim.Adam(method.parameters(), lr=3e-3)
    method.on_epoch_start(data, 0)
    for epoch in range(15):
        out = method.loss(data.batch(torch.arange(64), epoch), torch.tensor(epoch))
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
    assert float(out["top1"]) > 0.9
