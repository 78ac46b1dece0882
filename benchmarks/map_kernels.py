"""Whole captured training steps on CUDA with torch's batch norm, max pooling and views, and with ours.

    python benchmarks/map_kernels.py [--device cuda:0] [--rounds 5] [--trace]

The same method, weights, batch and order of images; one graph per step, bf16, channels_last, views included. Random
pixels: about time, nothing is learnt. `our maps`: batch norm and max pooling by harness.map_kernels; `our views`: by
harness.view_kernels; `our stem`: ResNet's first convolution by blocks of pixels (harness.stem); `views made`: on views made
once beforehand, what a step costs behind its views.
--trace: the kernels that the step of ours spends its time in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from measuring import Bench, median, options, spread

from harness import batch_norm, device_views, stem
from harness.arms import build_method
from harness.batches import Batches
from harness.config import Layers, resolve
from harness.contracts import DatasetInfo
from harness.optim import build
from harness.step import Step, StepConfig

IMAGES = 4096
# method, encoder, side in pixels, images per step
CASES = [
    ("sc", "paper_cifar10", 32, 512), ("sc", "paper_cifar10", 32, 1024), ("sc", "paper_stl10", 96, 256),
    ("simclr", "resnet18_small", 32, 256), ("simclr", "resnet18", 96, 256),
]  # fmt: skip
KERNELS_SHOWN = 25


def stepper(
    case: tuple[str, str, int, int], device: torch.device, ours: tuple[ModuleType, ...], prepared: bool = False
) -> Callable[[], None]:
    """A call that takes the next step; captured now. ours: the modules that may use kernels of ours."""
    name, encoder, side, batch = case
    info = DatasetInfo(
        "random", "random pixels", tuple("0123456789"), (side, side), 3, (0.5,) * 3, (0.25,) * 3, {"train": IMAGES},
        "", "", encoder, "train", True,
    )  # fmt: skip
    layers = Layers(flags={"encoder.name": encoder}, overrides={"batch_size": batch})
    config = resolve(name, "random", layers, default_encoder=encoder)
    method: Any = build_method(name, config, info).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randint(0, 256, (IMAGES, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    data = Batches(images, None, batch_size=batch, seed=0, device=device)
    if prepared:
        fixed = method.preview(data.at(0))
        method.preview = lambda _: fixed
    optimizer = build(config.optim, method.parameter_groups())
    step = Step(method.train(), optimizer, StepConfig(bf16=True, mode="graph"), device, 0, print)
    number = 0

    def one() -> None:
        nonlocal number
        step(data.at(number), number, 0.0, 0.01)
        number += 1

    with contextlib.ExitStack() as patched:
        for module in (batch_norm, device_views, stem):
            if module not in ours:
                patched.enter_context(mock.patch.object(module, "applicable", lambda *_: False))
        one()  # captures
    return one


def trace(bench: Bench, title: str, step: Callable[[], None]) -> None:
    """The kernels of five steps, longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(5):
            step()
        torch.cuda.synchronize(bench.device)
    kernels = [e for e in seen.key_averages() if str(e.device_type).endswith("CUDA")]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    rows = [[e.key[:90], e.count / 5, e.self_device_time_total / 5] for e in kernels[:KERNELS_SHOWN]]
    bench.table(f"{title}: kernels", ["kernel", "a step", "us a step"], rows)


def main() -> None:
    chosen, bench = options("map_kernels", __doc__ or "", device="cuda", trace={"action": "store_true"})
    if bench.device.type != "cuda":
        raise SystemExit("benchmarks/map_kernels.py: these kernels run on CUDA only, not on the CPU")
    rows = []
    for case in CASES:
        name, encoder, side, batch = case
        every = (batch_norm, device_views, stem)
        steps = {
            "torch's": stepper(case, bench.device, ()),
            "our maps": stepper(case, bench.device, (batch_norm,)),
            "our maps and views": stepper(case, bench.device, (batch_norm, device_views)),
        }
        if encoder == "resnet18":
            steps["our maps, views, stem"] = stepper(case, bench.device, every)
        if name == "simclr":  # whose loss takes its views from `preview`
            steps["all ours, views made"] = stepper(case, bench.device, every, prepared=True)
        times = bench.time(steps)
        base = median(times["torch's"])
        for how, seconds in times.items():
            rows.append([
                f"{name}, {encoder}, {side} px", batch, how, 1000 * median(seconds), spread(seconds),
                batch / median(seconds), base / median(seconds),
            ])  # fmt: skip
        if chosen.trace:
            whole = [step for how, step in steps.items() if "made" not in how][-1]
            trace(bench, f"{name}, {encoder}, {side} px, batch {batch}", whole)
    bench.table(
        "One captured step, bf16, views included", ["step", "batch", "kernels", "ms", "spread", "images/s", "x torch's"],
        rows,
    )  # fmt: skip
    bench.finish()


if __name__ == "__main__":
    main()
