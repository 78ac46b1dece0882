"""The least time that a device needs for a training step, and how much of it a run has reached.

Arithmetic and memory traffic of one step are counted on the method as it is, forward and backward, teacher passes and
all views included; the device's rates are measured. Traffic is that of layer-by-layer training with normalisation and
activation fused as far as compilers do it today, in passes over a tensor's elements:

    convolution  forward: 2 over its output (written, read by what is fused behind it), 1 over its input
                 backward: 8 over its output (batch statistics, normalisation and activation, their gradients), 1 over
                 its input for the weights' gradient, 1 to write the input's own gradient where one is asked for
    max pooling  1 over input and output, in each direction
    product      every operand and the result once (attention likewise)

So a trained convolution costs 10 passes over its output and 3 over its input (2 where the input is the image), a
teacher's 2 and 1. An element has 2 bytes in bf16 and 4 in fp32. Element-wise work that no compiler needs to leave by
itself, views and the optimiser are not in it: nothing trains at 100% of this floor.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from harness.contracts import Batch, DatasetInfo, Encoder, Method

aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """Of training one image, with all its views. elements: read or written, see the module's text."""

    flops: float
    elements: float


@dataclass(frozen=True)
class Rates:
    """What a device was measured to do: floating-point operations and bytes (read + written) per second."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Floor:
    """The least seconds for one image: arithmetic and traffic at the same time, or one after the other."""

    flops: float
    bytes: float
    rates: Rates

    @property
    def seconds(self) -> float:
        """Perfect overlap of arithmetic and traffic."""
        return max(self.flops / self.rates.flops, self.bytes / self.rates.bytes)

    @property
    def seconds_without_overlap(self) -> float:
        return self.flops / self.rates.flops + self.bytes / self.rates.bytes


# ------------------------------------------------------------------------------------------------------------ counting


class _Counter(TorchDispatchMode):
    """Adds up what passes by, below autograd: the backward pass comes along as the operations that it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
            self.elements += _elements(packet, args, out)
        elif packet == aten.max_pool2d_with_indices:
            self.elements += args[0].numel() + out[0].numel()
        elif packet == aten.max_pool2d_with_indices_backward:
            self.elements += args[0].numel() + out.numel()
        return out


def _elements(packet: Any, args: tuple[Any, ...], out: Any) -> int:
    if packet == aten.convolution:
        return 2 * out.numel() + args[0].numel()
    if packet == aten.convolution_backward:
        grad, image, wanted = args[0], args[1], args[-1]
        return 8 * grad.numel() + (2 if wanted[0] else 1) * image.numel()
    return sum(leaf.numel() for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor))


def count(method: Method, info: DatasetInfo, batch_size: int, device: torch.device) -> Cost:
    """One step of a stand-in for `method` whose tensors have shapes and no values: nothing is computed or changed.

    Raises whatever a method raises that looks at values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # a deep copy in which every weight is replaced by its stand-in, so that none is copied
    stand_ins: dict[int, Any] = {id(t): mode.from_tensor(t) for t in (*method.parameters(), *method.buffers())}
    double: Method = copy.deepcopy(method, stand_ins).train()
    for encoder in [module for module in double.modules() if isinstance(module, Encoder)]:
        encoder.activation_checkpointing = False  # what is computed twice to save memory is not the least
    counter = _Counter()
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), mode:
        indices = torch.zeros(batch_size, dtype=torch.int64, device=device)
        images = torch.empty(batch_size, info.channels, *info.image_size, dtype=torch.uint8, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        batch = Batch(images, indices if double.supervised else None, indices, indices)
        with counter:
            double.loss(batch, torch.zeros((), dtype=torch.int64, device=device))["loss"].backward()
    return Cost(counter.flops / batch_size, counter.elements / batch_size)


# ----------------------------------------------------------------------------------------------------------- measuring

_SECONDS = 0.1  # for each candidate
_SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices
_CONVOLUTION = (2, 256, 32)  # images, channels in and out, side; 3 x 3
_COPIED = {"cpu": 2**26, "cuda": 2**30}  # bytes, far more than a core's share of the caches


def arithmetic(device: torch.device, bf16: bool) -> dict[str, tuple[float, Callable[[], Any]]]:
    """Work that a device does at its full rate: name -> (floating-point operations, call).

    On a CPU a convolution as well as a matrix product: fp32 products go through another library there, which on some
    processors (AMD's) reaches half of what convolutions do.
    """
    kind = torch.bfloat16 if bf16 else torch.float32
    side = _SIDE.get(device.type, 4096)
    # values do not matter to a multiplier as long as they are normal numbers; no random number is drawn here
    left = torch.linspace(-1, 1, side**2, device=device).reshape(side, side).to(kind)
    product = torch.empty_like(left)
    work: dict[str, tuple[float, Callable[[], Any]]] = {
        "product": (2.0 * side**3, lambda: torch.mm(left, left, out=product))
    }
    if device.type == "cpu":
        images, channels, pixels = _CONVOLUTION
        maps = torch.linspace(-1, 1, images * channels * pixels**2).reshape(images, channels, pixels, pixels).to(kind)
        maps = maps.contiguous(memory_format=torch.channels_last)
        weight = torch.linspace(-1, 1, 9 * channels**2).reshape(channels, channels, 3, 3).to(kind)
        weight = weight.contiguous(memory_format=torch.channels_last)
        flops = 2.0 * images * pixels**2 * 9 * channels**2
        work["convolution"] = (flops, lambda: torch.conv2d(maps, weight, padding=1))
    return work


def traffic(device: torch.device) -> tuple[float, Callable[[], Any]]:
    """A copy: (bytes read and written, call)."""
    source = torch.zeros(_COPIED.get(device.type, 2**28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * len(source), lambda: target.copy_(source)


@cache
def _measured(device: torch.device, bf16: bool, threads: int) -> Rates:
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        flops = max(count / _best_seconds(call, device) for count, call in arithmetic(device, bf16).values())
        size, call = traffic(device)
        return Rates(flops, size / _best_seconds(call, device))


def rates(device: torch.device, bf16: bool) -> Rates:
    """What `device` does with torch's present number of threads; measured once per process, 0.3 s."""
    return _measured(device, bf16, torch.get_num_threads() if device.type == "cpu" else 0)


def _best_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The quickest of repeated calls: what else the machine does only ever slows one down."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    call()
    wait()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        started = time.perf_counter()
        call()
        wait()
        best = min(best, time.perf_counter() - started)
    return best


# -------------------------------------------------------------------------------------------------------------- floors


def find(method: Method, info: DatasetInfo, batch_size: int, device: torch.device, bf16: bool) -> Floor | None:
    """The floor of training `method` on `device`; None for what trains nothing or cannot be counted."""
    if not method.trains:
        return None
    try:
        cost = count(method, info, batch_size, device)
        return Floor(cost.flops, cost.elements * (2 if bf16 else 4), rates(device, bf16))
    except Exception:  # a number beside a result: whatever goes wrong with it must not cost the result
        return None
