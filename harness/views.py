"""The views of contrastive methods: crops, colours, blur; batched, on the device, each sample with its own parameters.

The formulas are torchvision's (RandomResizedCrop without antialiasing, ColorJitter, Grayscale, GaussianBlur), so a
published recipe keeps its meaning; only where the random numbers come from differs. Images are floats in [0, 1],
(B, C, H, W); `stream` names the view, and every choice appends its own word to it. Sums run in an order that does not
depend on the batch, because a sample's view must not depend on its neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from harness.augment import to_float, uniform
from harness.contracts import Choice, Config, DatasetInfo, Range, setting

TRIES = 10  # boxes drawn before RandomResizedCrop falls back to the centre
RATIO = (3 / 4, 4 / 3)  # aspect ratios of a crop, uniform in the logarithm
SIGMA = (0.1, 2.0)  # of the blur, pixels (Chen et al., 2020, appendix A)
SMALL = 64  # pixels below which blur "auto" is off: Chen et al. leave it out on CIFAR-10 (appendix B.9)

Probability = Annotated[float, Field(ge=0, le=1)]

# ------------------------------------------------------------------------------------------------------------- crops


def crop_boxes(
    seeds: Tensor, stream: str, image_size: tuple[int, int], scale: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes of RandomResizedCrop: seeds (B,) -> top, left, height, width, each (B,) float32 holding whole pixels.

    image_size: (H, W); scale: smallest and largest share of the area. All ten boxes are drawn at once and the first
    that fits is taken, which has the law of drawing until one fits without a shape or branch that depends on it.
    """
    image_height, image_width = image_size
    area = (scale[0] + uniform(seeds, f"{stream}.area", (TRIES,)) * (scale[1] - scale[0])) * (
        image_height * image_width
    )
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = (low + uniform(seeds, f"{stream}.ratio", (TRIES,)) * (high - low)).exp()
    widths, heights = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (widths > 0) & (widths <= image_width) & (heights > 0) & (heights <= image_height)
    first, found = fits.to(torch.uint8).argmax(1, keepdim=True), fits.any(1)
    shape = image_width / image_height  # the fallback is the largest centred box of an allowed aspect ratio
    widest = round(image_height * RATIO[1]) if shape > RATIO[1] else image_width
    tallest = round(image_width / RATIO[0]) if shape < RATIO[0] else image_height
    width = torch.where(found, widths.gather(1, first)[:, 0], float(widest))
    height = torch.where(found, heights.gather(1, first)[:, 0], float(tallest))
    place = uniform(seeds, f"{stream}.place", (2,))
    top = torch.where(found, (place[:, 0] * (image_height - height + 1)).floor(), (image_height - tallest) // 2)
    left = torch.where(found, (place[:, 1] * (image_width - width + 1)).floor(), (image_width - widest) // 2)
    return top, left, height, width


def _source(start: Tensor, length: Tensor, out: int, flip: Tensor | None = None) -> Tensor:
    """Where each of `out` pixels reads, in pixels of the whole image; never outside its own box -> (B, out)."""
    pixel = torch.arange(out, dtype=torch.float32, device=start.device).expand(len(start), out)
    if flip is not None:
        pixel = torch.where(flip[:, None], out - 1 - pixel, pixel)
    inside = ((pixel + 0.5) * (length / out)[:, None] - 0.5).clamp_min(0)
    return torch.minimum(inside, (length - 1)[:, None]) + start[:, None]


def resize_boxes(images: Tensor, boxes: tuple[Tensor, Tensor, Tensor, Tensor], flip: Tensor | None = None) -> Tensor:
    """Cut a box out of each image and stretch it, bilinear without antialiasing, to the image's own size.

    images (B, C, H, W) float, boxes as from `crop_boxes`; flip (B,) bool: mirror these horizontally.
    """
    top, left, height, width = boxes
    batch, _, rows, columns = images.shape
    y = (2 * _source(top, height, rows) + 1) / rows - 1
    x = (2 * _source(left, width, columns, flip) + 1) / columns - 1
    grid = torch.stack((x[:, None, :].expand(batch, rows, columns), y[:, :, None].expand(batch, rows, columns)), -1)
    return functional.grid_sample(
        images, grid.to(images.dtype), mode="bilinear", padding_mode="border", align_corners=False
    )


def random_resized_crop(
    images: Tensor, seeds: Tensor, stream: str, scale: tuple[float, float], mirror: bool = False
) -> Tensor:
    """RandomResizedCrop to the image's own size and, if `mirror`, a flip of half of the samples, in one resampling."""
    boxes = crop_boxes(seeds, f"{stream}.crop", (images.shape[2], images.shape[3]), scale)
    return resize_boxes(images, boxes, uniform(seeds, f"{stream}.mirror") < 0.5 if mirror else None)


# ----------------------------------------------------------------------------------------------------------- colours


def luma(images: Tensor) -> Tensor:
    """Grey level (B, 1, H, W) with ITU-R 601 weights as torchvision rounds them; the channels' mean unless RGB."""
    if images.shape[1] != 3:
        return images if images.shape[1] == 1 else images.mean(1, keepdim=True)
    red, green, blue = images.split(1, 1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Rotate the HSV hue of RGB images (B, 3, H, W) by `turn` (B,) of a full circle."""
    red, green, blue = images.unbind(1)
    value, least = images.amax(1), images.amin(1)
    spread = value - least
    grey = spread == 0
    divisor = torch.where(grey, 1.0, spread)
    from_red, from_green, from_blue = ((value - channel) / divisor for channel in (red, green, blue))
    sector = torch.where(value == green, 2 + from_red - from_blue, 4 + from_green - from_red)
    sector = torch.where(value == red, from_blue - from_green, sector)
    hue = (torch.where(grey, 0.0, sector / 6) + turn[:, None, None]) % 1.0
    channels = []
    for offset in (5, 3, 1):  # the closed form of HSV -> RGB: a trapezium over the circle, shifted per channel
        position = (offset + 6 * hue) % 6
        channels.append(value - spread * torch.minimum(position, 4 - position).clamp(0, 1))
    return torch.stack(channels, 1)


def adjust_colours(images: Tensor, factors: Tensor, turn: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, clamped after each, in every sample's own order.

    factors (B, 3): of brightness, contrast, saturation, 1 changes nothing; turn (B,): of the hue, in circles;
    order (B, 4): a permutation of (0, 1, 2, 3) = (brightness, contrast, saturation, hue). Saturation and hue leave
    images alone that are not RGB.
    """
    rgb = images.shape[1] == 3
    one = torch.ones_like(turn)
    table = torch.stack((factors[:, 0], factors[:, 1], factors[:, 2] if rgb else one, one), 1)
    for slot in range(4):
        kind = order[:, slot, None, None, None]
        factor = table.gather(1, order[:, slot, None])[:, :, None, None]
        grey = luma(images)
        # In float64 the rounded mean does not depend on the order of summation, which changes with the batch.
        mean = grey.double().mean((1, 2, 3), keepdim=True).to(grey.dtype)
        # The first three are one operation: blend with black, with the mean grey, with the pixel's own grey.
        other = torch.where(kind == 2, grey, torch.where(kind == 1, mean, 0.0))
        images = (images * factor + (1 - factor) * other).clamp(0, 1)
        if rgb:
            images = torch.where((kind == 3) & (turn != 0)[:, None, None, None], turn_hue(images, turn), images)
    return images


def colour_jitter(images: Tensor, seeds: Tensor, stream: str, strength: float, probability: float) -> Tensor:
    """ColorJitter(0.8 s, 0.8 s, 0.8 s, 0.2 s) on a share `probability` of the samples (Chen et al., appendix A)."""
    applied = uniform(seeds, f"{stream}.jitter") < probability
    drawn = uniform(seeds, f"{stream}.jitter.amount", (4,))
    low, high = max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength
    factors = torch.where(applied[:, None], low + drawn[:, :3] * (high - low), 1.0)
    turn = torch.where(applied, (2 * drawn[:, 3] - 1) * min(0.5, 0.2 * strength), 0.0)
    order = uniform(seeds, f"{stream}.jitter.order", (4,)).argsort(1)
    return adjust_colours(images, factors, turn, order)


def grayscale(images: Tensor, seeds: Tensor, stream: str, probability: float) -> Tensor:
    """Replace all channels by the grey level in a share `probability` of the samples; nothing to do for one channel."""
    if images.shape[1] == 1:
        return images
    chosen = uniform(seeds, f"{stream}.grayscale") < probability
    return torch.where(chosen[:, None, None, None], luma(images).expand_as(images), images)


# -------------------------------------------------------------------------------------------------------------- blur


def blur(images: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """Separable Gaussian of `taps` (odd) pixels, sigma (B,) in pixels, reflected at the border (so taps // 2 < side).

    Written as a sum of shifted images: the additions are the same whatever the batch, and no precision but the images'.
    """
    reach = taps // 2
    offsets = torch.arange(-reach, reach + 1, dtype=sigma.dtype, device=sigma.device)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]).square())
    weights = (weights / weights.double().sum(1, keepdim=True).to(weights.dtype)).to(images.dtype)
    for axis, padding in ((2, (0, 0, reach, reach)), (3, (reach, reach, 0, 0))):
        side, padded = images.shape[axis], functional.pad(images, padding, mode="reflect")
        images = torch.zeros_like(images)
        for tap in range(taps):
            images = images + weights[:, tap, None, None, None] * padded.narrow(axis, tap, side)
    return images


def gaussian_blur(images: Tensor, seeds: Tensor, stream: str, probability: float) -> Tensor:
    """Blur a share `probability` of the samples, sigma uniform in SIGMA, over a tenth of the side (at least 3 px)."""
    side = min(images.shape[2], images.shape[3])
    taps = min(max(3, round(side * 0.1) // 2 * 2 + 1), 2 * side - 1)
    chosen = uniform(seeds, f"{stream}.blur") < probability
    sigma = SIGMA[0] + uniform(seeds, f"{stream}.blur.sigma") * (SIGMA[1] - SIGMA[0])
    return torch.where(chosen[:, None, None, None], blur(images, sigma, taps), images)


# ------------------------------------------------------------------------------------------------------- whole views


class ViewConfig(Config):
    """The settings that methods built on two strong views share; they extend it with their own."""

    crop_scale: float = setting(
        0.2,
        "smallest crop, share of the image's area",
        source="0.08: Chen et al., 2020, appendix A; larger ones are usual on small images",
        search=Range(0.08, 0.6),
        gt=0,
        le=1,
    )
    mirror: bool | Literal["auto"] = setting(
        "auto", "flip half of the views; auto: where the data set says a class survives it", source="Chen et al., 2020"
    )
    jitter: float = setting(
        0.5,
        "colour strength s: brightness, contrast, saturation by 0.8 s, hue by 0.2 s",
        source="Chen et al., 2020: 1 on ImageNet, 0.5 on CIFAR-10 (appendix B.9)",
        search=Range(0.1, 1),
        ge=0,
        le=2,
    )
    jitter_probability: Probability = setting(
        0.8, "share of views whose colours change", source="Chen et al., 2020, appendix A"
    )
    grayscale: Probability = setting(0.2, "share of grey views", source="Chen et al., 2020, appendix A")
    blur: Probability | Literal["auto"] = setting(
        "auto",
        f"share of blurred views; auto: 0.5 from {SMALL} px up, else 0",
        source="Chen et al., 2020: 0.5 on ImageNet, none on CIFAR-10",
        search=Choice(("auto", 0.0, 0.5)),
    )


@dataclass(frozen=True)
class ViewMaker:
    """Crop and flip, colours, grey, blur, in this order: uint8 (B, C, H, W) -> float32 in [0, 1], outside autocast."""

    config: ViewConfig
    mirror: bool
    blur: float

    @classmethod
    def of(cls, config: ViewConfig, info: DatasetInfo) -> ViewMaker:
        """Resolve what `auto` means for this data set."""
        blur_share = config.blur if config.blur != "auto" else 0.5 if min(info.image_size) >= SMALL else 0.0
        return cls(config, info.mirror_keeps_label if config.mirror == "auto" else config.mirror, blur_share)

    @torch.no_grad()
    def __call__(self, images: Tensor, seeds: Tensor, stream: str) -> Tensor:
        """One view of each image; another `stream` gives another view."""
        config = self.config
        with torch.autocast(images.device.type, enabled=False):
            view = to_float(images).contiguous()
            view = random_resized_crop(view, seeds, stream, (config.crop_scale, 1.0), self.mirror)
            if config.jitter and config.jitter_probability:
                view = colour_jitter(view, seeds, stream, config.jitter, config.jitter_probability)
            if config.grayscale:
                view = grayscale(view, seeds, stream, config.grayscale)
            if self.blur:
                view = gaussian_blur(view, seeds, stream, self.blur)
            return view.clamp(0, 1)
