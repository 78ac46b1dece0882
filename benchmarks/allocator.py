"""What keeping freed memory (harness/allocator.py) is worth: the same training step with it and without, in turn.

    python benchmarks/allocator.py [--nets resnet18 paper_stl10] [--rounds 5] [--json]

malloc cannot be told to forget, so every figure comes from a process of its own: pinned to one core, one thread, the
bf16 channels_last step of benchmarks/ceiling.py, five steps after two. Faults: pages taken from the kernel per step.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ceiling import NETS, make, make_step, toy_info
from measuring import median, options, spread

STEPS, WARM = 5, 2
KINDS = ("as it comes", "kept")


def one(net: str, kind: str) -> dict[str, float]:
    """CPU seconds and faults per step, and the peak of memory, in a fresh process."""
    command = [sys.executable, __file__, "--core", "1", "--child", f"{net},{kind}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def child(net: str, kind: str) -> None:
    if kind == "kept":
        from harness.allocator import keep_freed_memory

        assert keep_freed_memory(), "this C library cannot be told"
    method_name, pixels, channels, images, _ = NETS[net]
    torch.manual_seed(0)
    method: Any = make(method_name, net, toy_info(pixels, channels))
    method.to(memory_format=torch.channels_last).train()
    views = torch.rand(images * method.views_per_image, channels, pixels, pixels)
    step = make_step(
        method, views.contiguous(memory_format=torch.channels_last), torch.arange(images), bf16=True, compiled=False
    )
    for _ in range(WARM):
        step()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
    for _ in range(STEPS):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = (time.process_time() - began) / STEPS
    print(
        json.dumps({"seconds": seconds, "faults": (after.ru_minflt - before) / STEPS, "peak": after.ru_maxrss / 1024})
    )


def main() -> None:
    chosen, bench = options(
        "allocator", __doc__ or "",
        nets={"nargs": "+", "choices": list(NETS), "default": list(NETS)},
        child={"default": "", "help": "used by the benchmark itself"},
        keep_memory=False,
    )  # fmt: skip
    if chosen.child:
        child(*chosen.child.split(","))
        return
    rows = []
    for net in chosen.nets:
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(bench.rounds):
            for kind in KINDS:
                found[kind].append(one(net, kind))
        base = median([each["seconds"] for each in found[KINDS[0]]])
        for kind in KINDS:
            times = [each["seconds"] for each in found[kind]]
            faults, peak = median([e["faults"] for e in found[kind]]), max(e["peak"] for e in found[kind])
            rows.append(
                [net, kind, 1000 * median(times), spread(times), base / median(times), round(faults), round(peak)]
            )
    bench.table("one training step, bf16, channels_last, one core",
                ["net", "freed memory", "ms", "spread", "times as fast", "faults a step", "peak MiB"], rows)  # fmt: skip
    bench.finish()


if __name__ == "__main__":
    main()
