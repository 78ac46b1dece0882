"""Random views: ours against lightly's and torchvision's, images/s of one view.

    python benchmarks/augment.py [--sides 32 96] [--batch 256] [--compile auto] [--device cuda] [--json]

Strong: crop, flip, colour jitter of strength 0.5 in random order, grey. lightly's row is its SimCLR transform as it
stands, on PIL images, one after another, to normalised tensors: blur on half of the views. torchvision's is the same
recipe of its v2 transforms on tensors, one image after another (one call for a batch would draw once for all), without
normalising. Ours takes the uint8 batch and gives floats in [0, 1]: normalising is the encoder's part and left out.
Mild: translation by up to 2 pixels and flip, uint8 to uint8.

Images are smooth random colours. The first two rows stay on the CPU with any --device, one process and no DataLoader:
what a loader's workers add is not in these figures. "Compiled" is torch.compile of the whole view.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"  # its import asks a server otherwise

import torch
from lightly.transforms.simclr_transform import SimCLRViewTransform
from measuring import median, options, spread
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from harness.augment import hash_seeds, shift_and_mirror
from harness.contracts import DatasetInfo
from harness.views import ViewConfig, ViewMaker


def smooth(count: int, side: int) -> Tensor:
    """uint8 (count, 3, side, side) on the CPU, colours that vary slowly, channels_last in memory."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(coarse, size=side, mode="bicubic").clamp(0, 1).mul(255)
    return images.to(torch.uint8).contiguous(memory_format=torch.channels_last)


def lightly(images: Tensor) -> Callable[[], Tensor]:
    transform = SimCLRViewTransform(input_size=images.shape[2], cj_strength=0.5)
    pictures = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]
    return lambda: torch.stack([transform(picture) for picture in pictures])


def torchvision(images: Tensor) -> Callable[[], Tensor]:
    side = images.shape[2]
    transform = v2.Compose([
        v2.RandomResizedCrop(side, scale=(0.08, 1.0), antialias=False), v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(max(3, round(side * 0.1) // 2 * 2 + 1), (0.1, 2.0))], p=0.5),
        v2.ToDtype(torch.float32, scale=True),
    ])  # fmt: skip
    return lambda: torch.stack([transform(image) for image in images])


def maker(side: int, blur: float) -> ViewMaker:
    info = DatasetInfo(
        name="smooth", title="", classes=None, image_size=(side, side), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3,
        counts={}, licence="", citation="", default_encoder="", pretrain_split="", mirror_keeps_label=True,
    )  # fmt: skip
    return ViewMaker.of(ViewConfig(crop_scale=0.08, jitter=0.5, blur=blur), info)


def candidates(images: Tensor, device: torch.device, compiled: bool) -> dict[str, Callable[[], Any]]:
    batch, side = len(images), images.shape[2]
    there = images.to(device)
    seeds = hash_seeds(0, 0, torch.arange(batch, device=device))
    blurred, sharp = maker(side, 0.5), maker(side, 0.0)
    found: dict[str, Callable[[], Any]] = {
        "strong, lightly on PIL (CPU)": lightly(images),
        "strong, torchvision v2 per image (CPU)": torchvision(images),
        "strong, ours": lambda: blurred(there, seeds, "view"),
        "strong without blur, ours": lambda: sharp(there, seeds, "view"),
        "mild, ours": lambda: shift_and_mirror(there, seeds, "view", 2, True),
    }
    if compiled:
        for name, view in (("strong", blurred), ("strong without blur", sharp)):
            call = torch.compile(view.__call__, dynamic=False, fullgraph=True)
            found[f"{name}, ours compiled"] = partial(call, there, seeds, "view")
    return found


def main() -> None:
    chosen, bench = options(
        "augment",
        __doc__ or "",
        sides={"type": int, "nargs": "+", "default": [32, 96], "help": "of the images, pixels"},
        batch={"type": int, "default": 256},
        compile={"choices": ("auto", "yes", "no"), "default": "auto", "help": "auto: where the device is not the CPU"},
    )
    compiled = chosen.compile == "yes" or (chosen.compile == "auto" and bench.device.type != "cpu")
    for side in chosen.sides:
        times = bench.time(candidates(smooth(chosen.batch, side), bench.device, compiled))
        peer = median(times["strong, lightly on PIL (CPU)"])
        rows = [
            [name, chosen.batch / median(seconds), spread(seconds), peer / median(seconds)]
            for name, seconds in times.items()
        ]
        bench.table(
            f"{side} px, batch {chosen.batch}: images/s of one view",
            ["candidate", "images/s", "spread", "ratio to lightly"],
            rows,
        )
    bench.finish()


if __name__ == "__main__":
    main()
