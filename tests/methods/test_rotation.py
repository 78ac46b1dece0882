"""Rotation prediction: the right turns, balanced labels, no rectangles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo, HarnessError
from harness.encoders import build
from harness.methods.rotation import Rotation, four_rotations

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(16, 16), channels=1, mean=(0.5,), std=(0.25,), counts={},
    licence="", citation="", default_encoder="convnet_small", pretrain_split="train", mirror_keeps_label=False,
)  # fmt: skip


def test_each_rotation_once_and_by_the_angle_it_says() -> None:
    images = torch.arange(2 * 9).reshape(2, 1, 3, 3)
    turned, turns = four_rotations(images)
    assert turns.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for image, quarter, source in zip(turned, turns.tolist(), [0, 1] * 4, strict=True):
        expected = images[source, 0]
        for _ in range(quarter):
            expected = expected.T.flip(0)  # a quarter turn counter-clockwise
        assert torch.equal(image[0], expected)


def test_labels_are_balanced_in_every_batch() -> None:
    """Whatever the network says, each image meets each turn once: scores that favour one turn are right in a quarter."""
    method = Rotation(build("convnet_small", INFO), Rotation.Config(), INFO)
    images = torch.randint(0, 256, (7, 1, 16, 16), dtype=torch.uint8)
    batch = Batch(images, None, torch.arange(7), hash_seeds(0, 0, torch.arange(7)))
    for turn in range(4):
        with torch.no_grad():
            method.head.weight.zero_()
            method.head.bias.copy_(torch.eye(4)[turn])
        assert float(method.loss(batch, torch.tensor(0))["top1"]) == 0.25


def test_it_learns_upright_from_turned() -> None:
    torch.manual_seed(0)
    method = Rotation(build("convnet_small", INFO), Rotation.Config(), INFO)
    ramp = (torch.arange(16)[:, None] * 12 + torch.arange(16) * 3).to(torch.uint8).expand(8, 1, 16, 16)
    indices = torch.arange(8)
    optimiser = torch.optim.SGD(method.parameters(), lr=0.1)
    for epoch in range(20):
        out = method.loss(Batch(ramp, None, indices, hash_seeds(0, epoch, indices)), torch.tensor(epoch))
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
    assert float(out["top1"]) > 0.9


def test_rectangles_are_refused_with_their_size() -> None:
    info = replace(INFO, image_size=(16, 24))
    with pytest.raises(HarnessError, match="16 x 24 px are not square"):
        Rotation(build("convnet_small", info), Rotation.Config(), info)
