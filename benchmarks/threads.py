"""What a second core brings: a training step with one thread and with several, in turn, in one process.

    python benchmarks/threads.py --core -1 [--sides 32 96] [--batch 16] [--most 2]

The step is that of `benchmarks/peers.py`: SimCLR on a ResNet-18, end to end and on prepared views. Below it stand what the
machine gives to pieces of it: products in bf16, convolutions of the network in bf16, and a copy that no cache holds. A host
whose other guests are busy lengthens most turns, and those on two cores more: the gain of the shortest is without them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measuring import Bench, median, options, spread
from peers import ENCODERS, POOL, ours


def with_threads(count: int, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, under so many threads of torch; it stays there until another call sets it."""

    def one() -> None:
        torch.set_num_threads(count)
        call()

    return one


def convolution(side: int, batch: int) -> Callable[[], Any]:
    """Forward and backward pass of the network's first 3 x 3 convolution of 64 channels, bf16, channels_last."""
    size = side if side == 32 else side // 4
    layer = torch.nn.Conv2d(64, 64, 3, 1, 1, bias=False).to(torch.bfloat16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(2 * batch, 64, size, size).to(torch.bfloat16).to(memory_format=torch.channels_last)
    images.requires_grad_()
    out = layer(images)
    slope = torch.randn_like(out)
    return lambda: torch.autograd.grad(layer(images), (images, layer.weight), slope)


def compare(bench: Bench, side: int, batch: int, counts: tuple[int, int]) -> None:
    """One table for one image size."""
    pixels = np.random.default_rng(0).integers(0, 256, (max(POOL, 2 * batch), side, side, 3), dtype=np.uint8)
    torch.set_num_threads(counts[1])
    step, how = ours(pixels, side, batch, bench.device, "off", "auto", prepared=False)
    model_only, _ = ours(pixels, side, batch, bench.device, "off", "auto", prepared=True)
    square, source = torch.randn(2048, 2048).bfloat16(), torch.randn(1 << 26)
    target = torch.empty_like(source)
    pieces: dict[str, Callable[[], Any]] = {
        f"a step ({how})": step, "the model only": model_only, "a convolution alone": convolution(side, batch),
        "a product of matrices, bf16": lambda: square @ square, "a copy of 256 MiB": lambda: target.copy_(source),
    }  # fmt: skip
    found = bench.time(
        {f"{name}|{count}": with_threads(count, call) for name, call in pieces.items() for count in counts}, warm=2
    )
    rows = []
    for name in pieces:
        few, many = (found[f"{name}|{count}"] for count in counts)
        ratios = [a / b for a, b in zip(few, many, strict=True)]  # of one round: what else the machine does meets both
        rows.append([name, 1e3 * median(few), 1e3 * median(many), median(ratios), spread(ratios), min(few) / min(many)])
    bench.table(
        f"SimCLR, ResNet-18 ({ENCODERS[side]}), {side} px, batch {batch}: milliseconds",
        ["what", f"{counts[0]} thread", f"{counts[1]} threads", "gain", "spread", "of the shortest"], rows,
    )  # fmt: skip
    bench.figures[str(side)] = {row[0]: row[3] for row in rows}


def main() -> None:
    """Measure and print."""
    chosen, bench = options(
        "threads", __doc__ or "", sides={"type": int, "nargs": "+", "default": [32, 96], "choices": [32, 96]},
        batch={"type": int, "default": 16, "help": "images per step"},
        most={"type": int, "default": 2, "help": "threads, against one"},
    )  # fmt: skip
    if chosen.core >= 0:
        raise SystemExit("threads need cores to run on: give --core -1")
    for side in chosen.sides:
        compare(bench, side, chosen.batch, (1, chosen.most))
    bench.finish()


if __name__ == "__main__":
    main()
