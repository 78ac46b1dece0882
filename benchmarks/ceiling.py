"""What a training step can reach without an input pipeline: the model alone, on a resident batch.

    python benchmarks/ceiling.py [--device cuda] [--compile] [--nets ...] [--rounds 3]

Forward, loss, backward and SGD on one float batch that is made once: no data, no views. An image means all its views.
FLOPs and bytes are those that harness/floor.py counts on the same method; "of floor" is against its rates in the
step's own precision, "of bf16 rate" against one product of 1536 x 1536 matrices in bf16 (8192 on CUDA), which fp32 cannot
reach where bf16 is faster. All are timed in the same rounds as the steps: a core's rates follow what its neighbours do.
The design asks for 80% of the bf16 rate of ResNet-18 in bf16 and channels_last, on one core. Where that is not reached,
convolutions are 80 to 86% of the step (torch's profiler) and themselves below the product's rate.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import median, options, spread

from harness import floor, optim
from harness.arms import build_method
from harness.config import Layers, resolve
from harness.contracts import DatasetInfo, Method
from harness.methods.simclr import nt_xent_loss

# net: method, side in pixels, channels, images per step on a CPU core and on a GPU
NETS = {
    "resnet18_small": ("simclr", 32, 3, 64, 512),
    "resnet18": ("simclr", 96, 3, 64, 256),
    "paper_cifar10": ("sc", 32, 3, 32, 1024),
    "paper_stl10": ("sc", 96, 3, 8, 256),
    "convnet_small": ("sc", 28, 1, 128, 4096),
}
SETTINGS = {
    "fp32": (False, False),
    "fp32 channels_last": (False, True),
    "bf16": (True, False),
    "bf16 channels_last": (True, True),
}
PRODUCT = {"cpu": 1536, "cuda": 8192}  # side of the matrices


def toy_info(side: int, channels: int) -> DatasetInfo:
    """Images of a size, of nothing in particular."""
    return DatasetInfo(
        name="toy", title="Toy", classes=tuple("abcdefghij"), image_size=(side, side), channels=channels,
        mean=(0.5,) * channels, std=(0.25,) * channels, counts={"train": 0}, licence="", citation="",
        default_encoder="", pretrain_split="train", mirror_keeps_label=channels == 3,
    )  # fmt: skip


def make(method: str, net: str, info: DatasetInfo) -> Method:
    return build_method(method, resolve(method, "toy", Layers(flags={"encoder.name": net}), default_encoder=net), info)


def yardsticks_on(device: torch.device) -> dict[str, Callable[[], object]]:
    """The fixed product in bf16 and what harness/floor.py measures; timed in turn with the steps held against them."""
    side = PRODUCT[device.type]
    calls: dict[str, Callable[[], object]] = {}
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    calls["bf16 rate"] = lambda: left @ right
    for bf16 in (False, True):
        for name, (_, call) in floor.arithmetic(device, bf16).items():
            calls[f"{name} {bf16}"] = call
    calls["copy"] = floor.traffic(device)[1]
    return calls


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as one CUDA graph, as a run has it: launched one by one its kernels are too small for the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def make_step(method: Any, views: Tensor, seeds: Tensor, bf16: bool, compiled: bool) -> Callable[[], None]:
    """One step of `method` behind its views: (images or 2 x images, C, H, W) floats."""

    def loss(views: Tensor) -> Tensor:
        feature_map = method.encoder(views)
        if method.views_per_image == 1:
            value: Tensor = method.criterion(feature_map, seeds)[0][0]
            return value
        first, second = method.projector(method.encoder.pool(feature_map)).chunk(2)
        return nt_xent_loss(first, second, method.config.temperature)

    call = torch.compile(loss, dynamic=False) if compiled else loss
    optimizer = optim.build(optim.OptimConfig(lr=1e-3), method.parameter_groups())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        # no cache of cast weights: it would outlive a capture, and each weight is cast once per forward anyway
        with torch.autocast(views.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            value = call(views)
        value.backward()
        optimizer.step()

    return step


def main() -> None:
    chosen, bench = options(
        "ceiling", __doc__ or "",
        nets={"nargs": "+", "choices": list(NETS), "default": list(NETS)},
        batch={"type": int, "default": None, "help": "images per step (default: each net's own)"},
        settings={"choices": ("all", "best"), "default": "all", "help": "best: bf16 and channels_last only"},
        compile={"action": "store_true", "help": "time bf16 channels_last compiled as well (minutes on one core)"},
    )  # fmt: skip
    device = bench.device
    gpu = device.type == "cuda"
    if gpu:
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, as in a run
    yardsticks = yardsticks_on(device)
    for net in chosen.nets:
        method_name, pixels, channels, small, large = NETS[net]
        images, info = chosen.batch or (large if gpu else small), toy_info(pixels, channels)
        cost = floor.count(make(method_name, net, info).to(device), info, images, device)
        seeds = torch.arange(images, device=device)
        settings = {
            name: (*options_, False)
            for name, options_ in SETTINGS.items()
            if chosen.settings == "all" or options_ == (True, True)
        }
        if chosen.compile:
            settings["bf16 channels_last compiled"] = (True, True, True)
        steps = {}
        for name, (bf16, channels_last, compiled) in settings.items():
            torch.manual_seed(0)
            layout = torch.channels_last if channels_last else torch.contiguous_format
            method: Any = make(method_name, net, info).to(device, memory_format=layout)  # type: ignore[call-overload]
            views = torch.rand(images * method.views_per_image, channels, pixels, pixels, device=device)
            step = make_step(method.train(), views.contiguous(memory_format=layout), seeds, bf16, compiled)
            steps[name] = captured(step) if gpu else step
        times = bench.time(yardsticks | steps, warm=5 if gpu else 1)
        product = 2 * PRODUCT[device.type] ** 3 / median(times["bf16 rate"])
        copied = floor.traffic(device)[0] / median(times["copy"])
        rates = {
            bf16: floor.Rates(
                max(
                    work / median(times[f"{name} {bf16}"]) for name, (work, _) in floor.arithmetic(device, bf16).items()
                ),
                copied,
            )
            for bf16 in (False, True)
        }
        rows = []
        for name, (bf16, _, _) in settings.items():
            seconds = median(times[name]) / images
            least = floor.Floor(cost.flops, cost.elements * (2 if bf16 else 4), rates[bf16])
            rows.append([
                name, 1 / seconds, spread(times[name]), cost.flops / seconds / 1e9,
                f"{100 * cost.flops / seconds / product:.1f}%", f"{100 * least.seconds / seconds:.1f}%",
                f"{100 * least.seconds_without_overlap / seconds:.1f}%",
            ])  # fmt: skip
            bench.figures[f"{net} {name}"] = 1 / seconds
        bench.table(
            f"{net}, {method_name}, {pixels} px, {images} images a step, {cost.flops / 1e9:.3g} GFLOP and "
            f"{2 * cost.elements / 1e6:.3g} MB (bf16) per image; bf16 rate {product / 1e9:,.0f} GFLOP/s; floors at "
            f"{rates[True].flops / 1e9:,.0f} GFLOP/s in bf16, {rates[False].flops / 1e9:,.0f} in fp32, {copied / 1e9:.3g} GB/s",
            ["setting", "images/s", "spread", "GFLOP/s", "of bf16 rate", "of floor", "of floor without overlap"], rows,
        )  # fmt: skip
        del steps
    bench.finish()


if __name__ == "__main__":
    main()
