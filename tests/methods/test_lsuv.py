"""lsuv: orthonormal starts, variance 1 layer by layer, against a float64 loop of Algorithm 1 written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.batches import Batches
from harness.contracts import HarnessError
from harness.methods.lsuv import LSUV, orthonormalise, scale_to_unit_variance

CPU = torch.device("cpu")


def images(count: int = 32, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, 10, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(54, 70),
        nn.ReLU(), nn.Linear(70, 5),
    ).double()  # fmt: skip


def convolved(points: np.ndarray, weight: np.ndarray, stride: int) -> np.ndarray:
    """Cross-correlation without padding, place by place."""
    side = weight.shape[2]
    places = range(0, points.shape[2] - side + 1, stride)
    rows = [
        [np.einsum("bchw,ochw->bo", points[:, :, r : r + side, c : c + side], weight) for c in places] for r in places
    ]
    return np.array(rows).transpose(2, 3, 0, 1)


def by_hand(module: nn.Sequential, points: np.ndarray, tolerance: float) -> list[np.ndarray]:
    """Algorithm 1: the weights of each layer after it."""
    found = []
    for layer in module:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            weight = layer.weight.detach().numpy().copy()

            def act(weight: np.ndarray, layer: Any = layer, points: np.ndarray = points) -> np.ndarray:
                if isinstance(layer, nn.Linear):
                    return points @ weight.T
                return convolved(points, weight, layer.stride[0])

            while abs(act(weight).var(ddof=1) - 1) >= tolerance:
                weight = weight / np.sqrt(act(weight).var(ddof=1))
            found.append(weight)
            points = act(weight)
        else:
            points = {
                nn.ReLU: lambda x: np.maximum(x, 0),
                nn.Tanh: np.tanh,
                nn.Flatten: lambda x: x.reshape(len(x), -1),
            }[type(layer)](points)
    return found


def test_the_start_is_orthonormal_and_without_biases() -> None:
    module = net()
    orthonormalise(module)
    layers = [layer for layer in module if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        matrix = layer.weight.detach().flatten(1)
        short = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        torch.testing.assert_close(short, torch.eye(len(short), dtype=torch.float64), rtol=0, atol=1e-12)
        assert not layer.bias.any()


@pytest.mark.parametrize("tolerance", [0.1, 0.001])
def test_algorithm_1(tolerance: float) -> None:
    module, points = net(), images()
    orthonormalise(module)
    expected = by_hand(module, points.numpy(), tolerance)
    start = [p.clone() for p in module.parameters()]
    scale_to_unit_variance(module, points, tolerance, 10)
    layers = [layer for layer in module if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer, weight in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.weight.detach(), torch.from_numpy(weight), rtol=1e-9, atol=1e-12)
    assert any(not torch.equal(one, other) for one, other in zip(start, module.parameters(), strict=True))
    assert not any(layer._forward_hooks for layer in module.modules())
    for layer in layers:  # and so the outputs, in a pass of their own
        seen: list[Tensor] = []
        handle = layer.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
        module(points)
        handle.remove()
        assert abs(seen[0].var().item() - 1) < tolerance


def test_within_the_tolerance_nothing_is_scaled() -> None:
    module, points = net(), images()
    scale_to_unit_variance(module, points, 1e-6, 10)
    before = copy.deepcopy(module.state_dict())
    scale_to_unit_variance(module, points, 0.1, 10)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_attempts_are_limited() -> None:
    """A bias whose own spread is above 1 cannot be scaled away."""
    layer = nn.Linear(1, 2)
    nn.init.constant_(layer.weight, 1.0)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([0.0, 10.0]))
    scale_to_unit_variance(layer, torch.linspace(-1, 1, 8)[:, None], 0.1, 3)
    expected = 1.0
    for _ in range(3):
        outputs = torch.linspace(-1, 1, 8)[:, None] * expected + torch.tensor([0.0, 10.0])
        expected /= outputs.var().sqrt().item()
    torch.testing.assert_close(layer.weight.detach(), torch.full((2, 1), expected))


def test_blank_images_are_refused() -> None:
    with pytest.raises(HarnessError, match="does not vary over 4 images"):
        scale_to_unit_variance(nn.Linear(3, 2, bias=False), torch.zeros(4, 3), 0.1, 10)


def test_prepare(make_method: Callable[..., Any]) -> None:
    """On a net with batch norm: each convolution's output has variance 1 where batch norm acts by the batch."""
    pixels = (images(64) * 255).to(torch.uint8)
    data = Batches(pixels, None, batch_size=16, seed=0, device=CPU)
    method = make_method(LSUV, tolerance=0.01, num_images=64)
    untouched = make_method(LSUV).encoder
    method.eval()
    method.prepare(data)
    assert not any(module.training for module in method.encoder.modules())
    norms = [module for module in method.encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.num_batches_tracked == 4 for norm in norms)
    assert not torch.allclose(norms[0].running_mean, torch.zeros(16))
    variances: list[float] = []
    for module in method.encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, output: variances.append(output.var().item()))
    with torch.no_grad():
        method.encoder.train()(pixels)
    assert len(variances) == 4 and variances == pytest.approx([1.0] * 4, abs=0.01)
    for one, other in zip(method.encoder.parameters(), untouched.parameters(), strict=True):
        ratio = one.detach()[other != 0] / other.detach()[other != 0]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))  # one factor per layer, and nothing else


def test_what_it_says_of_itself() -> None:
    assert LSUV.role is None and LSUV.family == "control" and not LSUV.trains
