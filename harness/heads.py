"""Parts that methods share and throw away after pretraining: projectors, and distances that survive coincidence."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Distance = Literal["l2", "squared", "cosine"]


def projector(features: int, hidden: int, out: int) -> nn.Sequential:
    """Linear, batch norm, ReLU, linear: (B, features) -> (B, out) (Chen et al., 2020, section 2.1)."""
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out)
    )


def decoder(map_shape: tuple[int, int, int], image_shape: tuple[int, int, int], hidden: int) -> nn.Sequential:
    """From a feature map back to an image: (B, *map_shape) -> (B, *image_shape), any values.

    map_shape, image_shape: (C, H, W). Doubles the sides until they are the image's (the last step by what is missing),
    nearest neighbour and a 3 x 3 convolution each time: transposed convolutions leave checkerboards (Odena et al., 2016).
    """
    channels, height, width = map_shape
    _, image_height, image_width = image_shape
    layers: list[nn.Module] = []
    while True:
        layers += [nn.Conv2d(channels, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)]
        channels = hidden
        if (height, width) == (image_height, image_width):
            return nn.Sequential(*layers, nn.Conv2d(hidden, image_shape[0], 3, padding=1))
        height, width = min(2 * height, image_height), min(2 * width, image_width)
        layers.append(nn.Upsample((height, width)))


@torch.no_grad()
def momentum_update(teacher: nn.Module, online: nn.Module, momentum: Tensor) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * online, parameters only: a teacher in training mode makes its
    own batch-norm statistics. `momentum` is a 0-d tensor on the device, so nothing waits for it.
    """
    for slow, fast in zip(teacher.parameters(), online.parameters(), strict=True):
        slow.lerp_(fast, (1 - momentum).to(slow.dtype))


def wide(features: Tensor) -> Tensor:
    """Sums are taken in at least float32; float64 stays."""
    return features if features.dtype == torch.float64 else features.float()


def _placed(features: Tensor, distance: Distance) -> Tensor:
    """The points whose distance is taken; for the cosine on the unit sphere, where half the square is 1 - cos."""
    points = wide(features)
    return points * (points.square().sum(-1, keepdim=True) + 1e-12).rsqrt() if distance == "cosine" else points


def _from_squared(squared: Tensor, distance: Distance) -> Tensor:
    if distance == "squared":
        return squared
    if distance == "cosine":
        return squared / 2
    apart = squared > 0
    # sqrt has no slope at 0: there the distance is 0 and so is its gradient, exactly.
    return torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)


def pair_distances(first: Tensor, second: Tensor, distance: Distance = "l2") -> Tensor:
    """Distances between partners: (..., D) and (..., D), broadcast -> (...), in float32 or float64."""
    difference = _placed(first, distance) - _placed(second, distance)
    return _from_squared(difference.square().sum(-1), distance)


def all_distances(anchors: Tensor, positives: Tensor, distance: Distance = "l2") -> Tensor:
    """D[i, j] between anchor i and positive j: (N, D) and (N, D) -> (N, N), in float32 or float64."""
    with torch.autocast(anchors.device.type, enabled=False):
        anchors, positives = _placed(anchors, distance), _placed(positives, distance)
        centre = positives.detach().mean(0)  # distances do not depend on it, rounding does
        a, b = anchors - centre, positives - centre
        squared = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)
        own = (anchors - positives).square().sum(1)
        diagonal = torch.eye(len(own), dtype=torch.bool, device=own.device)
        return _from_squared(torch.where(diagonal, own[:, None], squared), distance)
