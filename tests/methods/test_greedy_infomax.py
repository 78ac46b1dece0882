"""Greedy InfoMax: InfoNCE against a loop, gradients that stay in their stage, which patches are told apart, and that it
learns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo, Encoder, HarnessError
from harness.encoders import build
from harness.methods.greedy_infomax import GreedyInfoMax, sampled_info_nce_loss

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(28, 28), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3,
    counts={"train": 64}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train",
    mirror_keeps_label=False,
)  # fmt: skip


def method_of(encoder: str = "convnet_small", **config: Any) -> GreedyInfoMax:
    torch.manual_seed(0)
    return GreedyInfoMax(build(encoder, INFO), GreedyInfoMax.Config(**config), INFO)


def batch_of(count: int = 8, epoch: int = 0) -> Batch:
    noise = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    images = (torch.nn.functional.interpolate(noise, size=28, mode="bilinear") * 255).to(torch.uint8)
    return Batch(images, None, torch.arange(count), hash_seeds(0, epoch, torch.arange(count)))


def test_loss_against_a_loop() -> None:
    predictions, candidates = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 4, 9, dtype=torch.float64)
    terms, hits = [], 0
    for prediction, row in zip(predictions.tolist(), candidates.tolist(), strict=True):
        scores = [math.fsum(a * b for a, b in zip(prediction, each, strict=True)) / 3 for each in row]
        terms.append(math.log(math.fsum(map(math.exp, scores))) - scores[0])
        hits += scores[0] == max(scores)
    loss, share = sampled_info_nce_loss(predictions, candidates)
    assert loss.item() == pytest.approx(math.fsum(terms) / 6, rel=1e-12)
    assert share.item() == pytest.approx(hits / 6)
    assert sampled_info_nce_loss(torch.ones(5, 3), torch.ones(5, 17, 3))[0].item() == pytest.approx(math.log(17))


@pytest.mark.parametrize("encoder", ["convnet_small", "resnet18_small", "paper_mnist", "vit_tiny"])
def test_a_stage_s_loss_reaches_that_stage_alone_and_every_stage_has_one(encoder: str) -> None:
    """Every layer's parameters belong to one stage; what follows the map (a ViT's class token) to none."""
    method = method_of(encoder)
    losses, _ = method.stage_losses(batch_of(1))
    assert len(losses) == len(method.places) > 2
    named = dict(method.encoder.named_parameters())
    reached: list[set[str]] = []
    for loss, heads in zip(losses, method.predict, strict=True):
        slopes = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
        reached.append({n for n, slope in zip(named, slopes, strict=True) if slope is not None})
        own = torch.autograd.grad(loss, list(method.predict.parameters()), retain_graph=True, allow_unused=True)
        touched = [id(p) for p, s in zip(method.predict.parameters(), own, strict=True) if s is not None]
        assert touched == [id(p) for p in heads.parameters()]
    everything = [name for stage in reached for name in stage]
    assert len(everything) == len(set(everything))
    assert set(everything) == {name for name in named if not name.startswith("class_token")}


def test_stages_apart_see_the_values_of_the_whole() -> None:
    """Also when activations are made again in the backward pass, and then with the same gradient."""
    method, images = method_of(), batch_of(4).images
    found = []
    for saving in (False, True):
        method.encoder.activation_checkpointing = saving
        apart = method.encoder.train().forward_apart(images)
        whole = method.encoder.forward_layers(images, method.encoder.layers)
        assert all(torch.equal(one, other) for one, other in zip(apart, whole, strict=True))
        found.append(torch.autograd.grad(torch.stack([m.square().mean() for m in apart]).sum(),
                                         list(method.encoder.parameters())))  # fmt: skip
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_without_the_stop_gradient_lower_stages_get_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = method_of(), batch_of(4)
    parameters = list(method.encoder.parameters())
    blocked = torch.autograd.grad(method.loss(batch, torch.tensor(0))["loss"], parameters)

    def end_to_end(encoder: Encoder, images: Tensor) -> tuple[Tensor, ...]:
        return encoder.forward_layers(images, encoder.layers)

    monkeypatch.setattr(type(method.encoder), "forward_apart", end_to_end)
    flowing = torch.autograd.grad(method.loss(batch, torch.tensor(0))["loss"], parameters)
    same = [torch.allclose(one, other, rtol=1e-3, atol=1e-7) for one, other in zip(blocked, flowing, strict=True)]
    last = [name.startswith("body.conv4") for name, _ in method.encoder.named_parameters()]
    assert same == last


def test_the_true_patch_lies_below_and_is_no_negative_of_its_own() -> None:
    """A patch's vector is a code of its own, a linear map moves it down: only by the right distance is the task solved."""
    method = method_of(distances=1, negatives=64)
    count = 4 * method.rows * method.columns
    vectors = 100 * torch.eye(count).reshape(4, method.rows, method.columns, count)
    seeds = hash_seeds(0, 0, torch.arange(4))
    assert list(method.ahead) == [2]
    for down, solved in ((2, True), (1, False), (3, False)):
        head = torch.nn.Linear(count, count, bias=False)
        head.weight.data.copy_(torch.eye(count).roll(method.columns * down, 0))
        loss, hits = method._term(vectors, 2, head, seeds)
        assert (float(loss.detach()) < 1e-6) == solved and (float(hits) == 1) == solved


def test_step_is_one_graph() -> None:
    method, batch, step = method_of(distances=1), batch_of(4), torch.tensor(0)
    compiled = torch.compile(method.loss, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for loss in (method.loss, compiled):
        value = loss(batch, step)["loss"]
        found.append((value, *torch.autograd.grad(value, list(method.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_every_stage_learns_the_colour_below() -> None:
    """Images of one colour each: about 1 in 8 negatives is as right as the true patch, so that each stage's loss falls
    from log 17 towards log 3."""
    method, indices = method_of(distances=1), torch.arange(8)
    colours = torch.randint(0, 256, (8, 3, 1, 1), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    optimiser = torch.optim.Adam(method.parameters(), lr=1e-2)
    history = []
    for epoch in range(16):
        batch = Batch(colours.expand(8, 3, 28, 28), None, indices, hash_seeds(0, epoch, indices))
        losses, _ = method.stage_losses(batch)
        optimiser.zero_grad()
        torch.stack(losses).sum().backward()
        optimiser.step()
        history.append(torch.stack(losses).detach())
    assert (history[-1] < 0.8 * math.log(17)).all() and (history[-1] < 0.85 * history[0]).all(), history


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    with pytest.raises(HarnessError, match="torchvision:squeezenet1_1 is one stage") as error:
        info = replace(INFO, image_size=(64, 64))
        GreedyInfoMax(build("torchvision:squeezenet1_1", info), GreedyInfoMax.Config(), info)
    assert "\n" not in str(error.value)
    info = replace(INFO, image_size=(14, 28))
    with pytest.raises(HarnessError, match=r"14 x 28 px hold 2 rows of patches of 8 px, .* \(3 rows are needed\)"):
        GreedyInfoMax(build("convnet_small", info), GreedyInfoMax.Config(), info)

    class Closed(type(build("convnet_small", INFO))):  # type: ignore[misc]
        forward_apart = Encoder.forward_apart

    closed = build("convnet_small", INFO)
    closed.__class__ = Closed
    with pytest.raises(HarnessError, match="convnet_small cannot be taken apart into stages"):
        GreedyInfoMax(closed, GreedyInfoMax.Config(), INFO)
