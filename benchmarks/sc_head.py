"""What spatial contrasting costs beside its network: patches, distances, loss, forward and backward.

    python benchmarks/sc_head.py [--device cuda] [--rounds 3]

Three forms of the same criterion (two flattened 4 x 4 patches of each 8 x 8 x 192 map, D = 3,072, one direction, L2): a
Python loop over images and anchors, as one writes it down; `unfold` and `cdist`; and the method's own. Then the
method's default head as a share of a whole training step, views included, on the paper's nets and the small ones.
Goals: at least 20 times the loop at N = 256; at most 1% of a step on the paper's nets.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ceiling import make, toy_info
from measuring import Bench, median, options, spread, synchronise

from harness import optim
from harness.arms import resolve_precision
from harness.augment import hash_seeds
from harness.contracts import Batch
from harness.methods.sc import patches_at, spatial_contrasting_loss

CELLS, SIDE, CHANNELS = 4, 8, 192
SIZES, LOOP_UP_TO = (64, 128, 256, 512, 1024), 256  # the loop keeps N^2 D values for its backward pass
LARGE = 4096
STEPS = {
    "paper_cifar10": (32, 3, 128),
    "paper_stl10": (96, 3, 16),
    "paper_mnist": (28, 1, 128),
    "convnet_small": (28, 1, 128),
}


def loop(feature_map: Tensor, corners: Tensor) -> Tensor:
    """Equation 4 as one writes it down."""
    sets = []
    for at in corners:
        cut = [
            m[:, r : r + CELLS, c : c + CELLS].reshape(-1) for m, (r, c) in zip(feature_map, at.tolist(), strict=True)
        ]
        sets.append(torch.stack(cut))
    anchors, positives = sets
    losses = []
    for i, anchor in enumerate(anchors):
        distances = (anchor - positives).square().sum(1).sqrt()
        losses.append(distances[i] + torch.logsumexp(-distances, 0))
    return torch.stack(losses).mean()


def unfold_and_cdist(feature_map: Tensor, corners: Tensor) -> Tensor:
    windows = feature_map.unfold(2, CELLS, 1).unfold(3, CELLS, 1)
    own = torch.arange(len(feature_map), device=feature_map.device)
    anchors, positives = (windows[own, :, at[:, 0], at[:, 1]].flatten(1) for at in corners)
    return functional.cross_entropy(-torch.cdist(anchors, positives), own)


def ours(feature_map: Tensor, corners: Tensor) -> Tensor:
    anchors, positives = (patches_at(feature_map, CELLS, at).flatten(1) for at in corners)
    return spatial_contrasting_loss(anchors, positives)


def backward_of(form: Callable[[Tensor, Tensor], Tensor], count: int, device: torch.device) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(count)
    maps = torch.randn(count, CHANNELS, SIDE, SIDE, generator=generator).to(device)
    maps = maps.contiguous(memory_format=torch.channels_last).requires_grad_()
    corners = torch.randint(SIDE - CELLS + 1, (2, count, 2), generator=generator).to(device)
    # float32 cannot tell 0 from the square root's slope there: the loop would be NaN where both patches coincide
    corners[1, :, 0] = torch.where((corners[0] == corners[1]).all(1), (corners[1, :, 0] + 1) % 5, corners[1, :, 0])

    def call() -> Tensor:
        maps.grad = None
        loss = form(maps, corners)
        loss.backward()
        return loss.detach()

    return call


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def at_large(bench: Bench) -> None:
    """The first table: time and memory of one pass over many patches."""
    device = bench.device
    ours(
        torch.randn(4, CHANNELS, SIDE, SIDE, device=device, requires_grad=True), torch.zeros(2, 4, 2).long().to(device)
    )
    call = backward_of(ours, LARGE, device)
    before = peak_bytes(device)
    began = bench.clock()
    call()
    synchronise(device)
    took, peak = bench.clock() - began, peak_bytes(device) - before
    maps = LARGE * CHANNELS * SIDE * SIDE * 4
    bench.table(
        f"N = {LARGE}, D = 3,072: one forward and backward pass", ["what", "value"],
        [["seconds", took], ["memory above the maps' own MiB", peak / 2**20], ["the maps' gradient MiB", maps / 2**20],
         ["two sets of patches MiB", 2 * LARGE * 3072 * 4 / 2**20], ["one N x N matrix MiB", LARGE**2 * 4 / 2**20],
         ["(N, N, D) would take MiB", LARGE**2 * 3072 * 4 / 2**20]],
    )  # fmt: skip
    bench.figures["ours 4096 MiB"] = peak / 2**20


def against_others(bench: Bench) -> None:
    """The second table: other ways to write the same."""
    device = bench.device
    rows: list[list[Any]] = []
    for count in SIZES:
        forms = {"ours": ours, "unfold and cdist": unfold_and_cdist} | ({"loop": loop} if count <= LOOP_UP_TO else {})
        calls = {name: backward_of(form, count, device) for name, form in forms.items()}
        values = {name: float(each()) for name, each in calls.items()}
        assert max(values.values()) - min(values.values()) < 1e-3 * max(values.values()), values
        times = bench.time(calls)
        mine = median(times["ours"])
        row: list[Any] = [str(count)]
        for name in ("loop", "unfold and cdist", "ours"):
            row.append(None if name not in times else 1000 * median(times[name]))
        rows.append([*row, spread(times["ours"]), *(
            None if name not in times else median(times[name]) / mine for name in ("loop", "unfold and cdist")
        )])  # fmt: skip
        bench.figures[f"ours {count}"] = mine
    columns = ["N", "loop ms", "unfold and cdist ms", "ours ms", "spread", "loop / ours", "unfold and cdist / ours"]
    bench.table("sampling, distances and loss, forward and backward, float32", columns, rows)


def in_a_step(bench: Bench) -> None:
    """The third table: its share of a whole step."""
    device = bench.device
    rows: list[list[Any]] = []
    bf16 = resolve_precision("auto", device) == "bf16"
    for net, (side, channels, count) in STEPS.items():
        torch.manual_seed(0)
        info = toy_info(side, channels)
        method: Any = make("sc", net, info).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        optimizer = optim.build(optim.OptimConfig(lr=1e-3), method.parameter_groups())
        images = torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, device=device)
        indices, number = torch.arange(count, device=device), torch.zeros((), dtype=torch.int64, device=device)
        seeds = hash_seeds(0, 0, indices)
        batch = Batch(images.contiguous(memory_format=torch.channels_last), None, indices, seeds)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            feature_map = method.encoder(batch.images).detach().requires_grad_()

        def step(
            method: Any = method, batch: Batch = batch, number: Tensor = number, optimizer: Any = optimizer
        ) -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = method.loss(batch, number)["loss"]
            loss.backward()
            optimizer.step()

        def head(method: Any = method, feature_map: Tensor = feature_map, seeds: Tensor = seeds) -> None:
            feature_map.grad = None
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                ((loss, _),) = method.criterion(feature_map, seeds)
            loss.backward()

        times = bench.time({"step": step, "head": head})
        whole, part = median(times["step"]), median(times["head"])
        rows.append([net, count, 1000 * whole, spread(times["step"]), 1000 * part, spread(times["head"]),
                     f"{100 * part / whole:.2f}%"])  # fmt: skip
        bench.figures[f"share {net}"] = part / whole
    columns = ["net", "N", "step ms", "spread", "head ms", "spread", "share"]
    bench.table(f"the method's own head in a whole step, {'bf16' if bf16 else 'fp32'}, channels_last", columns, rows)


def main() -> None:
    """Measure and print; memory first of all, since a process's peak never falls."""
    _, bench = options("sc_head", __doc__ or "")
    for measure in (at_large, against_others, in_a_step):
        measure(bench)
    bench.finish()


if __name__ == "__main__":
    main()
