"""Floor: the raw pixels, read by the same linear probe and neighbours as any feature. Nothing is learnt beforehand."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from harness.augment import to_float
from harness.contracts import Batch, DatasetInfo, Encoder, HarnessError, Method


class PixelEncoder(Encoder):
    """No parameters: the map is the image in [0, 1], its one readout the flattened image; not normalised."""

    readouts: tuple[str, ...] = ("pixels",)

    def __init__(self, info: DatasetInfo, name: str = "pixels") -> None:
        super().__init__()
        self.name = name
        self.channels, self.image_size = info.channels, info.image_size
        self.register_buffer("mean", torch.tensor(info.mean, dtype=torch.float32).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(info.std, dtype=torch.float32).reshape(1, -1, 1, 1))

    @property
    def map_shape(self) -> tuple[int, int, int]:
        return (self.channels, *self.image_size)

    @property
    def layers(self) -> tuple[str, ...]:
        return (self.name,)

    def forward(self, images: Tensor) -> Tensor:
        return to_float(images)

    def forward_to(self, images: Tensor, layer: str) -> Tensor:
        if layer not in self.layers:
            raise HarnessError(f"encoder {self.name} has no layer {layer!r}; it has {', '.join(self.layers)}")
        return self(images)

    def pool(self, feature_map: Tensor) -> Tensor:
        return feature_map.flatten(1)

    def read(self, feature_map: Tensor, readout: str) -> Tensor:
        if readout not in self.readouts:
            raise HarnessError(f"encoder {self.name} has no readout {readout!r}; it has {', '.join(self.readouts)}")
        return feature_map.flatten(1)

    def classifier(self, num_classes: int) -> nn.Module:
        channels, rows, columns = self.map_shape
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * rows * columns, num_classes))


class Pixels(Method):
    """Raw pixels"""

    role = "floor"
    trains = False
    family = "floor"
    year = 1958
    source = "Cox, 1958 (logistic regression) and nearest neighbours, on the images themselves"
    evaluators: ClassVar[tuple[str, ...] | None] = ("linear_probe", "knn")

    @classmethod
    def own_encoder(cls, info: DatasetInfo) -> Encoder:
        return PixelEncoder(info)

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} is never trained")
