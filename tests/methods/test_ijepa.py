"""I-JEPA: blocks and context, the loss in a loop, the teacher, what cannot leak."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo, HarnessError
from harness.encoders import build
from harness.methods.ijepa import IJEPA, block_places, context_places
from harness.vit import as_tokens, take_tokens

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(28, 28), channels=1, mean=(0.5,), std=(0.25,),
    counts={}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train", mirror_keeps_label=True,
)  # fmt: skip
STEP = torch.tensor(0)


def method_of(**settings: Any) -> IJEPA:
    torch.manual_seed(0)
    method = IJEPA(IJEPA.own_encoder(INFO), IJEPA.Config(**{"width": 16, "depth": 1, **settings}), INFO)
    method.encoder.blocks, method.teacher.blocks = method.encoder.blocks[:2], method.teacher.blocks[:2]
    return method


def batch_of(count: int = 4) -> Batch:
    indices = torch.arange(count)
    images = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Batch(images, None, indices, hash_seeds(0, 0, indices))


def test_blocks_are_squares_everywhere_and_the_context_is_outside() -> None:
    seeds = batch_of(300).seeds
    asked = block_places(seeds, "b", (5, 7), 2, 3)
    rows, columns = asked // 7, asked % 7
    assert asked.shape == (300, 3, 4) and asked.min() == 0 and asked.max() == 34
    for places in (rows, columns):
        assert torch.equal(places.amax(2) - places.amin(2), torch.ones(300, 3, dtype=torch.int64))
    assert all(len(set(block.tolist())) == 4 for block in asked.flatten(0, 1))
    corners = asked[..., 0].flatten().bincount(minlength=35).reshape(5, 7)[:4, :6].float() / 900
    torch.testing.assert_close(corners, torch.full((4, 6), 1 / 24), atol=0.025, rtol=0)
    seen = context_places(seeds, "c", asked, 35, 35 - 12)
    for each, blocks in zip(seen.tolist(), asked.flatten(1).tolist(), strict=True):
        assert len(set(each)) == 23 and not set(each) & set(blocks)


def test_default_counts() -> None:
    method = method_of()
    seen, asked = method.places(batch_of().seeds)
    assert seen.shape == (4, 49 - 4 * 9) and asked.shape == (4, 4, 9)


def test_loss_in_a_loop() -> None:
    method, batch = method_of(), batch_of(3)
    seen, asked = method.places(batch.seeds)
    view, encoder = method.view(batch), method.encoder
    features = as_tokens(method.teacher(view)).double()
    tokens = as_tokens(encoder.placed(encoder.embed(encoder.normalise(view))))
    encoded, terms = encoder.encode_tokens(take_tokens(tokens, seen)), []
    for image in range(3):
        for block in range(4):  # each block by itself, from the same context
            own = slice(image, image + 1)
            predicted = method.predictor(encoded[own], seen[own], asked[own, block : block + 1])[0].double()
            for number, place in enumerate(asked[image, block].tolist()):
                target = features[image, place]
                target = (target - target.mean()) / (target.var(correction=0) + 1e-5).sqrt()
                terms.append((predicted[number] - target).square().mean())
    assert len(terms) == 3 * 4 * 9
    assert method.loss(batch, STEP)["loss"].item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4)


def test_the_context_alone_is_encoded() -> None:
    method, batch = method_of(), batch_of()
    seen, asked = method.places(batch.seeds)
    tokens = torch.randn(4, 49, 128, requires_grad=True)
    method.predictor(method.encoder.encode_tokens(take_tokens(tokens, seen)), seen, asked).sum().backward()
    assert tokens.grad is not None
    reached = torch.zeros(4, 49).scatter(1, seen, 1.0) > 0
    assert torch.equal(tokens.grad.abs().sum(2) > 0, reached)


def test_the_prediction_depends_on_which_block_is_asked() -> None:
    method, batch = method_of(), batch_of()
    seen, asked = method.places(batch.seeds)
    context = torch.randn(4, seen.shape[1], 128)
    one, other = (method.predictor(context, seen, a) for a in (asked[:, :1], (asked[:, :1] + 1) % 49))
    assert not torch.allclose(one, other, atol=1e-3)


def test_teacher_has_no_gradient_and_follows() -> None:
    method = method_of(momentum=0.9)
    method.loss(batch_of(), STEP)["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    trained = [p for p in method.encoder.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (*trained, *method.predictor.parameters()))
    optimised = {id(p) for group in method.parameter_groups() for p in group["params"]}
    assert optimised == {id(p) for p in (*trained, *method.predictor.parameters())}
    with torch.no_grad():
        method.encoder.norm.bias.add_(1.0)
    method.after_step(torch.tensor(1.0))
    assert (method.teacher.norm.bias == 0).all()
    method.after_step(torch.tensor(0.0))
    torch.testing.assert_close(method.teacher.norm.bias, torch.full((128,), 0.1))


def test_gradient_into_the_targets_would_be_another_one() -> None:
    """The teacher still equals the network: its features by the network itself give the same loss, and another gradient
    as soon as it may flow into them."""
    method, batch = method_of(), batch_of()
    (seen, asked), view, encoder = method.places(batch.seeds), method.view(batch), method.encoder
    weight = encoder.embedding.weight

    def slope(stop: bool) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = as_tokens(encoder.placed(encoder.embed(encoder.normalise(view))))
        predicted = method.predictor(encoder.encode_tokens(take_tokens(tokens, seen)), seen, asked)
        features = torch.nn.functional.layer_norm(as_tokens(encoder(view)), (128,))
        target = take_tokens(features, asked.flatten(1)).reshape(predicted.shape)
        loss = (predicted - (target.detach() if stop else target)).square().mean()
        return loss.detach(), torch.autograd.grad(loss, weight)[0]

    found = method.loss(batch, STEP)["loss"]
    (trained,) = torch.autograd.grad(found, weight)
    (value, stopped), (same, flowing) = slope(True), slope(False)
    assert torch.allclose(found, value) and torch.equal(value, same)
    assert (trained - stopped).norm() < 1e-3 * stopped.norm()
    assert (trained - flowing).norm() > 0.1 * stopped.norm()


def test_step_is_one_graph() -> None:
    method, batch = method_of(blocks=2), batch_of()
    compiled = torch.compile(method.loss, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for loss in (method.loss, compiled):
        value = loss(batch, STEP)["loss"]
        found.append((value, *torch.autograd.grad(value, list(method.predictor.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_refusals_name_the_numbers() -> None:
    with pytest.raises(
        HarnessError, match=r"6 blocks of 3 x 3 patches \(method.scale=0.175\) may leave nothing of 7 x 7"
    ):
        method_of(blocks=6)
    with pytest.raises(HarnessError, match="its encoder is vit_tiny or vit_small, not convnet_small"):
        IJEPA(build("convnet_small", INFO), IJEPA.Config(), INFO)
