"""Our kernels for maps against torch's operations in float64; interpreted by test_interpreted_kernels.py, compiled on CUDA."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import batch_norm, kernels, max_pool
from harness.batch_norm import BatchNorm2d, InOrder, fits

SHAPES = [(5, 48, 7, 7), (4, 64, 9, 5), (3, 20, 6, 6), (3, 160, 6, 6)]
ACTIVATIONS = [nn.ReLU(), nn.LeakyReLU(0.1), nn.Identity()]
CUDA = pytest.mark.gpu


def maps(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A map whose channels have means far from zero, and a gradient for the output."""
    generator = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(1, shape[1], 1, 1, generator=generator)
    images, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    layout: Any = {"memory_format": torch.channels_last, "dtype": dtype, "device": device}
    return (2 * images + means).to(**layout), gradient.to(**layout)


def pair(channels: int, activation: nn.Module) -> tuple[nn.Sequential, nn.Sequential]:
    """torch's in float64 and ours, the same weights."""
    theirs = nn.Sequential(nn.BatchNorm2d(channels), activation)
    norm: Any = theirs[0]
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(1))
        norm.bias.normal_(generator=torch.Generator().manual_seed(2))
        norm.running_mean.fill_(0.3)
    ours = InOrder(BatchNorm2d(channels), copy.deepcopy(activation))
    ours.load_state_dict(theirs.state_dict())
    return theirs.double(), ours


def check(shape: tuple[int, ...], activation: nn.Module, dtype: torch.dtype, device: str) -> None:
    images, gradient = maps(shape, dtype, device)
    theirs, ours = (module.to(device) for module in pair(shape[1], activation))
    norm: Any = theirs[0]
    expected_in, found_in = images.double().requires_grad_(), images.clone().requires_grad_()
    expected, found = theirs(expected_in), ours(found_in)
    with torch.no_grad():  # where the activation bends, rounding may take the other side
        normalised = nn.functional.batch_norm(images.double(), None, None, norm.weight, norm.bias, True)
    gradient = gradient * (normalised.abs() > 1e-5)
    expected.backward(gradient.double())
    found.backward(gradient)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    low = 1e-2 if dtype == torch.bfloat16 else 2e-6
    assert found_in.grad is not None and expected_in.grad is not None
    pairs = [(found, expected, low), (found_in.grad, expected_in.grad, low)]
    pairs += [(ours[0].weight.grad, theirs[0].weight.grad, 2e-6), (ours[0].bias.grad, theirs[0].bias.grad, 2e-6)]
    pairs += [(ours[0].running_mean, theirs[0].running_mean, 2e-6), (ours[0].running_var, theirs[0].running_var, 2e-6)]
    for one, other, tolerance in pairs:
        assert one is not None and float((one.double() - other).norm() / other.norm()) < tolerance
    assert int(ours[0].num_batches_tracked) == 1
    again = ours.eval()(images.float())
    torch.testing.assert_close(again.double(), theirs.eval()(images.double()), rtol=1e-4, atol=1e-4)


def check_sum(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Batch norm, what is added to it, ReLU."""
    images, gradient = maps(shape, dtype, device)
    other = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(gradient)
    theirs, ours = (module[0].to(device) for module in pair(shape[1], nn.ReLU()))
    wide = [t.double().requires_grad_() for t in (images, other)]
    own = [t.clone(memory_format=torch.channels_last).requires_grad_() for t in (images, other)]
    expected, found = (theirs(wide[0]) + wide[1]).relu(), ours.activated(own[0], 0.0, own[1])
    with torch.no_grad():
        before = (
            nn.functional.batch_norm(images.double(), None, None, theirs.weight, theirs.bias, True) + other.double()
        )
    gradient = gradient * (before.abs() > 1e-5)
    expected.backward(gradient.double())
    found.backward(gradient)
    low = 1e-2 if dtype == torch.bfloat16 else 2e-6
    pairs = [(found, expected, low), (own[0].grad, wide[0].grad, low)]
    pairs += [
        (own[1].grad, wide[1].grad, low),
        (ours.weight.grad, theirs.weight.grad, 1e-2 if low > 1e-3 else 2e-6),
    ]
    for one, expectation, tolerance in pairs:
        assert float((one.double() - expectation).norm() / expectation.norm()) < tolerance


WINDOWS = [(2, 2, 0), (3, 2, 1), (3, 1, 1), (2, 3, 0)]


def check_pooling(shape: tuple[int, ...], window: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    """To the bit but for the order of a sum; equal neighbours, and a NaN, go as torch has them."""
    images = maps(shape, dtype, device)[0]
    images = (4 * images).round() / 4  # ties
    images[0, 0, 1, 1] = torch.nan
    theirs, ours = images.clone().requires_grad_(), images.clone(memory_format=torch.channels_last).requires_grad_()
    expected = nn.MaxPool2d(*window)(theirs)
    found = max_pool._MaxPool.apply(ours, *window)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(6)).to(expected)
    expected.backward(gradient)
    found.backward(gradient)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)


def check_all_interpreted() -> None:
    batch_norm.PROGRAMS = 6  # so that sums over pixels are shared here too
    batch_norm.fits = lambda norm, images: norm.training
    check_sum(SHAPES[0], torch.float32, "cpu")
    check_sum(SHAPES[1], torch.bfloat16, "cpu")
    for window in WINDOWS:
        check_pooling(SHAPES[0], window, torch.float32, "cpu")
    check_pooling(SHAPES[1], WINDOWS[1], torch.bfloat16, "cpu")
    for shape in SHAPES:
        for activation in ACTIVATIONS:
            check(shape, activation, torch.float32, "cpu")
    check(SHAPES[1], nn.ReLU(), torch.bfloat16, "cpu")


def test_only_training_on_cuda_is_ours() -> None:
    images = maps(SHAPES[0], torch.float32)[0]
    norm = BatchNorm2d(48)
    assert not fits(norm, images)
    torch.testing.assert_close(norm(images), nn.BatchNorm2d(48)(images), rtol=0, atol=0)


def test_where_no_kernel_can_be_started_it_is_said_once_and_torchs_are_used() -> None:
    kernels.usable.cache_clear()
    nowhere = torch.device("cuda", 99)
    with pytest.warns(UserWarning, match="Triton cannot be used on cuda:99 .*; torch's own kernels are"):
        assert not kernels.usable(nowhere)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels.usable(nowhere)


@CUDA
@pytest.mark.parametrize("shape", [*SHAPES, (512, 96, 32, 32), (64, 192, 33, 31)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_cuda(shape: tuple[int, ...], activation: nn.Module, dtype: torch.dtype) -> None:
    assert fits(BatchNorm2d(shape[1]).cuda(), maps(shape, dtype, "cuda")[0])
    check(shape, activation, dtype, "cuda")


@CUDA
@pytest.mark.parametrize("shape", [*SHAPES, (64, 192, 33, 31)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_and_pooling_on_cuda(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_sum(shape, dtype, "cuda")
    for window in WINDOWS:
        check_pooling(shape, window, dtype, "cuda")


@CUDA
def test_the_same_bits_twice() -> None:
    images, gradient = maps((256, 96, 16, 16), torch.bfloat16, "cuda")
    found = []
    for _ in range(2):
        module, own = pair(96, nn.ReLU())[1].cuda(), images.clone().requires_grad_()
        out = module(own)
        out.backward(gradient)
        assert own.grad is not None
        found.append([out, own.grad, module[0].weight.grad, module[0].running_var])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
