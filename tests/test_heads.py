"""Encoding squares by themselves: the least size that a network needs, and what it cannot take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness.contracts import DatasetInfo
from harness.encoders import build
from harness.heads import SquareEncoder, map_shape_of

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(28, 28), channels=1, mean=(0.5,), std=(0.25,), counts={},
    licence="", citation="", default_encoder="convnet_small", pretrain_split="train", mirror_keeps_label=False,
)  # fmt: skip


def test_map_shape_is_that_of_a_forward_pass_and_leaves_the_network_alone() -> None:
    encoder = build("convnet_small", INFO)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert map_shape_of(encoder, 1, (20, 28)) == tuple(encoder(torch.zeros(2, 1, 20, 28)).shape[1:]) == (64, 4, 6)
    encoder.load_state_dict(before)
    assert map_shape_of(encoder, 1, (28, 28)) == encoder.map_shape
    assert encoder.training and all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert map_shape_of(encoder, 1, (7, 7)) is None
    assert map_shape_of(encoder, 2, (28, 28)) is None


@pytest.mark.parametrize(("side", "size"), [(8, 16), (16, 16), (20, 20), (28, 28)])
def test_squares_are_stretched_until_the_map_has_three_cells(side: int, size: int) -> None:
    encoder = build("convnet_small", INFO)
    squares = SquareEncoder(encoder, INFO, side)
    assert squares.size == (size, size)
    assert map_shape_of(encoder, 1, (15, 15)) == (64, 2, 2)  # so that 16 is the least
    maps = squares(encoder, torch.rand(5, 2, 1, side, side))
    assert maps.shape == (10, *squares.map_shape) and squares.features == maps[0].numel()


def test_squares_of_the_right_size_are_not_touched() -> None:
    encoder = build("convnet_small", INFO).eval()
    cut = torch.rand(3, 1, 20, 20)
    assert torch.equal(SquareEncoder(encoder, INFO, 20)(encoder, cut), encoder(cut))


def test_small_images_give_the_largest_map_there_is() -> None:
    info = replace(INFO, image_size=(12, 12))
    squares = SquareEncoder(build("convnet_small", info), info, 4)
    assert squares.size == (12, 12) and squares.map_shape == (64, 2, 2)
