"""SimCLR on a ResNet-18, end to end: lightly as its tutorials write it, the same in bf16, torchvision v2, and ours.

    python benchmarks/peers.py [--sides 32 96] [--batch 16] [--rounds 3] [--core 0 | --core -1 --threads 2]
    python benchmarks/peers.py --device cuda --workers 16

Every candidate takes the same number of images through the same network (small stem at 32 px, the 7 x 7 one at 96 px)
with a projector of two layers, SGD with momentum, the same crops, flips, colours and blur. `lightly`: PIL images,
SimCLRTransform, a DataLoader, two forward passes, float32, as its tutorial has it. `ours` is what `harness run` does:
resident uint8 images, views made in batches, one forward pass over both, channels_last, bf16 where the device has it,
`harness.step.Step` and `harness.batches.Batches`. `model only` is the same step on views made once beforehand: no
pipeline can pass it. Images are random pixels: this is about time, nothing is learnt. On one core the clock counts
CPU seconds, and loaders have no workers; elsewhere it is wall time, and what workers hold in stock is taken before each
turn.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

os.environ.setdefault("LIGHTLY_DID_VERSION_CHECK", "True")
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from measuring import Bench, cpu_seconds, median, options, spread, synchronise  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from harness import registry  # noqa: E402
from harness.arms import build_method, resolve_precision  # noqa: E402
from harness.batches import Batches  # noqa: E402
from harness.config import Layers, resolve  # noqa: E402
from harness.contracts import DatasetInfo  # noqa: E402
from harness.optim import build as build_optimizer  # noqa: E402
from harness.step import Step, StepConfig, resolve_mode  # noqa: E402

ENCODERS = {32: "resnet18_small", 96: "resnet18"}
POOL = 512  # images that the candidates draw from, per side


class PilImages(torch.utils.data.Dataset[Any]):
    """Random images handed out one by one, as torchvision's CIFAR10 and STL10 do."""

    def __init__(self, pixels: np.ndarray, count: int) -> None:
        self.pixels, self.count = pixels, count
        self.transform: Any = None  # LightlyDataset puts its own here

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.pixels[index % len(self.pixels)])
        return self.transform(image) if self.transform else image, 0


class TensorViews(torch.utils.data.Dataset[Any]):
    """Two views per image by torchvision's v2 transforms on tensors."""

    def __init__(self, pixels: np.ndarray, count: int, side: int) -> None:
        from torchvision.transforms import v2

        self.pixels, self.count = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), count
        self.transform = v2.Compose([
            v2.RandomResizedCrop(side, scale=(0.08, 1.0), antialias=False), v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], p=0.5), v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ])  # fmt: skip

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[list[Tensor], int, str]:
        image = self.pixels[index % len(self.pixels)]
        return [self.transform(image), self.transform(image)], 0, ""


def one_thread(_: int) -> None:
    """Workers of a loader must not fight over the cores."""
    torch.set_num_threads(1)


def loader(dataset: Any, batch: int, workers: int, pin: bool) -> Any:
    """A DataLoader as tutorials set it up."""
    return torch.utils.data.DataLoader(
        dataset, batch_size=batch, shuffle=True, drop_last=True, num_workers=workers, pin_memory=pin,
        worker_init_fn=one_thread if workers else None, persistent_workers=workers > 0,
    )  # fmt: skip


class PeerNetwork(nn.Module):
    """lightly's tutorial model: torchvision's ResNet-18 without its last layer, lightly's projection head."""

    def __init__(self, side: int) -> None:
        super().__init__()
        from lightly.models.modules import SimCLRProjectionHead
        from torchvision.models import resnet18

        net: Any = resnet18()
        if side == 32:
            net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        self.backbone = nn.Sequential(*list(net.children())[:-1])
        self.head = SimCLRProjectionHead(512, 512, 128)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.backbone(images).flatten(start_dim=1))
        return out


def repeated(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()


def endless(batches: Any) -> Iterator[Any]:
    while True:
        yield from batches


def peer(batches: Any, side: int, device: torch.device, dtype: torch.dtype | None) -> Callable[[], None]:
    """One step of the tutorial's loop over a loader of ((view, view), label, name)."""
    from lightly.loss import NTXentLoss

    torch.manual_seed(0)
    model, criterion = PeerNetwork(side).to(device).train(), NTXentLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9)
    stream = endless(batches)

    def step() -> None:
        (first, second), *_ = next(stream)
        first, second = first.to(device, non_blocking=True), second.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext():
            loss = criterion(model(first), model(second))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(
    pixels: np.ndarray, side: int, batch: int, device: torch.device, compile_name: str, precision: str, prepared: bool
) -> tuple[Callable[[], None], str]:
    """One step of ours; `prepared`: on views that were made once. -> the step, how it is made."""
    count = len(pixels)
    info = DatasetInfo(
        "random", "random pixels", tuple("0123456789"), (side, side), 3, (0.5,) * 3, (0.25,) * 3, {"train": count},
        "", "", ENCODERS[side], "train", True,
    )  # fmt: skip
    layers = Layers(flags={"encoder.name": ENCODERS[side]}, overrides={
        "method.crop_scale": 0.08, "method.blur": 0.5, "method.hidden": 512, "method.out": 128, "optim.lr": 0.06,
        "batch_size": batch, "precision": precision,
    })  # fmt: skip
    config = resolve("simclr", "random", layers, default_encoder=ENCODERS[side])
    method: Any = build_method("simclr", config, info).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    data = Batches(images, None, batch_size=batch, seed=0, device=device)
    if prepared:
        fixed = method.preview(data.at(0))
        method.preview = lambda _: fixed
    why_not = "" if registry.load_method("simclr").graphable else "not graphable"
    bf16 = resolve_precision(precision, device) == "bf16"
    mode = resolve_mode(compile_name, device, why_not)
    optimizer = build_optimizer(config.optim, method.parameter_groups())
    step = Step(method.train(), optimizer, StepConfig(bf16, mode=mode), device, 0, print)
    number = 0

    def one() -> None:
        nonlocal number
        step(data.at(number), number, 0.5, 0.06)
        number += 1

    one()
    synchronise(device)
    return one, f"{'bf16' if bf16 else 'fp32'}, {step.mode}"


def compare(bench: Bench, side: int, batch: int, workers: int, compile_name: str) -> None:
    """One table for one image size."""
    from lightly.data import LightlyDataset
    from lightly.transforms import SimCLRTransform

    device, cuda = bench.device, bench.device.type == "cuda"
    pixels = np.random.default_rng(0).integers(0, 256, (max(POOL, 2 * batch), side, side, 3), dtype=np.uint8)
    length = 200 * batch * max(1, workers)  # of a peer's epoch: long, so that its workers start once
    lightly_data = LightlyDataset.from_torch_dataset(
        PilImages(pixels, length), transform=SimCLRTransform(input_size=side, cj_strength=0.5)
    )
    views = TensorViews(pixels, length, side)
    main_step, how = ours(pixels, side, batch, device, compile_name, "auto", prepared=False)
    model_step, _ = ours(pixels, side, batch, device, compile_name, "auto", prepared=True)
    steps: dict[str, Callable[[], None]] = {
        "lightly as written": peer(loader(lightly_data, batch, workers, cuda), side, device, None),
        "lightly in bf16": peer(loader(lightly_data, batch, workers, cuda), side, device, torch.bfloat16),
        "torchvision v2 in bf16": peer(loader(views, batch, workers, cuda), side, device, torch.bfloat16),
        "ours, fp32, eager": ours(pixels, side, batch, device, "off", "fp32", prepared=False)[0],
        f"ours ({how})": main_step,
        "ours, model only": model_step,
    }
    warm = 1 if not cuda else 5 + 2 * workers  # a loader's prefetched batches are not its speed
    drain = {name: partial(repeated, step, 2 * workers) for name, step in steps.items() if "ours" not in name}
    found = bench.time(steps, warm=warm, before=drain if workers else None)
    times = {name: [batch / t for t in seconds] for name, seconds in found.items()}
    lightly, lightly_bf16 = median(times["lightly as written"]), median(times["lightly in bf16"])
    model = median(times["ours, model only"])
    rows = [
        [name, median(v), spread(v), median(v) / lightly, median(v) / lightly_bf16, median(v) / model]
        for name, v in times.items()
    ]
    bench.table(
        f"SimCLR, ResNet-18 ({ENCODERS[side]}), {side} px, batch {batch}, {workers} loader workers: images/s of two views",
        ["candidate", "images/s", "spread", "x lightly", "x lightly bf16", "x model only"], rows,
    )  # fmt: skip
    bench.figures[str(side)] = {name: median(v) for name, v in times.items()}


def main() -> None:
    """Measure and print."""
    chosen, bench = options(
        "peers", __doc__ or "", sides={"type": int, "nargs": "+", "default": [32, 96], "choices": [32, 96]},
        batch={"type": int, "default": None, "help": "images per step (16 on a CPU, 256 on CUDA)"},
        workers={"type": int, "default": 0, "help": "of the peers' loaders"},
        compile={"default": "auto", "help": "as `harness run --compile`"},
    )  # fmt: skip
    if chosen.workers and bench.clock is cpu_seconds:
        raise SystemExit(
            "--workers needs --core -1: the CPU seconds of a loader's workers are known when they end only"
        )
    for side in chosen.sides:
        compare(
            bench, side, chosen.batch or (256 if bench.device.type == "cuda" else 16), chosen.workers, chosen.compile
        )
    bench.finish()


if __name__ == "__main__":
    main()
