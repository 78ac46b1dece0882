"""Random views on CUDA by kernels of our own: a few launches for each view instead of hundreds.

In torch's operations the draws alone are some three hundred launches for each strong view, and every step of its
pictures is a pass through memory (docs/decisions/015). Same draws, same formulas as harness.views and harness.augment;
what is not whole numbers agrees with them to rounding.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.kernels import applicable, unusable

PIXELS = 512  # of a program: 72 registers a thread for views, 146 at twice as many
SAMPLES = 32  # of a program that draws


@dataclass(frozen=True)
class StrongViews:
    """What is drawn for one view; see the settings of harness.views.ViewConfig, probabilities of 0 for what is off.

    keys: of the streams, in the order in which view_kernels.draw takes them
    scale and ratio: of a crop, factors: of brightness, contrast and saturation, sigma: of the blur in pixels, all
    (smallest, largest); centred: height and width of the box where none fits; hue: the largest turn, in circles;
    taps: of the blur, odd; bright: from which solarisation inverts
    """

    keys: tuple[int, ...]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    centred: tuple[int, int]
    mirror: float
    factors: tuple[float, float]
    hue: float
    jitter_probability: float
    grayscale: float
    blur: float
    sigma: tuple[float, float]
    taps: int
    solarise: float
    bright: float
    tries: int


def fits(images: Tensor, seeds: Tensor) -> bool:
    """Whether these kernels can make views of a batch: bytes of one or three channels, on CUDA."""
    return (
        images.dtype == torch.uint8 and images.shape[1] in (1, 3) and len(images) > 0
        and applicable(images, seeds) and usable(images.device)
    )  # fmt: skip


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether every kind of kernel here can be started on a device; tried once on two images.

    They are like those of a common data set, whose compilations are then done already.
    """
    key = 1 << 40  # 64 bits, as those of streams are
    what = StrongViews(
        (key,) * 11, (0.2, 1.0), (3 / 4, 4 / 3), (32, 32), mirror=0.5, factors=(0.6, 1.4), hue=0.1, jitter_probability=0.8,
        grayscale=0.2, blur=0.5, sigma=(0.1, 2.0), taps=3, solarise=0.2, bright=0.5, tries=10,
    )  # fmt: skip
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    seeds = torch.zeros(2, dtype=torch.int64, device=device)
    try:
        strong(images, seeds, what, (32, 32))
        moved(images, seeds, key, key, 2, True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        unusable("kernels for views", device, error)
        return False
    return True


def strong(images: Tensor, seeds: Tensor, what: StrongViews, size: tuple[int, int]) -> Tensor:
    """One view of each image: uint8 (B, C, H, W), seeds (B,) -> float32 in [0, 1], (B, C, *size), channels_last."""
    from harness import view_kernels as kernels

    batch, channels, height, width = images.shape
    rows, columns = size
    drawn = torch.empty(kernels.ROWS, batch, device=images.device)
    low, high = (math.log(side) for side in what.ratio)
    tallest, widest = what.centred
    weakest, strongest = what.factors
    tiles, channel_tiles = -(-rows * columns // PIXELS), -(-rows * columns * channels // PIXELS)
    partial = torch.empty(batch, tiles, device=images.device)
    views = torch.empty(batch, rows, columns, channels, device=images.device)
    picture = (images.stride(0), images.stride(1), images.stride(2), images.stride(3), rows, columns)
    with torch.cuda.device_of(images):  # where Triton starts its kernels
        kernels.draw[(-(-batch // SAMPLES),)](
            seeds.contiguous(), drawn, batch, *what.keys, float(height), float(width), what.scale[0],
            what.scale[1] - what.scale[0], low, high - low, float(widest), float(tallest), what.mirror,
            what.jitter_probability, weakest, strongest - weakest, what.hue,
            what.grayscale if channels > 1 else 0.0, what.blur, what.sigma[0], what.sigma[1] - what.sigma[0],
            what.solarise, TRIES=what.tries, RGB=channels == 3, BLOCK=SAMPLES, BLOCK_TRIES=_power_of_two(what.tries),
        )  # fmt: skip
        if what.jitter_probability:
            kernels.contrast_sums[(batch, tiles)](images, drawn, partial, batch, *picture, C=channels, BLOCK=PIXELS)
        kernels.views[(batch, tiles)](
            images, drawn, partial, views, batch, *picture, what.bright, C=channels, BLOCK=PIXELS,
            BLOCK_TILES=_power_of_two(tiles),
        )  # fmt: skip
        if what.blur:
            between = torch.empty_like(views)
            for source, target, across in ((views, between, False), (between, views, True)):
                kernels.blurred[(batch, channel_tiles)](
                    source, drawn, target, batch, rows, columns, what.bright, C=channels, REACH=what.taps // 2,
                    ACROSS=across, BLOCK=PIXELS,
                )  # fmt: skip
    return views.permute(0, 3, 1, 2)


def moved(images: Tensor, seeds: Tensor, shift_key: int, mirror_key: int, shift: int, mirror: bool) -> Tensor:
    """harness.augment.shift_and_mirror, to the bit: (B, C, H, W) bytes -> the same, channels_last."""
    from harness import view_kernels as kernels

    batch, channels, rows, columns = images.shape
    views = torch.empty(batch, rows, columns, channels, dtype=images.dtype, device=images.device)
    with torch.cuda.device_of(images):
        kernels.moved[(batch, -(-rows * columns * channels // PIXELS))](
            images, seeds.contiguous(), views, shift_key, mirror_key, *images.stride(), rows, columns, C=channels, SHIFT=shift,
            MIRROR=mirror, BLOCK=PIXELS,
        )  # fmt: skip
    return views.permute(0, 3, 1, 2)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
