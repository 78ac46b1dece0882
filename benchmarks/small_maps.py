"""Convolutions over small maps as products of matrices (harness/small_maps.py) against torch's, and what a step gains.

    python benchmarks/small_maps.py [--views 32] [--batch 16] [--rounds 5]

The convolutions are the strided, last and 1 x 1 ones of ResNet-18 at 32 and 96 px, forward and backward in bf16; a step is
that of `benchmarks/peers.py` on prepared views. Only CPUs with matrix units (AMX) use the products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measuring import Bench, median, options, spread
from peers import ENCODERS, ours

from harness import small_maps

SHAPES = (
    (128, 256, 3, 2, 12), (256, 256, 3, 1, 6), (256, 512, 3, 2, 6), (256, 512, 1, 2, 6), (512, 512, 3, 1, 3),
    (256, 512, 3, 2, 8), (256, 512, 1, 2, 8), (512, 512, 3, 1, 4),
)  # channels in and out, side, stride, side of the map that goes in  # fmt: skip
LEAST = small_maps.LEAST_WEIGHTS


def choosing(least: int, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, with products from so many weights on."""

    def one() -> None:
        small_maps.LEAST_WEIGHTS = least
        call()

    return one


def convolution(channels: int, out: int, side: int, stride: int, size: int, views: int) -> Callable[[], Any]:
    """Forward and backward pass of one convolution."""
    conv = small_maps.Conv2d(channels, out, side, stride, side // 2, bias=False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(views, channels, size, size).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        slope = torch.randn_like(conv(images))

    def one() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            result = conv(images)
        torch.autograd.grad(result, (images, conv.weight), slope)

    return one


def compare(bench: Bench, title: str, calls: dict[str, Callable[[], Any]]) -> None:
    """One table: each call by torch's convolutions and by ours, in turn."""
    found = bench.time(
        {f"{name}|{least}": choosing(least, call) for name, call in calls.items() for least in (10**12, LEAST)}, warm=2
    )
    rows = []
    for name in calls:
        torchs, products = found[f"{name}|{10**12}"], found[f"{name}|{LEAST}"]
        ratios = [a / b for a, b in zip(torchs, products, strict=True)]  # of one round
        rows.append([name, 1e3 * median(torchs), 1e3 * median(products), median(ratios), spread(ratios)])
    bench.table(title, ["what", "torch's, ms", "products, ms", "gain", "spread"], rows)
    bench.figures[title] = {row[0]: row[3] for row in rows}


def main() -> None:
    """Measure and print."""
    chosen, bench = options(
        "small_maps", __doc__ or "", views={"type": int, "default": 32, "help": "maps that a convolution alone takes"},
        batch={"type": int, "nargs": "+", "default": [16, 64], "help": "images per step, two views of each"},
    )  # fmt: skip
    if not small_maps.has_matrix_units():
        raise SystemExit("this CPU has no matrix units (AMX): the products are not used here")
    names = {f"{a} to {b}, {k} x {k}, stride {s}, {n} x {n}": (a, b, k, s, n) for a, b, k, s, n in SHAPES}
    compare(
        bench, f"convolutions over {chosen.views} maps, forward and backward",
        {name: convolution(*shape, chosen.views) for name, shape in names.items()},
    )  # fmt: skip
    steps = {}
    for side in (32, 96):
        for batch in chosen.batch:
            pixels = np.random.default_rng(0).integers(0, 256, (2 * batch, side, side, 3), dtype=np.uint8)
            step, how = ours(pixels, side, batch, bench.device, "off", "bf16", prepared=True)
            steps[f"{ENCODERS[side]}, {side} px, batch {batch} ({how})"] = step
    compare(bench, "a step of SimCLR on prepared views", steps)
    bench.finish()


if __name__ == "__main__":
    main()
