"""Seeds trained together (harness.stacked) against the same seeds trained one after another.

    python benchmarks/seeds.py [--device cuda] [--method sc] [--encoders convnet_small,paper_mnist]
                               [--precisions fp32,bf16] [--counts 1,2,4,8,16] [--batch 128] [--rounds 5] [--json]

One call is a whole training step (batch, views, forward, backward, SGD) of every seed, on random images of 28 x 28; on
CUDA both are also captured in graphs. images/s counts all seeds; the ratio is the median over rounds of each round's
own ratio, above 1 where training together wins. A point whose separate steps are over --longest seconds is left out.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import Bench, median, options, spread

from harness import optim, registry
from harness.arms import build_method
from harness.batches import Batches
from harness.config import Layers, resolve
from harness.contracts import DatasetInfo, Method
from harness.optim import OptimConfig
from harness.stacked import StackedBatches, StackedMethod
from harness.step import Mode, Step, StepConfig

IMAGES = 2048


def information() -> DatasetInfo:
    """The digits' facts with MNIST's image size."""
    plugin, _ = registry.load_dataset("digits")
    return dataclasses.replace(plugin(Path(), None, None).info, image_size=(28, 28))


def methods(name: str, encoder: str, count: int, device: torch.device) -> list[Method]:
    """One method per seed."""
    info = information()
    configs = [resolve(name, "digits", Layers(flags={"seed": seed}), default_encoder=encoder) for seed in range(count)]
    return [build_method(name, config, info).to(device, memory_format=torch.channels_last) for config in configs]  # type: ignore[call-overload]


def stepper(method: Method, data: Batches, bf16: bool, mode: Mode, device: torch.device) -> Callable[[], None]:
    """A call that takes the next training step."""
    method.train()
    settings = OptimConfig()
    optimizer = optim.build(settings, method.parameter_groups())
    step = Step(method, optimizer, StepConfig(bf16, mode=mode), device, 0, lambda text: print(text, file=sys.stderr))
    taken = [0]

    def call() -> None:
        step(data.at(taken[0]), taken[0], 0.0, settings.lr)
        taken[0] += 1

    return call


def candidates(bench: Bench, chosen: Any, encoder: str, count: int, bf16: bool) -> dict[str, Callable[[], None]]:
    """`one by one` and `together`, eager and, on CUDA, captured."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 1, 28, 28), dtype=torch.uint8, generator=generator).to(bench.device)
    out: dict[str, Callable[[], None]] = {}
    modes: tuple[Mode, ...] = ("off", "graph") if bench.device.type == "cuda" else ("off",)
    for mode in modes:
        suffix = "" if mode == "off" else ", graph"

        def batches() -> list[Batches]:
            return [
                Batches(images, None, batch_size=chosen.batch, seed=seed, device=bench.device) for seed in range(count)
            ]

        alone = [
            stepper(method, data, bf16, mode, bench.device)
            for method, data in zip(methods(chosen.method, encoder, count, bench.device), batches(), strict=True)
        ]
        group = StackedMethod(methods(chosen.method, encoder, count, bench.device), OptimConfig().weight_decay)
        out[f"one by one{suffix}"] = lambda alone=alone: [call() for call in alone]  # type: ignore[misc]
        out[f"together{suffix}"] = stepper(group, StackedBatches(batches()), bf16, mode, bench.device)
    return out


def main() -> None:
    chosen, bench = options(
        "seeds", __doc__ or "",
        method={"default": "sc"}, encoders={"default": "convnet_small,paper_mnist"},
        precisions={"default": "fp32,bf16"}, counts={"default": "1,2,4,8,16"}, batch={"type": int, "default": 128},
        longest={"type": float, "default": 1e9, "help": "seconds of one step of all seeds, one by one"},
    )  # fmt: skip
    for encoder in chosen.encoders.split(","):
        for precision in chosen.precisions.split(","):
            rows: list[list[Any]] = []
            for count in map(int, chosen.counts.split(",")):
                calls = candidates(bench, chosen, encoder, count, precision == "bf16")
                first = next(iter(calls.values()))
                first()
                if bench._once(first, 1) > chosen.longest:
                    continue
                times = bench.time(calls)
                for name in (name for name in times if name.startswith("together")):
                    base = times[name.replace("together", "one by one")]
                    ratios = [a / b for a, b in zip(base, times[name], strict=True)]
                    images = count * chosen.batch
                    rows.append([name.removeprefix("together, ") if "," in name else "eager", count,
                                 images / median(base), spread(base), images / median(times[name]), spread(times[name]),
                                 median(ratios), spread(ratios)])  # fmt: skip
            columns = ["step", "seeds", "one by one, images/s", "", "together, images/s", "", "ratio", ""]
            title = f"{chosen.method}, {encoder}, batch {chosen.batch} per seed, 28 x 28, {precision}"
            bench.table(title, columns, rows)
            bench.figures[f"{encoder} {precision}"] = rows
    bench.finish()


if __name__ == "__main__":
    main()
