"""Autoencoder: the error is the plain one, made from the code alone, and it falls."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo
from harness.encoders import build
from harness.methods.autoencoder import Autoencoder

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(16, 16), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3,
    counts={"train": 64}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train",
    mirror_keeps_label=False,
)  # fmt: skip


def method_of(**config: Any) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(build("convnet_small", INFO), Autoencoder.Config(**config), INFO)


def batch_of(count: int = 8, epoch: int = 0) -> Batch:
    noise = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    images = (torch.nn.functional.interpolate(noise, size=16, mode="bilinear") * 255).to(torch.uint8)
    return Batch(images, None, torch.arange(count), hash_seeds(0, epoch, torch.arange(count)))


def test_loss_against_loops() -> None:
    method, batch = method_of(), batch_of(4)
    codes = []
    method.code.register_forward_hook(lambda _, inputs, output: codes.append(output))
    out = method.loss(batch, torch.tensor(0))
    assert codes[0].shape == (4, 64)
    restored = method.decode(codes[0]).double().flatten().tolist()
    pixels = (batch.images.double() / 255).flatten().tolist()
    squares = [(1 / (1 + math.exp(-a)) - b) ** 2 for a, b in zip(restored, pixels, strict=True)]
    assert float(out["loss"].detach()) == pytest.approx(math.fsum(squares) / len(squares), rel=1e-5)


def test_step_is_one_graph() -> None:
    method, batch, step = method_of(), batch_of(), torch.tensor(0)
    compiled = torch.compile(method.loss, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for loss in (method.loss, compiled):
        value = loss(batch, step)["loss"]
        found.append((value, *torch.autograd.grad(value, list(method.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def trained(method: Autoencoder, epochs: int, lr: float = 3e-3) -> list[dict[str, float]]:
    optimiser = torch.optim.Adam(method.parameters(), lr=lr)
    history = []
    for epoch in range(epochs):
        out = method.loss(batch_of(32, epoch), torch.tensor(epoch))
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        history.append({name: float(value.detach()) for name, value in out.items()})
    return history


def test_it_beats_the_mean_image() -> None:
    assert trained(method_of(hidden=16), 30)[-1]["error_share"] < 0.7
