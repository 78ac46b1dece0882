"""A fake EvaluationTask on scikit-learn's digits, with a tiny encoder and the simplest possible training loop."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from harness import optim
from harness.augment import hash_seeds, permutation
from harness.budgets import make_budgets
from harness.contracts import Batch, DatasetInfo, Encoder, LabelBudget, TrainingOutcome


class TinyEncoder(Encoder):
    """conv-BN-ReLU-pool twice: (1, 8, 8) -> (16, 4, 4)."""

    name = "tiny"
    readouts = ("gap", "spatial")
    layers = ("one", "two")  # type: ignore[assignment]
    map_shape = (16, 4, 4)  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 1, 1, 1), 0.3))
        self.register_buffer("std", torch.full((1, 1, 1, 1), 0.37))
        self.one = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.two = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        return self.two(self.one(self.normalise(images)))

    def forward_to(self, images: Tensor, layer: str) -> Tensor:
        first = self.one(self.normalise(images))
        return first if layer == "one" else self.two(first)

    def pool(self, feature_map: Tensor) -> Tensor:
        return feature_map.mean((2, 3))

    def read(self, feature_map: Tensor, readout: str) -> Tensor:
        return self.pool(feature_map) if readout == "gap" else F.adaptive_avg_pool2d(feature_map, 3).flatten(1)

    def classifier(self, num_classes: int) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))


def train_plainly(
    key: str, module: nn.Module, images: Tensor, labels: Tensor, *, steps: int, batch_size: int, seed: int,
    optim: optim.OptimConfig, schedule: optim.ScheduleConfig,
) -> TrainingOutcome:  # fmt: skip
    """The contract of harness.contracts.Trainer in twenty lines."""
    from harness.optim import build, schedule_factor, set_rate

    optimizer = build(optim, [{"params": [p for p in module.parameters() if p.requires_grad]}])
    batch_size = min(batch_size, len(images))
    per_epoch = len(images) // batch_size
    losses = []
    module.train()
    for step in range(steps):
        epoch, position = divmod(step, per_epoch)
        rows = permutation(seed, epoch, len(images))[position * batch_size : (position + 1) * batch_size]
        batch = Batch(images[rows], labels[rows], rows, hash_seeds(seed, epoch, rows))
        set_rate(optimizer, optim.lr * schedule_factor(schedule, step, steps))
        loss = module.loss(batch, torch.tensor(step))["loss"]  # type: ignore[operator]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((step + 1, float(loss.detach())))
    return TrainingOutcome(float(np.mean([v for _, v in losses[-per_epoch:]])), tuple(losses), steps, True)


@dataclass
class FakeTask:
    """`events` lists every access in order; `poison_test` makes the test split raise."""

    encoder: Encoder
    train_images: Tensor
    train_labels: np.ndarray
    test_images: Tensor
    test_labels: np.ndarray
    budget: LabelBudget
    info: DatasetInfo
    seed: int = 0
    has_test: bool = True
    poison_test: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    events: list[str] = field(default_factory=list)
    given: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    method_settings: dict[str, Any] = field(default_factory=dict)
    view_corruptions: tuple[str, ...] = ()

    def images(self, split: str) -> Tensor:
        self._opened(f"images {split}")
        if split == "test":
            return self.test_images
        return self.train_images[torch.from_numpy(self.budget.indices)] if split == "train" else self.train_images

    @torch.no_grad()
    def features(self, split: str, readout: str) -> Tensor:
        if (split, readout) in self.given:
            self._opened(f"features {split}")
            return self.given[split, readout]
        return self.encoder.read(self.encoder(self.images(split)), readout)

    def labels(self, split: str) -> np.ndarray:
        self._opened(f"labels {split}")
        return self.test_labels if split == "test" else self.train_labels[self.budget.indices]

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def trainer(self, key: str, *args: Any, **settings: Any) -> TrainingOutcome:
        self.events.append(f"train {key}")
        return train_plainly(key, *args, **settings)

    def _opened(self, event: str) -> None:
        if self.poison_test and "test" in event:
            raise AssertionError("the test split was opened")
        self.events.append(event)


def _info() -> DatasetInfo:
    return DatasetInfo(
        "digits", "digits", tuple("0123456789"), (8, 8), 1, (0.3,), (0.37,), {"train": 1297, "test": 500},
        "", "", "tiny", "train", False,
    )  # fmt: skip


@pytest.fixture
def make_task() -> Any:
    """(labels="300", **fields of FakeTask) -> FakeTask on digits: 1,297 train and 500 test images of 8x8."""

    def make(spec: str = "300", **fields: Any) -> FakeTask:
        digits = load_digits()
        images = torch.from_numpy((digits.images * 255 / 16).round().astype(np.uint8))[:, None]
        labels = digits.target.astype(np.int64)
        torch.manual_seed(0)
        encoder = TinyEncoder()
        with torch.no_grad():
            encoder.train()(images[:512])  # batch-norm statistics
        task = FakeTask(
            encoder.eval(), images[:1297], labels[:1297], images[1297:], labels[1297:],
            make_budgets(spec, labels[:1297], 10, 0)[0], _info(),
        )  # fmt: skip
        for name, value in fields.items():
            setattr(task, name, value)
        return task

    return make
