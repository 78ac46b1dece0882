"""The views of contrastive methods: crops, colours, blur; batched, on the device, each sample with its own parameters.

The laws are torchvision's (RandomResizedCrop, ColorJitter, RandomGrayscale, GaussianBlur), so a published recipe keeps
its meaning; only where the random numbers come from differs. What is done with them is in harness.image_operations.
Images are floats in [0, 1], (B, C, H, W), float32 in whatever precision a method trains; `stream` names the view, and
every choice appends its own word to it. A view depends on its image, seed and stream alone, to the last bit; on CUDA, where
harness.device_views makes it in eager and captured steps, other ways (a compiler, vmap) give it to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness import device_views
from harness import image_operations as operations
from harness.augment import chooses, integers, stream_key, to_float, uniform, uniforms
from harness.contracts import Choice, Config, DatasetInfo, HarnessError, Range, setting

TRIES = 10  # boxes drawn before RandomResizedCrop falls back to the centre
RATIO = (3 / 4, 4 / 3)  # aspect ratios of a crop, uniform in the logarithm
SIGMA = (0.1, 2.0)  # of the blur, pixels (Chen et al., 2020, appendix A)
SMALL = 64  # pixels below which blur "auto" is off: Chen et al. leave it out on CIFAR-10 (appendix B.9)
BRIGHT = 128 / 255  # from which solarisation inverts (Grill et al., 2020, appendix B)
CHUNK = 180_000  # pixels worked on at a time on a CPU: of 60,000 to 540,000 the best at 96 px; at 32 px any will do

# The streams of a box and of colour jitter, and the shape of what each sample takes of them: uniform numbers in [0, 1).
BOX: dict[str, tuple[int, ...]] = {"crop.area": (TRIES,), "crop.ratio": (TRIES,), "crop.place": (2,)}
JITTER: dict[str, tuple[int, ...]] = {"jitter": (), "jitter.amount": (4,), "jitter.order": (4,)}
Numbers = dict[str, Tensor]  # by stream, the samples along the first dimension

Probability = Annotated[float, Field(ge=0, le=1)]

# ------------------------------------------------------------------------------------------------------------- crops


def crop_boxes(
    seeds: Tensor, stream: str, image_size: tuple[int, int], scale: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes of RandomResizedCrop: seeds (B,) -> top, left, height, width, each (B,) float32 holding whole pixels.

    image_size: (H, W); scale: smallest and largest share of the area. All ten boxes are drawn at once and the first
    that fits is taken, which has the law of drawing until one fits without a shape or branch that depends on it.
    """
    numbers = {name: uniform(seeds, f"{stream}.{name.removeprefix('crop.')}", shape) for name, shape in BOX.items()}
    return _boxes(numbers, image_size, scale)


def _boxes(
    numbers: Numbers, image_size: tuple[int, int], scale: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    image_height, image_width = image_size
    area = (scale[0] + numbers["crop.area"] * (scale[1] - scale[0])) * (image_height * image_width)
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = (low + numbers["crop.ratio"] * (high - low)).exp()
    widths, heights = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (widths > 0) & (widths <= image_width) & (heights > 0) & (heights <= image_height)
    first, found = fits.to(torch.uint8).argmax(1, keepdim=True), fits.any(1)
    tallest, widest = _centred(image_size)
    width = widths.gather(1, first)[:, 0].masked_fill(~found, widest)
    height = heights.gather(1, first)[:, 0].masked_fill(~found, tallest)
    place = numbers["crop.place"]
    top = (place[:, 0] * (image_height - height + 1)).floor().masked_fill(~found, (image_height - tallest) // 2)
    left = (place[:, 1] * (image_width - width + 1)).floor().masked_fill(~found, (image_width - widest) // 2)
    return top, left, height, width


def _centred(image_size: tuple[int, int]) -> tuple[int, int]:
    """The fallback: height and width of the largest centred box of an allowed aspect ratio."""
    height, width = image_size
    shape = width / height
    return (
        round(width / RATIO[0]) if shape < RATIO[0] else height,
        round(height * RATIO[1]) if shape > RATIO[1] else width,
    )


def random_resized_crop(
    images: Tensor,
    seeds: Tensor,
    stream: str,
    scale: tuple[float, float],
    mirror: bool = False,
    size: int | None = None,
) -> Tensor:
    """RandomResizedCrop and, if `mirror`, a flip of half of the samples, in one resampling.

    size: side of the views in pixels; None: the image's own height and width
    """
    boxes = crop_boxes(seeds, f"{stream}.crop", (images.shape[2], images.shape[3]), scale)
    return operations.resize_boxes(images, boxes, _half(seeds, f"{stream}.mirror") if mirror else None, size)


def _half(seeds: Tensor, stream: str) -> Tensor:
    return uniform(seeds, stream) < 0.5


# ----------------------------------------------------------------------------------------------------- colours, blur


def draw_jitter(seeds: Tensor, stream: str, strength: float, probability: float) -> tuple[Tensor, Tensor, Tensor]:
    """factors, turn and order for `adjust_colours`: ColorJitter(0.8 s, 0.8 s, 0.8 s, 0.2 s) on a share of the samples
    (Chen et al., appendix A), no change on the others."""
    numbers = {name: uniform(seeds, f"{stream}.{name}", shape) for name, shape in JITTER.items()}
    return _jitter(numbers, strength, probability)


def _jitter(numbers: Numbers, strength: float, probability: float) -> tuple[Tensor, Tensor, Tensor]:
    applied, amount = numbers["jitter"] < probability, numbers["jitter.amount"]
    (low, high), reach = _jitter_range(strength)
    factors = (low + amount[:, :3] * (high - low)).masked_fill(~applied[:, None], 1.0)
    turn = ((2 * amount[:, 3] - 1) * reach).masked_fill(~applied, 0.0)
    return factors, turn, numbers["jitter.order"].argsort(1)


def _jitter_range(strength: float) -> tuple[tuple[float, float], float]:
    """Smallest and largest factor, and the largest turn of the hue."""
    return (max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength), min(0.5, 0.2 * strength)


def colour_jitter(images: Tensor, seeds: Tensor, stream: str, strength: float, probability: float) -> Tensor:
    """ColorJitter of strength s on a share `probability` of the samples."""
    return operations.adjust_colours(images, *draw_jitter(seeds, stream, strength, probability))


def grayscale(images: Tensor, seeds: Tensor, stream: str, probability: float) -> Tensor:
    """Replace all channels by the grey level in a share `probability` of the samples; nothing to do for one channel."""
    if images.shape[1] == 1:
        return images
    return operations.change_some(images, uniform(seeds, f"{stream}.grayscale") < probability, operations.to_grey)


def draw_blur(seeds: Tensor, stream: str, probability: float) -> tuple[Tensor, Tensor]:
    """chosen (B,) bool and sigma (B,), uniform in SIGMA."""
    return uniform(seeds, f"{stream}.blur") < probability, _sigma(uniform(seeds, f"{stream}.blur.sigma"))


def _sigma(number: Tensor) -> Tensor:
    return SIGMA[0] + number * (SIGMA[1] - SIGMA[0])


def gaussian_blur(images: Tensor, seeds: Tensor, stream: str, probability: float) -> Tensor:
    """Blur a share `probability` of the samples over a tenth of the side (at least 3 px)."""
    return _blurred(images, *draw_blur(seeds, stream, probability))


def _taps(height: int, width: int) -> int:
    side = min(height, width)
    return min(max(3, round(side * 0.1) // 2 * 2 + 1), 2 * side - 1)


def _blurred(images: Tensor, chosen: Tensor, sigma: Tensor) -> Tensor:
    taps = _taps(images.shape[2], images.shape[3])
    return operations.change_some(images, chosen, lambda some, widths: operations.blur(some, widths, taps), sigma)


def solarise(images: Tensor, seeds: Tensor, stream: str, probability: float, threshold: float = BRIGHT) -> Tensor:
    """RandomSolarize: invert the pixels of at least `threshold` in a share `probability` of the samples."""
    chosen = uniform(seeds, f"{stream}.solarise") < probability
    return _solarised(images, chosen, threshold)


def _solarised(images: Tensor, chosen: Tensor, threshold: float = BRIGHT) -> Tensor:
    return operations.change_some(images, chosen, lambda some: operations.invert_bright(some, threshold))


# ----------------------------------------------------------------------------------------------------- turns, squares


def random_turns(images: Tensor, seeds: Tensor, stream: str) -> Tensor:
    """Turn each square image by 0, 90, 180 or 270 degrees; same type, any."""
    return operations.quarter_turns(images, integers(seeds, f"{stream}.turns", 4))


def grid_corners(seeds: Tensor, stream: str, image_size: tuple[int, int], cells: int, side: int, jitter: int) -> Tensor:
    """Corners of one square in each cell of a grid: seeds (B,) -> (B, cells * cells, 2) int64 (top, left), row by row.

    The image holds cells x cells equal cells (what is left over is the border). A square of `side` pixels lies in the
    middle of its cell, moved along both axes so that `jitter` + 1 places are equally likely: 0 fixes the squares,
    the cell's slack (cell - side) lets them touch. Jigsaw puzzles (Noroozi & Favaro, 2016): cells of 75 px, squares of
    64, jitter 11; context prediction (Doersch et al., 2015): squares of 96, cells of 144, jitter 14.
    Raises HarnessError where the squares do not fit.
    """
    starts = []
    for axis, pixels in enumerate(image_size):
        cell = pixels // cells
        slack = cell - side
        if side < 1 or not 0 <= jitter <= slack:
            raise HarnessError(
                f"squares of {side} px moved by {jitter} do not fit into cells of {cell} px ({pixels} px / {cells})"
            )
        first = (pixels - cell * cells) // 2 + (slack - jitter) // 2
        cell_starts = torch.arange(cells, device=seeds.device) * cell + first
        cell_starts = cell_starts.reshape((-1, 1) if axis == 0 else (1, -1))
        moved = integers(seeds, f"{stream}.squares.{axis}", jitter + 1, (cells, cells))
        starts.append((cell_starts + moved).flatten(1))
    return torch.stack(starts, 2)


# ---------------------------------------------------------------------------------------------------------- view maker


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
    solarise: Probability = setting(
        0.0,
        "share of views whose bright pixels are inverted",
        source="none in Chen et al., 2020; 0.2 on one of two sides in Grill et al., 2020, appendix B",
    )


Drawn = dict[str, tuple[Tensor, ...]]  # what was drawn for each operation that is on, a row of each tensor per sample


def _taken(drawn: Drawn, rows: Tensor) -> Drawn:
    return {name: tuple(tensor[rows] for tensor in tensors) for name, tensors in drawn.items()}


@dataclass(frozen=True)
class ViewMaker:
    """Crop and flip, colours, grey, blur, solarisation, in this order: uint8 (B, C, H, W) -> float32 in [0, 1].

    scale: smallest and largest crop, share of the area; size: side of the views in pixels, None: the image's own
    """

    config: ViewConfig
    mirror: bool
    blur: float
    scale: tuple[float, float]
    size: int | None = None

    @classmethod
    def of(
        cls,
        config: ViewConfig,
        info: DatasetInfo,
        *,
        scale: tuple[float, float] | None = None,
        size: int | None = None,
    ) -> ViewMaker:
        """Resolve what `auto` means for this data set; `scale` and `size` make the small local views of multi-crop
        (Caron et al., 2020), scale None is (config.crop_scale, 1)."""
        blur_share = config.blur if config.blur != "auto" else 0.5 if min(info.image_size) >= SMALL else 0.0
        mirror = info.mirror_keeps_label if config.mirror == "auto" else config.mirror
        return cls(config, mirror, blur_share, scale or (config.crop_scale, 1.0), size)

    @torch.no_grad()
    def __call__(self, images: Tensor, seeds: Tensor, stream: str) -> Tensor:
        """One view of each image; another `stream` gives another view. Made outside autocast."""
        if device_views.fits(images, seeds):
            return device_views.strong(images, seeds, self._for_device(images, stream), self._side(images))
        with torch.autocast(images.device.type, enabled=False):
            drawn = self._draw(images, seeds, stream)
            if not chooses(images, seeds):
                return self._make(images, drawn)
            return self._make_by_chunks(images, drawn)

    def _side(self, images: Tensor) -> tuple[int, int]:
        """Height and width of the views."""
        return (images.shape[2], images.shape[3]) if self.size is None else (self.size, self.size)

    def _for_device(self, images: Tensor, stream: str) -> device_views.StrongViews:
        """`_draw` and `_make` as numbers for kernels."""
        config = self.config
        words = "crop.area crop.ratio crop.place mirror jitter jitter.amount jitter.order grayscale blur blur.sigma solarise"
        factors, hue = _jitter_range(config.jitter)
        return device_views.StrongViews(
            keys=tuple(stream_key(f"{stream}.{word}") for word in words.split()), scale=self.scale, ratio=RATIO,
            centred=_centred((images.shape[2], images.shape[3])), mirror=0.5 if self.mirror else 0.0, factors=factors,
            hue=hue, jitter_probability=config.jitter_probability if config.jitter else 0.0, grayscale=config.grayscale,
            blur=self.blur, sigma=SIGMA, taps=_taps(*self._side(images)), solarise=config.solarise, bright=BRIGHT,
            tries=TRIES,
        )  # fmt: skip

    def _draw(self, images: Tensor, seeds: Tensor, stream: str) -> Drawn:
        """Every random choice of one view."""
        config, channels = self.config, images.shape[1]
        wanted: dict[str, tuple[int, ...]] = {**BOX}
        if self.mirror:
            wanted["mirror"] = ()
        if config.jitter and config.jitter_probability:
            wanted |= JITTER
        if config.grayscale and channels > 1:
            wanted["grayscale"] = ()
        if self.blur:
            wanted |= {"blur": (), "blur.sigma": ()}
        if config.solarise:
            wanted["solarise"] = ()
        found = uniforms(seeds, {f"{stream}.{name}": shape for name, shape in wanted.items()})
        numbers = dict(zip(wanted, found.values(), strict=True))
        drawn: Drawn = {"crop": _boxes(numbers, (images.shape[2], images.shape[3]), self.scale)}
        if "mirror" in numbers:
            drawn["mirror"] = (numbers["mirror"] < 0.5,)
        if "jitter" in numbers:
            drawn["jitter"] = _jitter(numbers, config.jitter, config.jitter_probability)
        if "grayscale" in numbers:
            drawn["grey"] = (numbers["grayscale"] < config.grayscale,)
        if "blur" in numbers:
            drawn["blur"] = (numbers["blur"] < self.blur, _sigma(numbers["blur.sigma"]))
        if "solarise" in numbers:
            drawn["solarise"] = (numbers["solarise"] < config.solarise,)
        return drawn

    def _make(self, images: Tensor, drawn: Drawn) -> Tensor:
        """What was drawn, carried out."""
        flip = drawn["mirror"][0] if "mirror" in drawn else None
        top, left, height, width = drawn["crop"]
        view = operations.resize_boxes(to_float(images), (top, left, height, width), flip, self.size)
        if "jitter" in drawn:
            factors, turn, order = drawn["jitter"]
            view = operations.adjust_colours(view, factors, turn, order)
        if "grey" in drawn:
            view = operations.change_some(view, drawn["grey"][0], operations.to_grey)
        if "blur" in drawn:
            chosen, sigma = drawn["blur"]
            view = _blurred(view, chosen, sigma)
        if "solarise" in drawn:
            view = _solarised(view, drawn["solarise"][0])
        return view

    def _make_by_chunks(self, images: Tensor, drawn: Drawn) -> Tensor:
        """The same a few samples at a time, so that what is in between stays in a CPU's caches.

        Samples whose colours change alike are taken together: fewer, larger operations.
        """
        batch, channels, height, width = images.shape
        order = torch.arange(batch)
        if "jitter" in drawn:
            factors, turn, slots = drawn["jitter"]
            order = operations.sorted_by_steps(operations.colour_steps(factors, turn, slots, channels == 3))
        views = torch.empty(batch, channels, *self._side(images), dtype=torch.float32)
        places, rows = views.unbind(), images.permute(0, 2, 3, 1)  # channels_last underneath: images are copied whole
        for part in order.split(max(1, CHUNK // (height * width))):
            made = self._make(rows.index_select(0, part).permute(0, 3, 1, 2), _taken(drawn, part))
            for place, view in zip(part.tolist(), made.unbind(), strict=True):
                places[place].copy_(view)  # a third of the time of index_copy_, which goes pixel by pixel
        return views
