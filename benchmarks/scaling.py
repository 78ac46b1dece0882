"""How time and memory grow: with images, batch size, image size, labels, and the number of samples SC contrasts.

    python benchmarks/scaling.py [--device cuda] [--rounds 5] [--images 1280] [--json]

Each row with a memory figure is a process of its own, so that a peak belongs to its row alone: on a CPU the largest
resident set (mapped pages count), on CUDA the most that was allocated on the device. `beside data` is the peak less the
images' own bytes and less what the process held after its imports. A row's time is the median of --rounds calls in its
process, beside half their range; ratios are to the first row. Images are random pixels: nothing here
depends on what they show. Training is `sc` on `convnet_small` at 32 x 32 by the harness's own loop, in fp32 on a CPU.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from measuring import Bench, median, options, spread
from torch import Tensor

from harness import mapped, pretrain
from harness.arms import build_method
from harness.batches import Batches, Placement
from harness.config import Layers, resolve
from harness.contracts import DatasetInfo, Method
from harness.evaluators.linear_probe import fit_path
from harness.methods.sc import spatial_contrasting_loss
from harness.optim import OptimConfig, ScheduleConfig

BATCH, SIDE = 128, 32
PATCH_FEATURES = 64
SHAPES = {
    "batch size": ((32, 64), (32, 256), (32, 1024)),
    "image size": ((32, 64), (64, 64), (96, 64)),
}  # (side, batch)


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: on the device, or resident in this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def random_images(count: int, side: int, folder: Path | None) -> Tensor:
    """(N, 3, side, side) uint8 of random pixels, in memory or mapped from a file in `folder`."""
    if folder is None:
        pixels = torch.empty(count, side, side, 3, dtype=torch.uint8)
    else:
        mapped.reserve(folder / "pixels", count * side * side * 3)
        pixels = mapped.open_pixels(folder / "pixels", (count, side, side, 3))
    for part in pixels.split(500):
        part.random_(0, 256)
    return pixels.permute(0, 3, 1, 2)


def spatial_contrasting(side: int) -> Method:
    """`sc` on `convnet_small` for colour images of this side."""
    info = DatasetInfo("random pixels", "random pixels", None, (side, side), 3, (0.5,) * 3, (0.29,) * 3, {}, "", "",
                       "convnet_small", "train", True)  # fmt: skip
    return build_method("sc", resolve("sc", "random pixels", Layers(), default_encoder="convnet_small"), info)


def training(
    count: int, side: int, batch: int, placement: Placement, steps: int, device: torch.device
) -> Iterator[Any]:
    """Yields the bytes of the data, then a call that trains `steps` steps."""
    method = spatial_contrasting(side).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    plan = pretrain.Plan(steps, 0, OptimConfig(lr=0.01), ScheduleConfig(), bf16=device.type == "cuda")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        images = random_images(count, side, Path(folder) if placement == "streamed" else None)
        data = Batches(images, None, batch_size=batch, seed=0, device=device, placement=placement)
        yield images.numel() if data.images.device.type == device.type else 0
        yield lambda: pretrain.train(method, data, plan, None, lambda *_: None)


def head(count: int, device: torch.device) -> Iterator[Any]:
    """Yields 0, then a call of SC's criterion and its gradient on `count` random vectors."""
    anchors, positives = (torch.randn(count, PATCH_FEATURES, device=device, requires_grad=True) for _ in range(2))
    yield 0
    yield lambda: spatial_contrasting_loss(anchors, positives, symmetric=True).backward()


def fresh(bench: Bench, make: Callable[..., Iterator[Any]], *words: Any) -> dict[str, Any]:
    """A row measured in a process of its own: forked before this one has made data or opened a device."""

    def measure(answer: Connection) -> None:
        start = peak_bytes(bench.device)
        parts = make(*words, bench.device)
        data_bytes, call = next(parts), next(parts)
        seconds = bench.time({"call": call})["call"]
        peak = peak_bytes(bench.device)
        answer.send({"seconds": seconds, "peak": peak, "data": data_bytes, "beside": peak - start - data_bytes})
        list(parts)  # lets it tidy up

    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(there,))
    process.start()
    there.close()
    row: dict[str, Any] = here.recv()
    process.join()
    return row


def by_images(bench: Bench, count: int) -> None:
    placements: tuple[Placement, ...] = ("resident", "pinned" if bench.device.type == "cuda" else "streamed")
    for placement in placements:
        rows: list[list[Any]] = []
        for number in (count, 10 * count):
            row = fresh(bench, training, number, SIDE, BATCH, placement, number // BATCH)
            seconds = median(row["seconds"])
            ratio = seconds / rows[0][1] if rows else 1.0
            rows.append([number, seconds, spread(row["seconds"]), ratio, row["data"] / 1e6, row["peak"] / 1e6,
                         row["beside"] / 1e6])  # fmt: skip
        bench.table(
            f"One epoch against images, {placement}: random pixels, batch {BATCH}",
            ("images", "seconds", "spread", "time ratio", "data MB", "peak MB", "beside data MB"), rows,
        )  # fmt: skip
        bench.figures[f"epoch_x10_{placement}"] = {"time_ratio": rows[1][3], "more_mb": rows[1][6] - rows[0][6]}


def by_shape(bench: Bench) -> None:
    for name, cases in SHAPES.items():
        rows: list[list[Any]] = []
        for side, batch in cases:
            steps = 1024 // batch if name == "batch size" else 4
            row = fresh(bench, training, 1024, side, batch, "resident", steps)
            per_image = [1000 * seconds / (steps * batch) for seconds in row["seconds"]]
            ratio = median(per_image) / rows[0][2] if rows else 1.0
            rows.append([side, batch, median(per_image), spread(per_image), ratio, row["beside"] / 1e6,
                         row["beside"] / 1e6 / batch])  # fmt: skip
        bench.table(
            f"Training against {name}: random pixels, resident",
            ("side", "batch", "ms / image", "spread", "time ratio", "beside data MB", "MB / image of a batch"), rows,
        )  # fmt: skip


def by_contrasted(bench: Bench) -> None:
    rows: list[list[Any]] = []
    for count in (256, 1024, 4096):
        row = fresh(bench, head, count)
        milliseconds = 1000 * median(row["seconds"])
        ratio = milliseconds / rows[0][1] if rows else 1.0
        rows.append([count, milliseconds, spread(row["seconds"]), ratio, (count / 256) ** 2, row["beside"] / 1e6,
                     row["beside"] / (4 * count**2)])  # fmt: skip
    bench.table(
        f"SC's criterion and its gradient against N: random vectors of {PATCH_FEATURES}, float32, both directions",
        ("N", "ms", "spread", "time ratio", "N^2 ratio", "memory MB", "N x N matrices"), rows,
    )  # fmt: skip


def digit_features(count: int) -> tuple[Tensor, Tensor]:
    """Pixels of scikit-learn's digits, 14 x 14, repeated with shifts of up to 2 pixels until there are `count`."""
    from harness.augment import hash_seeds, shift_and_mirror
    from harness.datasets.digits import Digits

    train = Digits(Path()).split("train")
    assert train.labels is not None
    indices = torch.arange(count)
    moved = shift_and_mirror(train.images[indices % len(train)], hash_seeds(0, 0, indices), "scaling", 2, False)
    return torch.nn.functional.avg_pool2d(moved.float() / 255, 2).flatten(1), train.labels[indices % len(train)]


def by_labels(bench: Bench) -> None:
    counts = (100, 1_000, 10_000)
    features, labels = (t.to(bench.device) for t in digit_features(max(counts)))
    fits = {str(n): lambda n=n: fit_path(features[:n], labels[:n], 10, [1.0, 0.1, 0.01]) for n in counts}
    seconds = bench.time(fits, warm=0)
    first = median(seconds["100"])
    rows = [[n, median(seconds[str(n)]), spread(seconds[str(n)]), median(seconds[str(n)]) / first, n / counts[0]]
            for n in counts]  # fmt: skip
    bench.table(
        "Linear probe against labels: three strengths on 196 pixels of digits, shifted copies beyond 1,297 images",
        ("labels", "seconds", "spread", "time ratio", "label ratio"), rows,
    )  # fmt: skip


def by_placement(bench: Bench) -> None:
    """Reading alone: no step hides it."""
    names: tuple[Placement, ...] = ("resident", "streamed")
    if bench.device.type == "cuda":
        names = ("resident", "pinned", "streamed")
    rows: list[list[Any]] = []
    for side, count in ((32, 20_000), (96, 4_000)):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            sources = {name: random_images(count, side, Path(folder) if name == "streamed" else None) for name in names}
            data = {n: Batches(s, None, batch_size=256, seed=0, device=bench.device, placement=n)
                    for n, s in sources.items()}  # fmt: skip
            epochs = {name: lambda d=d: [d.at(s) for s in range(d.steps_per_epoch)] for name, d in data.items()}
            seconds = bench.time(epochs)
            for name in names:
                rates = [256 * data[name].steps_per_epoch / s for s in seconds[name]]
                rows.append([side, name, median(rates), spread(rates), median(rates) * side * side * 3 / 1e9])
            del data, sources
    bench.table("Batches alone: images per second without a training step, batch 256, pages warm",
                ("side", "placement", "images / s", "spread", "GB / s"), rows)  # fmt: skip


def main() -> None:
    images = {"type": int, "default": 1280, "help": "of the smaller data set"}
    chosen, bench = options("scaling", __doc__ or "", images=images)
    spatial_contrasting(SIDE)  # what it imports is no row's own
    by_images(bench, chosen.images)
    by_shape(bench)
    by_contrasted(bench)
    by_labels(bench)
    by_placement(bench)
    bench.finish()


if __name__ == "__main__":
    main()
