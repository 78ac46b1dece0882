"""SwAV: Sinkhorn's marginals and oracle, the loss against lightly and a loop, codes without gradient."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo
from harness.encoders import build
from harness.methods.swav import SwAV, sinkhorn, swav_loss

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(28, 28), channels=1, mean=(0.5,), std=(0.25,),
    counts={}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train", mirror_keeps_label=False,
)  # fmt: skip
STEP = torch.tensor(0)


def method_of(**settings: Any) -> SwAV:
    torch.manual_seed(0)
    config = SwAV.Config(**{"prototypes": 5, "hidden": 16, "out": 8, "num_local": 1, "jitter": 0.0, **settings})
    return SwAV(build("convnet_small", INFO), config, INFO)


def batch_of(count: int = 6) -> Batch:
    indices = torch.arange(count)
    images = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Batch(images, None, indices, hash_seeds(0, 0, indices))


def scores_of(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1).requires_grad_()


@pytest.mark.parametrize("shape", [(5, 3), (40, 12), (8, 30)])
@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.5, 1)])
def test_codes_equal_lightlys(
    shape: tuple[int, int], epsilon: float, iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "LIGHTLY_DID_VERSION_CHECK", "True")
    module = pytest.importorskip("lightly.loss.swav_loss")
    scores = scores_of(*shape).detach()
    theirs = module.sinkhorn(scores.clone(), iterations=iterations, epsilon=epsilon)
    torch.testing.assert_close(sinkhorn(scores, epsilon=epsilon, iterations=iterations), theirs, atol=1e-9, rtol=1e-7)


def test_codes_marginals() -> None:
    scores = scores_of(2, 60, 8).detach()
    few, many = sinkhorn(scores), sinkhorn(scores, iterations=200)
    for codes in (few, many):
        torch.testing.assert_close(codes.sum(2), torch.ones(2, 60, dtype=torch.float64))
    torch.testing.assert_close(many.sum(1), torch.full((2, 8), 7.5, dtype=torch.float64), atol=1e-3, rtol=0)
    assert (few.sum(1) - 7.5).abs().max() < 3
    free = (scores / 0.05).softmax(2).sum(1)  # without the constraint columns are less even
    assert (free - 7.5).abs().max() > (few.sum(1) - 7.5).abs().max()


def test_codes_survive_scores_that_overflow() -> None:
    scores = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert torch.equal(sinkhorn(scores, epsilon=0.001), torch.eye(2))


@pytest.mark.parametrize(("views", "batch", "prototypes"), [(2, 6, 4), (5, 9, 7), (3, 4, 12)])
@pytest.mark.parametrize(("temperature", "epsilon"), [(0.1, 0.05), (0.5, 0.2)])
def test_loss_and_gradient_equal_lightlys(
    views: int, batch: int, prototypes: int, temperature: float, epsilon: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "LIGHTLY_DID_VERSION_CHECK", "True")
    module = pytest.importorskip("lightly.loss")
    scores = scores_of(views, batch, prototypes)
    oracle = module.SwaVLoss(temperature=temperature, sinkhorn_epsilon=epsilon)
    ours = swav_loss(scores, 2, temperature=temperature, epsilon=epsilon)
    theirs = oracle(list(scores[:2]), list(scores[2:]))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-8)
    gradients = [torch.autograd.grad(loss.sum(), scores)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-7)


def test_loss_is_the_swapped_prediction_in_a_loop() -> None:
    scores = scores_of(3, 4, 5)
    codes, terms = sinkhorn(scores[:2]), []
    for of in range(2):
        for view in range(3):
            for image in range(4):
                if of != view:
                    p = (scores[view, image] / 0.1).softmax(0)
                    terms.append(-sum(codes[of, image, k] * p[k].log() for k in range(5)))
    assert swav_loss(scores, 2).item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-10)


def test_codes_carry_no_gradient() -> None:
    scores = scores_of(2, 6, 4)
    assert not sinkhorn(scores).requires_grad
    (stopped,) = torch.autograd.grad(swav_loss(scores, 2), scores)
    logs = scores / 0.05
    for _ in range(3):
        logs = logs - logs.logsumexp(1, keepdim=True)
        logs = logs - logs.logsumexp(2, keepdim=True)
    log_p = (scores / 0.1).log_softmax(2)
    flowing = -(logs.exp().flip(0) * log_p).sum(2).mean()
    assert flowing.item() == pytest.approx(swav_loss(scores, 2).item())
    assert (torch.autograd.grad(flowing, scores)[0] - stopped).norm() > 0.1 * stopped.norm()


def test_method_scores_cosines_of_all_views() -> None:
    method, batch = method_of(), batch_of()
    views = list(method.preview(batch).values())
    parts = (torch.cat(views[:2]), views[2])
    z = torch.cat([method.projector(method.encoder.pool(method.encoder(part))) for part in parts])
    cosines = torch.cosine_similarity(z[:, None], method.prototypes[None], dim=2)
    expected = swav_loss(cosines.reshape(3, 6, 5), 2)
    torch.testing.assert_close(method.loss(batch, STEP)["loss"], expected, atol=1e-5, rtol=1e-5)
    before = method.prototypes.detach().clone()
    with torch.no_grad():
        method.prototypes.mul_(3)  # their length does not count
    torch.testing.assert_close(method.loss(batch, STEP)["loss"], expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(before, method.prototypes)


def test_step_is_one_graph() -> None:
    method, batch = method_of(), batch_of()
    compiled = torch.compile(method.loss, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for loss in (method.loss, compiled):
        value = loss(batch, STEP)["loss"]
        found.append((value, *torch.autograd.grad(value, [method.prototypes, *method.projector.parameters()])))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
