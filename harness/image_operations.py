"""Image operations with one parameter per sample: resampled boxes, colours, blur, quarter turns, squares.

Nothing here is random. The formulas are torchvision's (resized_crop without antialiasing, adjust_brightness and its
kin, gaussian_blur, solarize). Images are floats in [0, 1] of shape (B, C, H, W) unless said otherwise, and no image is
changed in place. What comes out for a sample has the same bits whatever else is in the batch: sums run in a fixed order,
and no matrix product is used, whose order of summation (and, by setting, precision) is the library's choice.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from harness.augment import chooses

BRIGHTNESS, CONTRAST, SATURATION, HUE, NOTHING = range(5)

# ------------------------------------------------------------------------------------------- only where it is asked for


def change_some(images: Tensor, chosen: Tensor, change: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """`change(images, *parameters)` where chosen (B,) bool, else the image; parameters have one row per sample."""
    if not chooses(images, chosen):
        return torch.where(chosen[:, None, None, None], change(images, *parameters), images)
    index = chosen.nonzero()[:, 0]
    if not len(index):
        return images
    changed = change(images.index_select(0, index), *(rows.index_select(0, index) for rows in parameters))
    # Copying both and picking takes a third of the time of index_copy, which goes pixel by pixel.
    source = torch.arange(len(images)).index_copy_(0, index, torch.arange(len(images), len(images) + len(index)))
    return torch.cat((images, changed)).index_select(0, source)


# ---------------------------------------------------------------------------------------------------------------- boxes


def _source(start: Tensor, length: Tensor, out: int, flip: Tensor | None = None) -> Tensor:
    """Where each of `out` pixels reads, in pixels of the whole image; never outside its own box -> (B, out)."""
    pixel = torch.arange(out, dtype=torch.float32, device=start.device).expand(len(start), out)
    if flip is not None:
        pixel = torch.where(flip[:, None], out - 1 - pixel, pixel)
    inside = ((pixel + 0.5) * (length / out)[:, None] - 0.5).clamp_min(0)
    return torch.minimum(inside, (length - 1)[:, None]) + start[:, None]


def resize_boxes(
    images: Tensor,
    boxes: tuple[Tensor, Tensor, Tensor, Tensor],
    flip: Tensor | None = None,
    size: int | None = None,
) -> Tensor:
    """Cut a box out of each image and stretch it, bilinear without antialiasing.

    boxes: top, left, height, width, each (B,) float32 holding whole pixels; flip (B,) bool: mirror these horizontally
    size: side of the result in pixels; None: the images' own height and width
    """
    top, left, height, width = boxes
    batch, _, rows, columns = images.shape
    out_rows, out_columns = (rows, columns) if size is None else (size, size)
    y = (2 * _source(top, height, out_rows) + 1) / rows - 1
    x = (2 * _source(left, width, out_columns, flip) + 1) / columns - 1
    shape = (batch, out_rows, out_columns)
    grid = torch.stack((x[:, None, :].expand(shape), y[:, :, None].expand(shape)), -1)
    resized = functional.grid_sample(
        images, grid.to(images.dtype), mode="bilinear", padding_mode="border", align_corners=False
    )
    return resized.clamp(0, 1)  # the four weights may add up to one bit more than 1


# -------------------------------------------------------------------------------------------------------------- colours


def luma(images: Tensor) -> Tensor:
    """Grey level (B, 1, H, W) with ITU-R 601 weights as torchvision rounds them; the channels' mean unless RGB."""
    if images.shape[1] != 3:
        return images if images.shape[1] == 1 else images.mean(1, keepdim=True)
    red, green, blue = images.split(1, 1)
    return (0.2989 * red).add_(0.587 * green).add_(0.114 * blue)


def to_grey(images: Tensor) -> Tensor:
    """Every channel replaced by the grey level."""
    return luma(images).expand_as(images)


def _mean_grey(images: Tensor) -> Tensor:
    """Each image's mean grey level (B, 1, 1, 1).

    In float64 the rounded mean does not depend on the order of summation, which changes with the batch.
    """
    return luma(images).double().mean((1, 2, 3), keepdim=True).to(images.dtype)


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Rotate the HSV hue of RGB images (B, 3, H, W) by `turn` (B,) of a full circle.

    The circle is counted in sixths with red at 0, green at 2, blue at 4. A colour's distance from red along it is
    1 + (green - red + blue - least) / (value - least), on green's side if green > blue; back again, a channel rises
    over the first sixth of the half circle nearest to it, stays, and falls. Same as HSV's six cases, without choosing
    among them: comparisons and selections of single pixels are the slow operations of a CPU.
    """
    red, green, blue = images.split(1, 1)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    spread = value - least  # 0 for a grey, whose hue then does not matter
    away = (green - red).add_(blue - least).div_(spread.clamp_min(1e-12)).add_(1)
    hue = away.copysign(green - blue).add_(6 * turn[:, None, None, None])
    hue = hue.sub_((hue / 6).floor_().mul_(6))
    share = torch.cat([(hue - opposite).abs_() for opposite in (3, 2, 4)], 1).sub_(1).clamp(0, 1).mul_(spread)
    rising, falling = share.split((1, 2), 1)
    return torch.cat((least + rising, value - falling), 1)


def colour_steps(factors: Tensor, turn: Tensor, order: Tensor, rgb: bool) -> Tensor:
    """What `adjust_colours` does in each slot: (B, 4) of BRIGHTNESS ... HUE, NOTHING where it would change nothing."""
    idle = torch.cat((factors == 1, (turn == 0)[:, None]), 1)
    if not rgb:
        idle = idle | (torch.arange(4, device=order.device) >= SATURATION)
    return order.masked_fill(idle.gather(1, order), NOTHING)


def sorted_by_steps(steps: Tensor) -> Tensor:
    """The order (B,) in which samples with equal first steps are neighbours, and of these those with equal seconds."""
    return (steps * (5 ** torch.arange(3, -1, -1, device=steps.device))).sum(1).argsort(stable=True)


def adjust_colours(images: Tensor, factors: Tensor, turn: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, clamped after each, in every sample's own order.

    factors (B, 3): of brightness, contrast, saturation, 1 changes nothing; turn (B,): of the hue, in circles;
    order (B, 4): a permutation of (0, 1, 2, 3) = (brightness, contrast, saturation, hue). Saturation and hue leave
    images alone that are not RGB.
    """
    steps = colour_steps(factors, turn, order, images.shape[1] == 3)
    adjust = _adjust_neighbours if chooses(images, order) else _adjust_all
    return adjust(images, factors, turn, steps)


def _adjust_all(images: Tensor, factors: Tensor, turn: Tensor, steps: Tensor) -> Tensor:
    """Up to three blends before the hue and three after it; a sample's idle ones blend with weight 0."""
    table = functional.pad(factors, (0, 2), value=1.0)
    factor_of = table.gather(1, steps)
    has_hue = steps == HUE
    turned = has_hue.any(1)
    hue_slot = has_hue.to(torch.uint8).argmax(1).masked_fill(~turned, 3)

    def blended(images: Tensor, slot: int, active: Tensor) -> Tensor:
        factor = factor_of[:, slot].masked_fill(~active, 1.0)
        rest, step = 1 - factor, steps[:, slot]
        # With black, with the mean grey or with the pixel's own grey, whichever the step says.
        of_mean, of_grey = ((rest * (step == kind))[:, None, None, None] for kind in (CONTRAST, SATURATION))
        other = of_mean * _mean_grey(images) + of_grey * luma(images)
        return (images * factor[:, None, None, None] + other).clamp(0, 1)

    for slot in (0, 1, 2):
        images = blended(images, slot, slot < hue_slot)
    if images.shape[1] == 3:
        images = torch.where(turned[:, None, None, None], turn_hue(images, turn), images)
    for slot in (1, 2, 3):
        images = blended(images, slot, slot >= hue_slot)
    return images


def _adjust_neighbours(images: Tensor, factors: Tensor, turn: Tensor, steps: Tensor) -> Tensor:
    """Sorted by what is done to them, so that each slot is a few runs of neighbours with the same step."""
    rank = sorted_by_steps(steps)
    images = images.index_select(0, rank)
    by_slot = functional.pad(factors, (0, 2), value=1.0).gather(1, steps)[rank].T[:, :, None, None, None]
    turn = turn[rank]
    for factor, kinds in zip(by_slot, steps[rank].T.tolist(), strict=True):
        start = 0
        for kind, run in groupby(kinds):
            part = slice(start, start := start + len(list(run)))
            if kind == HUE:
                images[part] = turn_hue(images[part], turn[part])
            elif kind != NOTHING:
                _blend(images[part], factor[part], kind)
    return images.index_select(0, rank.argsort())


def _blend(images: Tensor, factor: Tensor, kind: int) -> None:
    """One kind of blend, in place."""
    other = None
    if kind == CONTRAST:
        other = (1 - factor) * _mean_grey(images)
    elif kind == SATURATION:
        other = (1 - factor) * luma(images)
    images.mul_(factor)
    if other is not None:
        images.add_(other)
    images.clamp_(0, 1)


def invert_bright(images: Tensor, threshold: float) -> Tensor:
    """Solarise: pixels of at least `threshold` become their negative."""
    return torch.where(images >= threshold, 1 - images, images)


# ----------------------------------------------------------------------------------------------------------------- blur


def blur(images: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """Separable Gaussian of `taps` (odd) pixels, sigma (B,) in pixels, reflected at the border (so taps // 2 < side)."""
    batch, channels, height, width = images.shape
    reach = taps // 2
    offsets = torch.arange(-reach, reach + 1, dtype=sigma.dtype, device=sigma.device)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]).square())
    weights = (weights / weights.double().sum(1, keepdim=True).to(weights.dtype)).to(images.dtype)
    down = functional.pad(images, (0, 0, reach, reach), mode="reflect").view(batch, channels, -1)
    images = _symmetric_sum(down, weights[:, None], width).view(batch, channels, height, width)
    # Along the rows all of an image is taken as one: sums that reach into the next row are made and left out, which
    # is faster than starting anew for every row.
    across = functional.pad(images, (reach, reach, 0, 0), mode="reflect").view(batch, -1)
    sums = functional.pad(_symmetric_sum(across, weights, 1), (0, 2 * reach))
    sums = sums.view(batch, channels, height, width + 2 * reach)[..., :width]
    return sums.clamp(max=1)  # the weights may add up to one bit more than 1


def _symmetric_sum(padded: Tensor, weights: Tensor, stride: int) -> Tensor:
    """Weighted sums along the last dimension: (..., N) and (..., taps), equal from both ends -> (..., N - taps + 1)
    where elements `stride` apart are neighbours (and N - (taps - 1) stride in place of N - taps + 1)."""
    reach = weights.shape[-1] // 2
    length = padded.shape[-1] - 2 * reach * stride
    total = padded.narrow(-1, reach * stride, length) * weights[..., reach, None]
    for step in range(1, reach + 1):
        pair = padded.narrow(-1, (reach - step) * stride, length) + padded.narrow(-1, (reach + step) * stride, length)
        total.add_(pair.mul_(weights[..., reach + step, None]))
    return total


# ------------------------------------------------------------------------------------------------------- turns, squares


def four_rotations(images: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, S, S) -> the images turned by 0, 90, 180 and 270 degrees (4B, C, S, S), and the quarter turns (4B,)."""
    turned = torch.cat([torch.rot90(images, turns, (2, 3)) for turns in range(4)])
    return turned, torch.arange(4, device=images.device).repeat_interleave(len(images))


def quarter_turns(images: Tensor, turns: Tensor) -> Tensor:
    """Turn each image by its own multiple of 90 degrees, counter-clockwise: (B, C, S, S), turns (B,) int64 in 0 .. 3.

    Picked from all four: on one core a quarter of the time of a gather of pixels.
    """
    every, _ = four_rotations(images)
    return every.index_select(0, turns * len(images) + torch.arange(len(images), device=images.device))


def cut_squares(images: Tensor, corners: Tensor, side: int) -> Tensor:
    """Cut squares out of each image: (B, C, H, W) any dtype, corners (B, P, 2) int64 (top, left) that fit
    -> (B, P, C, side, side), as one gather."""
    cells = torch.arange(side, device=images.device)
    rows, columns = corners[..., 0, None] + cells, corners[..., 1, None] + cells  # (B, P, side)
    sample = torch.arange(len(images), device=images.device)[:, None, None, None]
    squares = images.permute(0, 2, 3, 1)[sample, rows[..., :, None], columns[..., None, :]]
    return squares.permute(0, 1, 4, 2, 3)
