"""Where in the input a cell of a feature map looks: arithmetic on kernels, strides and paddings, nothing is run.

Sides are nominal: a window that reaches over the border is counted in full, as if the padding were image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from harness.contracts import ReceptiveField

WINDOWED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def _first(value: int | tuple[int, ...] | str) -> int:
    return value[0] if isinstance(value, tuple) else int(value)


def windowed(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The convolutions and poolings inside `modules`, in order: all that moves or widens a window."""
    return [inner for module in modules for inner in module.modules() if isinstance(inner, WINDOWED)]


def compose(path: Sequence[nn.Module]) -> ReceptiveField:
    """Receptive field of one cell after the square convolutions and poolings of `path`, input side first."""
    side, stride = 1, 1
    for module in path:
        side += (_first(module.kernel_size) - 1) * _first(getattr(module, "dilation", 1)) * stride  # type: ignore[arg-type]
        stride *= _first(module.stride)  # type: ignore[arg-type]
    return ReceptiveField(side, stride)


def output_side(path: Sequence[nn.Module], side: int) -> int:
    """Cells along one side of the map made of `side` pixels; 0 where a window no longer fits."""
    for module in path:
        reach = (_first(module.kernel_size) - 1) * _first(getattr(module, "dilation", 1)) + 1  # type: ignore[arg-type]
        side = (side + 2 * _first(module.padding) - reach) // _first(module.stride) + 1  # type: ignore[arg-type]
        if side < 1:
            return 0
    return side
