"""The Vision Transformer: sizes, token subsets, positions, readouts, attention against a loop."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from harness.contracts import DatasetInfo
from harness.encoders import build, multiply_adds
from harness.vit import Attention, ViTEncoder, as_tokens, attend, patch_side, sine_positions, take_tokens

INFO = DatasetInfo(
    name="toy", title="Toy", classes=tuple("abc"), image_size=(28, 28), channels=1, mean=(0.3,), std=(0.2,),
    counts={"train": 8}, licence="", citation="", default_encoder="vit_tiny", pretrain_split="train",
    mirror_keeps_label=False,
)  # fmt: skip


def vit(size: tuple[int, int] = (28, 28), channels: int = 1) -> ViTEncoder:
    info = dataclasses.replace(
        INFO, image_size=size, channels=channels, mean=(0.3,) * channels, std=(0.2,) * channels
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = build("vit_tiny", info)
    assert isinstance(encoder, ViTEncoder)
    return encoder


def images_of(size: tuple[int, int], channels: int = 1, count: int = 2) -> torch.Tensor:
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("size", "patch", "grid"),
    [
        ((8, 8), 1, (8, 8)), ((12, 12), 1, (12, 12)), ((28, 28), 4, (7, 7)), ((30, 33), 4, (8, 9)), ((32, 32), 4, (8, 8)),
        ((64, 64), 8, (8, 8)), ((96, 96), 8, (12, 12)), ((224, 224), 16, (14, 14)), ((20, 36), 2, (10, 18)),
    ],
)  # fmt: skip
def test_sizes(size: tuple[int, int], patch: int, grid: tuple[int, int]) -> None:
    encoder = vit(size, 3).eval()
    assert encoder.patch == patch_side(size) == patch and encoder.map_shape == (128, *grid)
    with torch.no_grad():
        feature_map = encoder(images_of(size, 3, 1))
    widths = {name: encoder.read(feature_map, name).shape[1] for name in encoder.readouts}
    assert widths == {"gap": 128, "spatial": 9 * 128, "cls": 128, "mean": 128}
    assert encoder.receptive_field() is None


def test_all_tokens_encode_as_forward_and_a_subset_as_itself() -> None:
    encoder, images = vit(), images_of((28, 28))
    tokens = as_tokens(encoder.placed(encoder.embed(encoder.normalise(images))))
    everything = torch.arange(49).expand(2, -1)
    torch.testing.assert_close(encoder.encode_tokens(take_tokens(tokens, everything)), as_tokens(encoder(images)))
    order = torch.stack((torch.arange(49), torch.arange(49).flip(0)))  # tokens know their place, not their number
    mixed = encoder.encode_tokens(take_tokens(tokens, order))
    torch.testing.assert_close(mixed[1].flip(0), as_tokens(encoder(images))[1], atol=1e-5, rtol=1e-4)
    some = torch.tensor([[3, 40, 8], [0, 1, 2]])
    alone = encoder.encode_tokens(take_tokens(tokens, some))
    destroyed = tokens.detach().clone()
    destroyed[0, 7] = 1e3  # a token that was not taken
    torch.testing.assert_close(alone, encoder.encode_tokens(take_tokens(destroyed, some)))


def test_attention_is_the_written_sum() -> None:
    torch.manual_seed(0)
    layer = Attention(8, 2).double()
    asking, asked = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    query, (key, value) = layer.query(asking), layer.key_value(asked).chunk(2, 2)
    answers = torch.zeros(2, 3, 8, dtype=torch.float64)
    for b in range(2):
        for q in range(3):
            for head in (slice(0, 4), slice(4, 8)):
                scores = torch.stack([query[b, q, head] @ key[b, n, head] / 2 for n in range(5)]).softmax(0)
                answers[b, q, head] = sum(scores[n] * value[b, n, head] for n in range(5))
    torch.testing.assert_close(layer(asking, asked), layer.out(answers))


@pytest.mark.parametrize("queries", [1, 12])
def test_attention_in_bf16_is_that_of_float64_but_for_rounding(queries: int) -> None:
    """Values and gradients, both of as many queries as tokens and of one (the class token)."""
    torch.manual_seed(0)
    drawn = [torch.randn(3, 2, count, 8, dtype=torch.bfloat16) for count in (queries, 12, 12)]
    found, expected = [], []
    for dtype, out in ((torch.bfloat16, found), (torch.float64, expected)):
        query, key, value = (part.clone().to(dtype).requires_grad_() for part in drawn)
        answers = attend(query, key, value)
        answers.square().sum().backward()
        assert answers.dtype == dtype
        out += [part.double() for part in (answers.detach(), query.grad, key.grad, value.grad) if part is not None]
    for mine, exact in zip(found, expected, strict=True):
        assert (mine - exact).abs().max() < 0.03 * exact.abs().max()


def test_positions_differ_and_stretch_to_views_of_another_size() -> None:
    positions = sine_positions(16, 5, 7)
    assert positions.shape == (1, 16, 5, 7)
    cells = positions[0].flatten(1).T
    assert torch.cdist(cells, cells).add(torch.eye(35) * 9).min() > 0.1
    assert torch.allclose(positions[0, :4, 3, 2], (3 * 10_000.0 ** -(torch.arange(4) / 4)).sin())  # row's sines first
    encoder = vit()
    blank = torch.zeros(1, 128, 3, 3)
    small = encoder.placed(blank)[0]
    assert encoder(images_of((12, 12))).shape == (2, 128, 3, 3)
    whole = encoder.positions[0]
    torch.testing.assert_close(small[:, 1, 1], whole[:, 3, 3], atol=1e-6, rtol=0)  # the middle stays the middle
    assert (small[:, 0, 0] - whole[:, 0, 0]).norm() < (small[:, 0, 0] - whole[:, 3, 3]).norm()


def test_padding_is_the_mean_of_the_data() -> None:
    encoder = vit((30, 30))
    images = images_of((30, 30))
    padded = torch.full((2, 1, 32, 32), 0.3)
    padded[:, :, :30, :30] = images
    torch.testing.assert_close(encoder(images), encoder(padded))


def test_the_class_token_is_asked_by_no_patch() -> None:
    encoder, images = vit(), images_of((28, 28))
    feature_map = encoder(images)
    with torch.no_grad():
        encoder.class_token.token.add_(1.0)
    assert torch.equal(encoder(images), feature_map)
    encoder.pool(encoder(images)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_classifier_starts_from_the_trained_class_token() -> None:
    encoder = vit().requires_grad_(False)
    head = encoder.classifier(3)
    assert isinstance(head, nn.Sequential) and all(p.requires_grad for p in head.parameters())
    feature_map = encoder(images_of((28, 28)))
    torch.testing.assert_close(head[0](feature_map), encoder.pool(feature_map))
    assert head(feature_map).shape == (2, 3)


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for keep in (False, True):
        encoder = vit().train()
        encoder.activation_checkpointing = keep
        encoder(images_of((28, 28))).square().mean().backward()
        gradients.append([p.grad for p in encoder.blocks.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_multiply_adds_count_every_token() -> None:
    width, tokens = 128, 49
    block = 4 * width**2 + 8 * width**2
    assert multiply_adds(vit(), INFO) == tokens * (6 * block + width * 16)
