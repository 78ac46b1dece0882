"""SimMIM: how much is masked, the loss in a loop, what cannot leak."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo, HarnessError
from harness.encoders import build
from harness.methods.simmim import SimMIM, masked_l1_loss
from harness.vit import as_tokens, patches_of

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(28, 28), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3,
    counts={}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train", mirror_keeps_label=True,
)  # fmt: skip
STEP = torch.tensor(0)


def method_of(**settings: Any) -> SimMIM:
    torch.manual_seed(0)
    method = SimMIM(SimMIM.own_encoder(INFO), SimMIM.Config(**settings), INFO)
    method.encoder.blocks = method.encoder.blocks[:2]
    return method


def batch_of(count: int = 4) -> Batch:
    indices = torch.arange(count)
    images = torch.randint(0, 256, (count, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Batch(images, None, indices, hash_seeds(0, 0, indices))


@pytest.mark.parametrize(("mask", "count"), [(0.6, 29), (0.3, 15)])
def test_share_of_masked_patches(mask: float, count: int) -> None:
    masked = method_of(mask=mask).masked(batch_of(400).seeds)
    assert masked.shape == (400, 7, 7) and (masked.sum((1, 2)) == count).all()
    torch.testing.assert_close(masked.float().mean(0), torch.full((7, 7), count / 49), atol=0.1, rtol=0)


def test_loss_is_eq_1_in_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, target = torch.randn(2, 3, 5, 6, generator=generator, dtype=torch.float64)
    masked = torch.rand(3, 5, generator=generator) < 0.5
    terms = [
        abs(predicted[b, n, d] - target[b, n, d]) for b in range(3) for n in range(5) for d in range(6) if masked[b, n]
    ]
    assert masked_l1_loss(predicted, target, masked).item() == pytest.approx(torch.stack(terms).mean().item())


def test_loss_is_of_the_covered_image() -> None:
    method, batch = method_of(), batch_of()
    images, masked = method.encoder.normalise(method.view(batch)), method.masked(batch.seeds)
    destroyed = images.clone()  # what lies below the masks does not matter to the prediction
    cover = masked[:, None].repeat_interleave(4, 2).repeat_interleave(4, 3)
    destroyed[cover.expand_as(images)] = 7.0
    covered = method.encoder.embed(destroyed).where(~masked[:, None], method.mask_token[:, None, None])
    predicted = method.head(method.encoder.encode_tokens(as_tokens(method.encoder.placed(covered))))
    expected = masked_l1_loss(predicted, patches_of(images, 4), masked.flatten(1))
    torch.testing.assert_close(method.loss(batch, STEP)["loss"], expected)
    expected.backward()
    assert method.mask_token.grad is not None and method.mask_token.grad.abs().sum() > 0


def test_class_token_is_left_as_it_is() -> None:
    method = method_of()
    optimised = {id(p) for group in method.parameter_groups() for p in group["params"]}
    assert not optimised & {id(p) for p in method.encoder.class_token.parameters()}
    assert {id(p) for p in (*method.encoder.blocks.parameters(), *method.head.parameters())} <= optimised


def test_step_is_one_graph() -> None:
    method, batch = method_of(), batch_of()
    compiled = torch.compile(method.loss, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for loss in (method.loss, compiled):
        value = loss(batch, STEP)["loss"]
        found.append((value, *torch.autograd.grad(value, [method.mask_token, *method.head.parameters()])))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_refusals_name_the_numbers() -> None:
    with pytest.raises(HarnessError, match=r"method.mask=0.001 masks 0 of 7 x 7"):
        method_of(mask=0.001)
    with pytest.raises(HarnessError, match="its encoder is vit_tiny or vit_small, not convnet_small"):
        SimMIM(build("convnet_small", INFO), SimMIM.Config(), INFO)
