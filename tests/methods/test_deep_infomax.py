"""Deep InfoMax: the Jensen-Shannon estimator against loops, which pairs are own, one graph, and that it learns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo, HarnessError
from harness.encoders import build
from harness.methods.deep_infomax import DeepInfoMax, jensen_shannon_loss

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(16, 16), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3,
    counts={"train": 64}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train",
    mirror_keeps_label=False,
)  # fmt: skip


def method_of(**config: Any) -> DeepInfoMax:
    torch.manual_seed(0)
    return DeepInfoMax(build("convnet_small", INFO), DeepInfoMax.Config(**config), INFO)


def batch_of(count: int = 8, epoch: int = 0) -> Batch:
    noise = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    images = (torch.nn.functional.interpolate(noise, size=16, mode="bilinear") * 255).to(torch.uint8)
    return Batch(images, None, torch.arange(count), hash_seeds(0, epoch, torch.arange(count)))


def test_loss_against_equation_4() -> None:
    scores = torch.randn(5, 5, 7, dtype=torch.float64)
    own, others = [], []
    for i in range(5):
        for j in range(5):
            for place in range(7):
                score = float(scores[i, j, place])
                if i == j:
                    own.append(-math.log1p(math.exp(-score)))
                else:
                    others.append(math.log1p(math.exp(score)))
    expected = -(math.fsum(own) / len(own) - math.fsum(others) / len(others))
    assert jensen_shannon_loss(scores).item() == pytest.approx(expected, rel=1e-12)
    assert jensen_shannon_loss(torch.zeros(4, 4, 3)).item() == pytest.approx(2 * math.log(2), rel=1e-6)


def test_own_places_are_those_of_the_summary_s_image() -> None:
    """With summaries and places that carry their image's direction, only a true pairing has a low loss."""
    method = method_of(units=64)
    directions = 30 * torch.eye(64)[:8]
    method.of_summary.register_forward_hook(lambda *_: directions)
    method.of_place.register_forward_hook(lambda _, inputs, output: directions[:, :, None, None] + 0 * output)
    out = method.loss(batch_of(), torch.tensor(0))
    assert float(out["retrieval"]) == 1
    assert float(out["loss"].detach()) == pytest.approx(math.log1p(math.exp(-900 / 8)) + math.log(2), rel=1e-5)


def test_step_is_one_graph() -> None:
    method, batch, step = method_of(), batch_of(), torch.tensor(0)
    compiled = torch.compile(method.loss, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for loss in (method.loss, compiled):
        value = loss(batch, step)["loss"]
        found.append((value, *torch.autograd.grad(value, list(method.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def trained(method: DeepInfoMax, epochs: int, lr: float = 3e-3) -> list[dict[str, float]]:
    optimiser = torch.optim.Adam(method.parameters(), lr=lr)
    history = []
    for epoch in range(epochs):
        out = method.loss(batch_of(32, epoch), torch.tensor(epoch))
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        history.append({name: float(value.detach()) for name, value in out.items()})
    return history


def test_summaries_find_their_own_map() -> None:
    history = trained(method_of(), 25)
    assert history[-1]["retrieval"] > 0.4 and history[-1]["loss"] < 0.5 * history[0]["loss"]


def test_one_place_is_refused() -> None:
    info = replace(INFO, image_size=(8, 8))
    with pytest.raises(HarnessError, match=r"a map of 1 x 1 cells has one place only"):
        DeepInfoMax(build("convnet_small", info), DeepInfoMax.Config(), info)
