"""DCGAN: both losses against loops, each network's gradient is that of its own loss, statistics, and that both learn."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from harness.augment import hash_seeds, to_float
from harness.contracts import Batch, DatasetInfo
from harness.encoders import build
from harness.methods.dcgan import DCGAN, discriminator_loss, generator_loss

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(16, 16), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3,
    counts={"train": 64}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train",
    mirror_keeps_label=False,
)  # fmt: skip


def method_of(**config: Any) -> DCGAN:
    torch.manual_seed(0)
    return DCGAN(build("convnet_small", INFO), DCGAN.Config(**config), INFO)


def batch_of(count: int = 8, epoch: int = 0) -> Batch:
    noise = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    images = (torch.nn.functional.interpolate(noise, size=16, mode="bilinear") * 255).to(torch.uint8)
    return Batch(images, None, torch.arange(count), hash_seeds(0, epoch, torch.arange(count)))


def test_losses_against_their_definitions() -> None:
    real, fake = torch.randn(2, 7, dtype=torch.float64)
    sigmoid = [[1 / (1 + math.exp(-score)) for score in scores.tolist()] for scores in (real, fake)]
    told = -math.fsum(map(math.log, sigmoid[0])) / 7 - math.fsum(math.log(1 - p) for p in sigmoid[1]) / 7
    assert discriminator_loss(real, fake).item() == pytest.approx(told, rel=1e-12)
    assert generator_loss(fake).item() == pytest.approx(-math.fsum(map(math.log, sigmoid[1])) / 7, rel=1e-12)


def test_each_network_has_the_gradient_of_its_own_loss() -> None:
    """Against two separate backward passes through plain copies."""
    method, batch = method_of(), batch_of()
    other = copy.deepcopy(method)
    method.loss(batch, torch.tensor(0))["loss"].backward()

    def score(images: torch.Tensor) -> torch.Tensor:
        return other.head(other.encoder(images).flatten(1))[:, 0]

    fake = other.generated(batch.seeds)
    judges = [*other.encoder.parameters(), *other.head.parameters()]
    told = discriminator_loss(score(to_float(batch.images)), score(fake.detach()))
    expected = torch.autograd.grad(told, judges)
    found = [*method.encoder.parameters(), *method.head.parameters()]
    for parameter, slope in zip(found, expected, strict=True):
        assert parameter.grad is not None and torch.allclose(parameter.grad, slope, rtol=1e-4, atol=1e-7)
    expected = torch.autograd.grad(generator_loss(score(fake)), list(other.generator.parameters()))
    for parameter, slope in zip(method.generator.parameters(), expected, strict=True):
        assert parameter.grad is not None and torch.allclose(parameter.grad, slope, rtol=1e-4, atol=1e-7)


def test_running_statistics_are_those_of_real_images() -> None:
    method, batch = method_of(), batch_of()
    other = copy.deepcopy(method.encoder)
    method.loss(batch, torch.tensor(0))
    other(to_float(batch.images))
    for (name, one), (_, two) in zip(method.encoder.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(one, two), name


def test_step_is_one_graph() -> None:
    method, batch, step = method_of(), batch_of(), torch.tensor(0)
    compiled = torch.compile(method.loss, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for loss in (method.loss, compiled):
        value = loss(batch, step)["loss"]
        found.append((value, *torch.autograd.grad(value, list(method.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_discriminator_tells_and_the_generator_comes_nearer() -> None:
    method = method_of()
    groups = {
        "judge": [*method.encoder.parameters(), *method.head.parameters()],
        "maker": [*method.generator.parameters()],
    }
    for name, loss in (("judge", "discriminator"), ("maker", "generator")):
        optimiser = torch.optim.Adam(groups[name], lr=1e-3)
        history = []
        for epoch in range(8):
            out = method.loss(batch_of(16, epoch), torch.tensor(epoch))
            method.zero_grad()
            out["loss"].backward()
            optimiser.step()
            history.append(float(out[loss]))
        assert history[-1] < 0.8 * history[0], name


def test_published_rates_are_its_own() -> None:
    assert DCGAN.defaults["optim.lr"] == 2e-4 and DCGAN.defaults["optim.beta1"] == 0.5
