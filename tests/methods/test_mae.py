"""MAE: which patches are seen, the loss in a loop, targets, what the decoder may use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo, HarnessError
from harness.encoders import build
from harness.methods.mae import MAE, masked_pixel_loss, normalised_patches
from harness.vit import as_tokens, patches_of, random_order, take_tokens

STEP = torch.tensor(0)


def info_of(size: tuple[int, int] = (28, 28), channels: int = 3) -> DatasetInfo:
    return DatasetInfo(
        name="toy", title="Toy", classes=None, image_size=size, channels=channels, mean=(0.5,) * channels,
        std=(0.25,) * channels, counts={}, licence="", citation="", default_encoder="convnet_small",
        pretrain_split="train", mirror_keeps_label=True,
    )  # fmt: skip


def method_of(info: DatasetInfo | None = None, **settings: Any) -> MAE:
    torch.manual_seed(0)
    info = info or info_of()
    return MAE(MAE.own_encoder(info), MAE.Config(**{"decoder_width": 16, "decoder_depth": 1, **settings}), info)


def batch_of(count: int = 4, size: tuple[int, int] = (28, 28), channels: int = 3) -> Batch:
    indices, generator = torch.arange(count), torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, channels, *size), dtype=torch.uint8, generator=generator)
    return Batch(images, None, indices, hash_seeds(0, 0, indices))


def tokens_of(method: MAE, batch: Batch) -> Tensor:
    encoder = method.encoder
    return as_tokens(encoder.placed(encoder.embed(encoder.normalise(method.view(batch)))))


@pytest.mark.parametrize(("size", "mask", "visible"), [((28, 28), 0.75, 12), ((32, 32), 0.75, 16), ((96, 96), 0.5, 72)])
def test_share_of_masked_patches(size: tuple[int, int], mask: float, visible: int) -> None:
    method = method_of(info_of(size), mask=mask)
    assert method.num_visible == visible
    count = method.encoder.map_shape[1] * method.encoder.map_shape[2]
    order, place = random_order(batch_of(400).seeds, "mae.mask", count)
    assert torch.equal(order.sort(1).values, torch.arange(count).expand(400, -1))
    assert torch.equal(take_tokens(order[..., None], place)[..., 0], torch.arange(count).expand(400, -1))
    seen = (place < visible).float()
    assert (seen.sum(1) == visible).all()
    torch.testing.assert_close(seen.mean(0), torch.full((count,), visible / count), atol=0.11, rtol=0)


def test_loss_in_a_loop_counts_masked_patches_alone() -> None:
    method, batch = method_of(), batch_of()
    order, place = random_order(batch.seeds, "mae.mask", 49)
    encoded = method.encoder.encode_tokens(take_tokens(tokens_of(method, batch), order[:, :12]))
    full = torch.cat((method.encoder.class_token(encoded)[:, None], encoded), 1)
    painted = method.decoder(full, place).double()
    images, terms = method.encoder.normalise(method.view(batch)).double(), []
    for b in range(4):
        for n in range(49):
            if n not in order[b, :12]:
                row, column = 4 * (n // 7), 4 * (n % 7)
                patch = images[b, :, row : row + 4, column : column + 4].permute(1, 2, 0).flatten()
                target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
                terms.append((painted[b, n] - target).square().mean())
    assert len(terms) == 4 * 37
    assert method.loss(batch, STEP)["loss"].item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)


def test_masked_pixels_cannot_reach_the_prediction() -> None:
    method, batch = method_of(), batch_of()
    order, place = random_order(batch.seeds, "mae.mask", 49)
    tokens = tokens_of(method, batch).detach().requires_grad_()
    encoded = method.encoder.encode_tokens(take_tokens(tokens, order[:, : method.num_visible]))
    method.decoder(torch.cat((method.encoder.class_token(encoded)[:, None], encoded), 1), place).sum().backward()
    assert tokens.grad is not None
    reached = tokens.grad.abs().sum(2) > 0
    assert torch.equal(reached, place < method.num_visible)


def test_decoder_knows_which_patch_is_which() -> None:
    """Visible tokens given in another order, with their places, paint the same picture."""
    method, batch = method_of(), batch_of()
    order, place = random_order(batch.seeds, "mae.mask", 49)
    encoded = torch.randn(4, 13, 128, generator=torch.Generator().manual_seed(0))
    swapped = torch.cat((order[:, :12].flip(1), order[:, 12:]), 1)
    again = method.decoder(torch.cat((encoded[:, :1], encoded[:, 1:].flip(1)), 1), swapped.argsort(dim=1))
    torch.testing.assert_close(method.decoder(encoded, place), again, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(method.decoder(encoded, place), method.decoder(encoded, place.flip(1)), atol=1e-2)


def test_patches_and_their_normalisation() -> None:
    images = torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    patches = patches_of(images, 2)
    assert patches.shape == (2, 12, 12)
    assert torch.equal(patches[1, 5], images[1, :, 2:4, 2:4].permute(1, 2, 0).flatten())  # row 1, column 1
    assert patches_of(images, 4).shape == (2, 4, 48) and (patches_of(images, 4)[:, 2:, 24:] == 0).all()  # padded rows
    normalised = normalised_patches(patches)
    torch.testing.assert_close(normalised.mean(2), torch.zeros(2, 12), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.std(2), torch.ones(2, 12), atol=1e-3, rtol=0)
    assert normalised_patches(torch.full((1, 1, 12), 0.3)).abs().max() < 1e-3
    plain, masked = masked_pixel_loss(patches, patches + 2, torch.ones(2, 12)), torch.zeros(2, 12)
    masked[1, 4] = 1
    assert plain.item() == pytest.approx(4) and masked_pixel_loss(patches, patches.roll(1, 1), masked).item() > 0


def test_targets_are_as_asked() -> None:
    torch.testing.assert_close(  # the same network and mask: only the target differs
        *(method_of(normalised=flag).decoder.paint.weight for flag in (True, False))
    )
    losses = [method_of(normalised=flag).loss(batch_of(), STEP)["loss"].item() for flag in (True, False)]
    assert losses[0] != losses[1]


def test_preview_shows_what_is_left() -> None:
    views = method_of(info_of((30, 34))).preview(batch_of(4, (30, 34)))
    left = (views["visible"] != 0).any(1).float().mean()
    assert views["visible"].shape == (4, 3, 30, 34) and 0.15 < float(left) < 0.35
    seen = views["visible"] != 0
    assert torch.equal(views["visible"][seen], views["view"][seen])


def test_step_is_one_graph() -> None:
    method, batch = method_of(), batch_of()
    method.encoder.blocks = method.encoder.blocks[:1]  # tracing takes its time
    compiled = torch.compile(method.loss, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for loss in (method.loss, compiled):
        value = loss(batch, STEP)["loss"]
        found.append((value, *torch.autograd.grad(value, list(method.decoder.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_refusals_name_the_numbers() -> None:
    with pytest.raises(HarnessError, match=r"method.mask=0.999 leaves 0 of 7 x 7 patches"):
        method_of(mask=0.999)
    with pytest.raises(HarnessError, match="1 pixel here"):
        method_of(info_of((8, 8), 1))
    method_of(info_of((8, 8), 1), normalised=False)
    with pytest.raises(HarnessError, match="its encoder is vit_tiny or vit_small, not convnet_small"):
        MAE(build("convnet_small", info_of()), MAE.Config(), info_of())
