"""What the tests of several methods share: a toy data set, agreement of two losses, and a step as one graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo, Method
from harness.encoders import build

PLAIN_VIEWS: dict[str, Any] = {"jitter": 0.0, "grayscale": 0.0}  # crops only: what colours do is tested with the views


@pytest.fixture
def toy_info() -> DatasetInfo:
    return DatasetInfo(
        name="toy", title="Toy", classes=("a", "b", "c"), image_size=(16, 16), channels=3, mean=(0.5,) * 3,
        std=(0.25,) * 3, counts={"train": 64}, licence="", citation="", default_encoder="convnet_small",
        pretrain_split="train", mirror_keeps_label=True,
    )  # fmt: skip


@pytest.fixture
def make_method(toy_info: DatasetInfo) -> Callable[..., Any]:
    """make_method(plugin, **settings) -> the method around `convnet_small`, weights by a fixed seed, small heads."""

    def make(plugin: type[Method], **settings: Any) -> Any:
        torch.manual_seed(0)
        usual = {**PLAIN_VIEWS, "hidden": 32, "out": 16}
        known = {key: value for key, value in usual.items() if key in plugin.Config.model_fields}
        config = plugin.Config(**{**known, **settings})
        return plugin(build("convnet_small", toy_info), config, toy_info)

    return make


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """make_batch(indices, labels=None): each index has its own random image; the same index, the same image."""

    def make(indices: Sequence[int], labels: Sequence[int] | None = None, epoch: int = 0) -> Batch:
        everything = torch.randint(
            0, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
        )
        chosen = torch.tensor(indices)
        return Batch(
            everything[chosen], None if labels is None else torch.tensor(labels), chosen, hash_seeds(0, epoch, chosen)
        )

    return make


@pytest.fixture
def assert_agree() -> Callable[..., None]:
    """assert_agree(found, expected, points, tolerance): values and gradients of two scalars with respect to points.

    Each gradient's error is relative to that gradient's norm, and so to 1 where there should be none.
    """

    def check(found: Tensor, expected: Tensor, points: Sequence[Tensor], tolerance: float = 1e-5) -> None:
        assert found.shape == () and abs(found.item() - expected.item()) <= tolerance * max(1.0, abs(expected.item()))
        slopes = (torch.autograd.grad(loss, points, retain_graph=True, allow_unused=True) for loss in (found, expected))
        for one, other, point in zip(*slopes, points, strict=True):
            one, other = (torch.zeros_like(point) if slope is None else slope for slope in (one, other))
            assert (one - other).norm() <= tolerance * (other.norm() or 1.0)

    return check


@pytest.fixture
def assert_one_graph() -> Callable[[Method, Batch], None]:
    """torch.compile finds nothing in `loss` that it must leave to Python; same loss, gradients and buffers after it."""

    def check(method: Method, batch: Batch) -> None:
        found = []
        for compiled in (False, True):
            each = copy.deepcopy(method)
            loss = torch.compile(each.loss, backend="eager", fullgraph=True, dynamic=False) if compiled else each.loss
            out = loss(batch, torch.tensor(0))
            trained = [p for p in each.parameters() if p.requires_grad]
            found.append((*out.values(), *torch.autograd.grad(out["loss"], trained), *each.buffers()))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))

    return check
