"""The base of encoders that make a feature map: named stages, readouts, receptive field, refusing what does not fit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from harness.contracts import DatasetInfo, Encoder, HarnessError, ReceptiveField
from harness.receptive_field import compose, output_side


class ConvEncoder(Encoder):
    """An encoder whose map is (B, C, H, W), made by named stages one after the other.

    Readouts: `gap`, the mean over the map; `spatial`, the map averaged over a 3 x 3 grid and flattened (a map with a
    side below 3 keeps that side). `image_size` and `channels` are those it was built for.
    """

    readouts: tuple[str, ...] = ("gap", "spatial")

    def __init__(self, name: str, info: DatasetInfo) -> None:
        super().__init__()
        self.name = name
        self.image_size, self.channels = info.image_size, info.channels
        self.register_buffer("mean", torch.tensor(info.mean, dtype=torch.float32).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(info.std, dtype=torch.float32).reshape(1, -1, 1, 1))
        self._map_shape = (0, 0, 0)

    @abstractmethod
    def stages(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Name -> function from map to map, input side first."""

    def main_path(self, stage: str) -> list[nn.Module] | None:
        """Convolutions and poolings of one stage's longest way through; None where they do not form a chain."""
        return None

    def fit(self) -> ConvEncoder:
        """Try one image of the size it was built for, to learn the map's shape; raises HarnessError if none fits."""
        height, width = self.image_size
        self._refuse_small(height, width)
        training = self.training
        try:
            with torch.no_grad():
                shape = self.eval()(torch.zeros(1, self.channels, height, width)).shape
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise HarnessError(f"encoder {self.name} does not take {height} x {width} px images: {reason}") from error
        if len(shape) != 4 or min(shape[2:]) < 1:
            raise HarnessError(
                f"encoder {self.name} gives no (channels, rows, columns) map on {height} x {width} px images "
                f"but an output of shape {tuple(shape)}"
            )
        self._map_shape = (shape[1], shape[2], shape[3])
        self.train(training)
        return self

    def _refuse_small(self, height: int, width: int) -> None:
        paths = [self.main_path(stage) for stage in self.layers]
        path = [module for part in paths if part is not None for module in part]
        if None in paths:
            return
        rows, columns = output_side(path, height), output_side(path, width)
        if min(rows, columns) < 1:
            raise HarnessError(
                f"encoder {self.name} does not fit {height} x {width} px images: its map would be {rows} x {columns} "
                "cells; use a smaller encoder or larger images (--image-size)"
            )

    @property
    def map_shape(self) -> tuple[int, int, int]:
        return self._map_shape

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.stages())

    def forward(self, images: Tensor) -> Tensor:
        feature_map = self.normalise(images)
        for stage in self.stages().values():
            feature_map = self._run(stage, feature_map)
        return feature_map

    def _run(self, stage: Callable[[Tensor], Tensor], feature_map: Tensor) -> Tensor:
        """One stage; with `activation_checkpointing` its inside is computed again in the backward pass."""
        if not (self.activation_checkpointing and self.training and torch.is_grad_enabled()):
            return stage(feature_map)
        drops = any(isinstance(module, nn.modules.dropout._DropoutNd) for module in self.modules())
        result = checkpoint(  # reading the generator's state waits for the device, and fails in a capture
            stage, feature_map, use_reentrant=False, preserve_rng_state=drops,
            context_fn=lambda: (nullcontext(), _same_statistics(self)),
        )  # fmt: skip
        assert isinstance(result, Tensor)
        return result

    def forward_to(self, images: Tensor, layer: str) -> Tensor:
        return self.forward_layers(images, (layer,))[0]

    def forward_layers(self, images: Tensor, layers: Sequence[str]) -> tuple[Tensor, ...]:
        for layer in layers:
            if layer not in self.layers:
                raise HarnessError(f"encoder {self.name} has no layer {layer!r}; it has {', '.join(self.layers)}")
        maps: dict[str, Tensor] = {}
        feature_map = self.normalise(images)
        for name, stage in self.stages().items():
            if len(maps) == len(set(layers)):
                break
            feature_map = self._run(stage, feature_map)
            if name in layers:
                maps[name] = feature_map
        return tuple(maps[layer] for layer in layers)

    def forward_apart(self, images: Tensor) -> tuple[Tensor, ...]:
        maps: list[Tensor] = []
        feature_map = self.normalise(images)
        for stage in self.stages().values():
            feature_map = self._run(stage, feature_map.detach())
            maps.append(feature_map)
        return tuple(maps)

    def pool(self, feature_map: Tensor) -> Tensor:
        return feature_map.mean((2, 3))

    def read(self, feature_map: Tensor, readout: str) -> Tensor:
        if readout == "gap":
            return self.pool(feature_map)
        if readout == "spatial":
            grid = (min(3, feature_map.shape[2]), min(3, feature_map.shape[3]))
            return functional.adaptive_avg_pool2d(feature_map, grid).flatten(1)
        raise HarnessError(f"encoder {self.name} has no readout {readout!r}; it has {', '.join(self.readouts)}")

    def classifier(self, num_classes: int) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(self.map_shape[0], num_classes))

    def receptive_field(self, layer: str | None = None) -> ReceptiveField | None:
        path: list[nn.Module] = []
        for name in self.layers:
            part = self.main_path(name)
            if part is None:
                return None
            path += part
            if name == layer:
                break
        return compose(path)


@contextmanager
def _same_statistics(module: nn.Module) -> Iterator[None]:
    """Put the running statistics back at the end: a pass that repeats another one must not count twice."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
