"""Everything that is measured on one CUDA device, in under 8 minutes: the other benchmarks, then complete runs.

    python benchmarks/gpu.py [--parts peers runs mnist ceiling map_kernels sc_head seeds augment] [--seconds 15]
                             [--data-dir DATA] [--workers 16] [--out FOLDER] [--limit 480]

`runs` trains by the real loop on resident random pixels of the data sets' shapes for `--seconds` each, compilation and
capture apart, and extrapolates whole trainings from the measured images/s (random pixels: about time, nothing is
learnt). `mnist` is one complete `harness run --method sc --recipe paper-mnist` on real MNIST under --data-dir, wall
clock from the command line to its table. A part that fails says so in one line and the others go on; when --limit
seconds are over, the script at work is stopped and the rest are left out. Every part's output goes to --out as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measuring import Bench, options, synchronise

from harness import registry
from harness.arms import build_method, resolve_precision
from harness.batches import Batches
from harness.config import Layers, resolve
from harness.contracts import DatasetInfo
from harness.optim import build as build_optimizer
from harness.step import Step, StepConfig, resolve_mode

HERE = Path(__file__).resolve().parent
# title: (method, encoder, side, images in the data set, batch, epochs that are extrapolated to, settings)
RUNS = {
    "SC, CIFAR-10-shaped, 50 epochs": ("sc", "paper_cifar10", 32, 50_000, 512, 50, {}),
    "SC, STL-10-shaped, 105k x 100 epochs": ("sc", "paper_stl10", 96, 105_000, 256, 100, {}),
    "SimCLR, ResNet-18, CIFAR-10-shaped, 200 epochs": ("simclr", "resnet18_small", 32, 50_000, 512, 200, {}),
}
SCRIPTS = {
    "peers": ["peers.py", "--rounds", "2"], "ceiling": ["ceiling.py", "--settings", "best"], "map_kernels": ["map_kernels.py"],
    "sc_head": ["sc_head.py"], "seeds": ["seeds.py", "--counts", "4,16", "--precisions", "bf16"],
    "augment": ["augment.py"], "scaling": ["scaling.py"],
}  # fmt: skip
LEFT_OUT = "left out: no time is left"
PARTS = ["peers", "runs", "mnist", "ceiling", "map_kernels", "sc_head", "seeds", "augment", "scaling"]


def train_for(bench: Bench, title: str, seconds: float, mode_name: str, scale: int) -> list[object]:
    """One row: images/s of the real step on resident data, and what a whole training would take."""
    method_name, encoder, side, count, batch, epochs, settings = RUNS[title]
    device, count, batch = bench.device, max(64, count // scale), max(8, batch // scale)
    info = DatasetInfo(
        "random", "random pixels", tuple("0123456789"), (side, side), 3, (0.5,) * 3, (0.25,) * 3, {"train": count},
        "", "", encoder, "train", True,
    )  # fmt: skip
    layers = Layers(flags={"encoder.name": encoder}, overrides={"batch_size": batch, **settings})
    config = resolve(method_name, "random", layers, default_encoder=encoder)
    method = build_method(method_name, config, info).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    data = Batches(images, None, batch_size=batch, seed=0, device=device)
    plugin = registry.load_method(method_name)
    why_not = "" if plugin.graphable else plugin.why_not_graphable
    mode = resolve_mode(mode_name, device, why_not)
    bf16 = resolve_precision("auto", device) == "bf16"
    optimizer = build_optimizer(config.optim, method.parameter_groups())
    step = Step(method.train(), optimizer, StepConfig(bf16, mode=mode), device, 0, print)
    began = time.perf_counter()
    step(data.at(0), 0, 0.0, 0.01)
    synchronise(device)
    first = time.perf_counter() - began
    for number in range(1, 11):
        step(data.at(number), number, 0.0, 0.01)
    step.read()
    number, began = 11, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(20 if device.type == "cuda" else 1):
            step(data.at(number), number, 0.0, 0.01)
            number += 1
        step.read()
    took = time.perf_counter() - began
    rate = (number - 11) * batch / took
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    print(f"{title}: {rate:,.0f} images/s", file=sys.stderr, flush=True)
    return [title, f"{'bf16' if bf16 else 'fp32'}, {step.mode}", batch, first, took, rate, epochs * count / rate, peak]


def train_all(bench: Bench, seconds: float, mode_name: str, scale: int, ends: float) -> list[list[object]]:
    """The table of `train_for`, none of it begun after `ends`; -> rows of what failed or was left out."""
    rows, missing = [], []
    for title in RUNS:
        left = ends - time.perf_counter()
        if left < 5:
            missing.append([title, None, None, LEFT_OUT])
            continue
        try:
            rows.append(train_for(bench, title, min(seconds, left), mode_name, scale))
        except Exception as error:  # one run that does not fit must not cost the others
            missing.append([title, None, 1, f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"])
    bench.table(
        "Training by the real loop on resident random pixels; the whole training is extrapolated",
        ["run", "step", "batch", "first step s", "measured s", "images/s", "whole s", "peak GiB"], rows,
    )  # fmt: skip
    return missing


def complete_mnist(bench: Bench, data_dir: Path, out: Path | None, left: float) -> list[object]:
    """Wall seconds of one command on real MNIST, and its exit code; its table and rows go to `out`."""
    with tempfile.TemporaryDirectory() as workspace:
        words = ["run", "--method", "sc", "--dataset", "mnist", "--recipe", "paper-mnist", "--offline", "--no-control"]
        words += ["--data-dir", str(data_dir), "--workspace", workspace, "--device", str(bench.device)]
        command = [sys.executable, "-c", "from harness.cli import main; main()", *words]
        row = ended(bench, "harness " + " ".join(words[:5]), command, out / "mnist.txt" if out else None, left)
        if out is not None and (Path(workspace) / "results").is_dir():
            shutil.make_archive(str(out / "mnist-rows"), "gztar", workspace, "results")
    return row


def ended(bench: Bench, name: str, command: list[str], output: Path | None, left: float) -> list[object]:
    """Run a command for `left` seconds at most -> its name, wall seconds, exit code, last line of errors if it failed."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        try:
            code: int | None = subprocess.run(command, stdout=printed, stderr=errors, timeout=left).returncode
        except subprocess.TimeoutExpired:
            code = None
        took = time.perf_counter() - began
        table, said = (stream.seek(0) or stream.read() for stream in (printed, errors))
    if not bench.as_json:
        print(f"\n== {name}\n{table.strip()}", flush=True)
    if output is not None:
        output.write_text(table + (said[-4000:] if code else ""))
    last = ["stopped: no time is left"] if code is None else [line for line in said.splitlines() if line.strip()][-1:]
    return [name, took, code, last[0][:90] if last and code != 0 else ""]


def main() -> None:
    """Measure and print."""
    chosen, bench = options(
        "gpu", __doc__ or "", device="cuda",
        parts={"nargs": "+", "choices": PARTS, "default": [p for p in PARTS if p != "scaling"]},
        seconds={"type": float, "default": 15.0, "help": "of training per run that is extrapolated"},
        data_dir={"type": Path, "default": None, "help": "where real MNIST is"}, out={"type": Path, "default": None},
        workers={"type": int, "default": min(16, os.cpu_count() or 1), "help": "of the peers' loaders"},
        compile={"default": "auto", "help": "as `harness run --compile`"},
        scale={"type": int, "default": 1, "help": "divides image counts and batches, to try the script on a CPU"},
        limit={"type": float, "default": 480.0, "help": "seconds for all parts together"},
    )  # fmt: skip
    if chosen.out is not None:
        chosen.out.mkdir(parents=True, exist_ok=True)
    SCRIPTS["peers"] += ["--workers", str(chosen.workers)]
    effort = ["--device", str(bench.device), "--rounds", str(bench.rounds), "--min-seconds", str(bench.min_seconds)]
    rows: list[list[object]] = []
    ends = bench.began + chosen.limit
    for name in chosen.parts:
        left = ends - time.perf_counter()
        if left < 5:
            rows.append([name, None, None, LEFT_OUT])
        elif name == "runs":
            rows += train_all(bench, chosen.seconds, chosen.compile, chosen.scale, ends)
        elif name == "mnist":
            if chosen.data_dir is not None:
                rows.append(complete_mnist(bench, chosen.data_dir, chosen.out, left))
        else:
            command = [sys.executable, str(HERE / SCRIPTS[name][0]), *effort, *SCRIPTS[name][1:]]
            rows.append(ended(bench, name, command, chosen.out / f"{name}.txt" if chosen.out else None, left))
    bench.table("Parts and complete runs: wall seconds", ["part", "seconds", "exit code", "error"], rows)
    bench.finish()


if __name__ == "__main__":
    main()
