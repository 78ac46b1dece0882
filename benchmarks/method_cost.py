"""What one image costs each method in training, relative to `sc`: time end to end and peak memory, all in one run.

    python benchmarks/method_cost.py [--methods sc simclr] [--rounds 5] [--core 0] [--json]
    python benchmarks/method_cost.py --show benchmarks/results/method_cost-cpu-DATE.json

A step is what `harness run` takes: batches of resident digits (1,297 images, 28 px), the method's views, forward, loss,
backward, optimiser, teachers and queues (`harness.batches.Batches`, `harness.step.Step`), in the precision that a run
would choose. The settings are those of the recipe `quick`: batch 128, `convnet_small`; methods with an encoder of their
own keep it and are marked. What a method does before each epoch (clusters) is timed by itself and spread over the steps
of an epoch of digits. Peak memory is that of a process of its own that takes three steps, above what it held before the
method was built; there the images are shared, and torch's own room is not counted. Nothing is learnt here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import conditions_line, laid_out, median, options, spread

from harness import registry
from harness.arms import build_method, own_encoder, resolve_precision
from harness.batches import Batches
from harness.config import Layers, RunConfig, load_recipe, resolve
from harness.contracts import DatasetInfo, Method, Split
from harness.optim import build as build_optimizer
from harness.provenance import peak_memory_bytes
from harness.step import Step, StepConfig

YARDSTICK = "sc"
MEMORY_STEPS = 3


def trained() -> list[str]:
    """Every registered method that takes steps, the yardstick first."""
    names = [name for name in registry.names("method") if registry.load_method(name).trains]
    return sorted(names, key=lambda name: (name != YARDSTICK, name))


def settings_of(name: str) -> RunConfig:
    """The recipe `quick`, without the accumulation or compilation that nobody asked for."""
    return resolve(name, "digits", Layers([load_recipe("quick")]), default_encoder="convnet_small")


class Training:
    """One method in training, a step at a time."""

    def __init__(self, name: str, info: DatasetInfo, split: Split, device: torch.device) -> None:
        config = settings_of(name)
        built: Any = build_method(name, config, info)
        self.method: Method = built.to(device, memory_format=torch.channels_last).train()
        labels = split.labels if self.method.supervised else None
        self.data = Batches(split.images, labels, batch_size=config.batch_size, seed=0, device=device)
        self.batch_size, self.number, self.lr = config.batch_size, 0, 1e-3  # small: no loss may run away meanwhile
        self.method.prepare(self.data)
        self.method.on_epoch_start(self.data, 0)
        bf16 = resolve_precision(config.precision, device) == "bf16"
        optimizer = build_optimizer(config.optim, self.method.parameter_groups())
        self._step = Step(self.method, optimizer, StepConfig(bf16, config.optim.clip_norm), device, 0, lambda _: None)

    def step(self) -> None:
        self._step(self.data.at(self.number), self.number, 0.5, self.lr)
        self.number += 1

    def epoch_start(self) -> None:
        self.method.on_epoch_start(self.data, 1)

    @property
    def works_between_epochs(self) -> bool:
        return type(self.method).on_epoch_start is not Method.on_epoch_start


def peak_memory(start: Callable[[], Training], device: torch.device) -> int:
    """Bytes that building a method and a few steps need at most, measured in a forked process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        before = peak_memory_bytes(device)
        training = start()
        for _ in range(MEMORY_STEPS):
            training.step()
        os.write(writing, str(peak_memory_bytes(device) - before).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    if not text:
        raise SystemExit("a process that measures memory has failed; see above")
    return int(text)


def show(path: Path) -> None:
    """Print the tables of a document that --json printed."""
    document = json.loads(path.read_text())
    for table in document["tables"]:
        print(laid_out(table["title"], table["columns"], table["rows"]))
    print("\n" + conditions_line(document["conditions"]))


def main() -> None:
    if "--show" in sys.argv:
        show(Path(sys.argv[sys.argv.index("--show") + 1]))
        return
    chosen, bench = options(
        "method_cost", __doc__ or "",
        methods={"nargs": "+", "choices": trained(), "default": trained(), "help": f"{YARDSTICK} is always among them"},
    )  # fmt: skip
    device = bench.device
    plugin, _ = registry.load_dataset("digits")
    data = plugin(Path())
    info, split = data.info, data.split("train")
    names = list(dict.fromkeys([YARDSTICK, *chosen.methods]))
    # memory first: a process that has trained others would hand their freed pages to its children
    memory = {name: peak_memory(lambda name=name: Training(name, info, split, device), device) for name in names}  # type: ignore[misc]
    trainings = {name: Training(name, info, split, device) for name in names}
    calls = {name: training.step for name, training in trainings.items()}
    between = {f"{n} epoch": t.epoch_start for n, t in trainings.items() if t.works_between_epochs}
    times = bench.time(calls | between)
    costs: dict[str, dict[str, Any]] = {}
    for name, training in trainings.items():
        epoch = median(times.get(f"{name} epoch", [0.0])) / training.data.steps_per_epoch
        costs[name] = {
            "seconds_per_image": (median(times[name]) + epoch) / training.batch_size, "spread": spread(times[name]),
            "between_epochs": epoch / (median(times[name]) + epoch), "peak_bytes": memory[name],
            "views": training.method.num_views, "own_encoder": bool(own_encoder(name, settings_of(name), info)),
            "encoder": training.method.encoder.name,
        }  # fmt: skip
    yardstick = costs[YARDSTICK]
    rows = []
    for name, cost in sorted(costs.items(), key=lambda item: item[1]["seconds_per_image"]):
        cost["relative_time"] = cost["seconds_per_image"] / yardstick["seconds_per_image"]
        cost["relative_memory"] = cost["peak_bytes"] / yardstick["peak_bytes"]
        rows.append([
            name, cost["encoder"] + (" (own)" if cost["own_encoder"] else ""), cost["views"],
            1 / cost["seconds_per_image"], cost["spread"], cost["relative_time"],
            f"{100 * cost['between_epochs']:.0f}%", cost["peak_bytes"] / 2**20, cost["relative_memory"],
        ])  # fmt: skip
    bench.figures = costs
    precision = resolve_precision("auto", device)
    bench.table(
        f"training on digits, 28 px, batch 128, recipe quick, {precision}: cost of one image",
        ["method", "encoder", "views", "images/s", "spread", f"time / {YARDSTICK}", "between epochs", "peak MiB",
         f"memory / {YARDSTICK}"], rows,
    )  # fmt: skip
    bench.finish()


if __name__ == "__main__":
    main()
