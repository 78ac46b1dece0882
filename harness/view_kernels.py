# mypy: ignore-errors
"""Triton kernels of harness.device_views: random views of batches of images, drawn and made on CUDA.

Random numbers are those of harness.augment to the bit; what is done with them has the formulas of harness.views and
harness.image_operations. Arithmetic is float32. Sums are taken in a fixed order, so the same input gives the same bits.
"""

import triton
import triton.language as tl

# What `draw` stores, a row of B numbers each; harness.device_views asks for ROWS of them.
TOP, LEFT, HEIGHT, WIDTH, FLIP = (tl.constexpr(row) for row in range(5))
KIND, FACTOR = tl.constexpr(5), tl.constexpr(9)  # of each of the four slots of colour jitter
TURN, GREY, BLUR, SIGMA, SOLARISE = (tl.constexpr(row) for row in range(13, 18))
ROWS = 18
# Kinds of harness.image_operations.
CONTRAST, SATURATION, HUE, NOTHING = (tl.constexpr(kind) for kind in (1, 2, 3, 4))


@triton.jit
def _mixed(bits):
    """harness.augment.mix of uint64."""
    bits = bits + 0x9E3779B97F4A7C15
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@triton.jit
def _uniform(seeds, key, counter):
    """harness.augment.uniform: seeds (uint64), the key of a stream (int64) and which of its numbers."""
    bits = _mixed(_mixed(seeds + key.to(tl.uint64)) + counter.to(tl.uint64))
    return (bits >> 40).to(tl.int32).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def _rounded(value):
    return tl.floor(value + 0.5)


@triton.jit(
    do_not_specialize=[
        "B", "area_key", "ratio_key", "place_key", "mirror_key", "jitter_key", "amount_key", "order_key", "grey_key",
        "blur_key", "sigma_key", "solarise_key",
    ]
)  # fmt: skip
def draw(
    seeds, drawn, B, area_key, ratio_key, place_key, mirror_key, jitter_key, amount_key, order_key, grey_key, blur_key,
    sigma_key, solarise_key, image_height, image_width, scale_low, scale_span, ratio_low, ratio_span, widest, tallest,
    mirror, jitter, factor_low, factor_span, hue_reach, grey, blur, sigma_low, sigma_span, solarise,
    TRIES: tl.constexpr, RGB: tl.constexpr, BLOCK: tl.constexpr, BLOCK_TRIES: tl.constexpr,
):  # fmt: skip
    """Every random choice of one view of B samples -> drawn (ROWS, B) float32; mirror to solarise: probabilities."""
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = sample < B
    seed = tl.load(seeds + sample, mask=inside, other=0).to(tl.uint64)
    out = drawn + sample

    attempt = tl.arange(0, BLOCK_TRIES)
    each = seed[:, None] + tl.zeros((1, BLOCK_TRIES), tl.uint64)
    area = (scale_low + _uniform(each, area_key, attempt[None, :]) * scale_span) * (image_height * image_width)
    ratio = tl.exp(ratio_low + _uniform(each, ratio_key, attempt[None, :]) * ratio_span)
    widths, heights = _rounded(tl.sqrt(area * ratio)), _rounded(tl.sqrt(area / ratio))
    fits = (widths > 0) & (widths <= image_width) & (heights > 0) & (heights <= image_height)
    fits = fits & (attempt < TRIES)[None, :]
    first = tl.min(tl.where(fits, attempt[None, :], BLOCK_TRIES), 1)
    found = first < BLOCK_TRIES
    chosen = attempt[None, :] == first[:, None]
    width = tl.where(found, tl.sum(tl.where(chosen, widths, 0.0), 1), widest)
    height = tl.where(found, tl.sum(tl.where(chosen, heights, 0.0), 1), tallest)
    zero = tl.zeros((BLOCK,), tl.int32)
    top = tl.floor(_uniform(seed, place_key, zero) * (image_height - height + 1))
    left = tl.floor(_uniform(seed, place_key, zero + 1) * (image_width - width + 1))
    tl.store(out + TOP * B, tl.where(found, top, tl.floor((image_height - tallest) * 0.5)), mask=inside)
    tl.store(out + LEFT * B, tl.where(found, left, tl.floor((image_width - widest) * 0.5)), mask=inside)
    tl.store(out + HEIGHT * B, height, mask=inside)
    tl.store(out + WIDTH * B, width, mask=inside)
    tl.store(out + FLIP * B, (_uniform(seed, mirror_key, zero) < mirror).to(tl.float32), mask=inside)

    applied = _uniform(seed, jitter_key, zero) < jitter
    turn = tl.where(applied, (2 * _uniform(seed, amount_key, zero + 3) - 1) * hue_reach, 0.0)
    tl.store(out + TURN * B, turn, mask=inside)
    for kind in tl.static_range(4):
        place = _uniform(seed, order_key, zero + kind)
        slot = tl.zeros((BLOCK,), tl.int32)  # how many kinds come before
        for other in tl.static_range(4):
            if other != kind:
                rival = _uniform(seed, order_key, zero + other)
                slot += ((rival < place) | ((rival == place) & (other < kind))).to(tl.int32)
        if kind == 3:
            idle = turn == 0
            factor = tl.zeros((BLOCK,), tl.float32)
        else:
            factor = tl.where(applied, factor_low + _uniform(seed, amount_key, zero + kind) * factor_span, 1.0)
            idle = factor == 1
        if (kind >= 2) and not RGB:
            idle = idle | (slot >= 0)
        tl.store(out + (KIND + slot) * B, tl.where(idle, 4.0, kind * 1.0), mask=inside)
        tl.store(out + (FACTOR + slot) * B, factor, mask=inside)

    tl.store(out + GREY * B, (_uniform(seed, grey_key, zero) < grey).to(tl.float32), mask=inside)
    tl.store(out + BLUR * B, (_uniform(seed, blur_key, zero) < blur).to(tl.float32), mask=inside)
    tl.store(out + SIGMA * B, sigma_low + _uniform(seed, sigma_key, zero) * sigma_span, mask=inside)
    tl.store(out + SOLARISE * B, (_uniform(seed, solarise_key, zero) < solarise).to(tl.float32), mask=inside)


@triton.jit
def _source(pixel, start, length, out):
    """Where a pixel of the view reads: the two neighbours, and the share of the second."""
    place = tl.maximum((pixel.to(tl.float32) + 0.5) * (length / out) - 0.5, 0.0)
    place = tl.minimum(place, length - 1) + start
    low = tl.floor(place)
    high = tl.minimum(low + 1, start + length - 1)
    return low.to(tl.int32), high.to(tl.int32), place - low


@triton.jit
def _channel(image, above, below, before, behind, down, across, mask):
    """Bilinear, in [0, 1]: bytes are mixed as they are, so that equal ones give themselves."""
    first = tl.load(image + above + before, mask=mask, other=0).to(tl.float32)
    second = tl.load(image + above + behind, mask=mask, other=0).to(tl.float32)
    upper = first + across * (second - first)
    first = tl.load(image + below + before, mask=mask, other=0).to(tl.float32)
    second = tl.load(image + below + behind, mask=mask, other=0).to(tl.float32)
    lower = first + across * (second - first)
    return tl.div_rn(upper + down * (lower - upper), 255.0)


@triton.jit
def _cut(
    images, drawn, B, sample, pixel, mask, stride_b, stride_c, stride_h, stride_w, rows, columns, C: tl.constexpr
):  # fmt: skip
    """The pixels of a stretched box: three channels, equal ones where the image has one."""
    row, column = pixel // columns, pixel % columns
    column = tl.where(tl.load(drawn + FLIP * B + sample) > 0, columns - 1 - column, column)
    top, height = tl.load(drawn + TOP * B + sample), tl.load(drawn + HEIGHT * B + sample)
    left, width = tl.load(drawn + LEFT * B + sample), tl.load(drawn + WIDTH * B + sample)
    above, below, down = _source(row, top, height, rows)
    before, behind, across = _source(column, left, width, columns)
    image = images + sample.to(tl.int64) * stride_b
    above, below, before, behind = above * stride_h, below * stride_h, before * stride_w, behind * stride_w
    red = _channel(image, above, below, before, behind, down, across, mask)
    green, blue = red, red
    if C == 3:
        green = _channel(image + stride_c, above, below, before, behind, down, across, mask)
        blue = _channel(image + 2 * stride_c, above, below, before, behind, down, across, mask)
    return red, green, blue


@triton.jit
def _luma(red, green, blue, C: tl.constexpr):
    grey = red
    if C == 3:
        grey = 0.2989 * red + 0.587 * green + 0.114 * blue
    return grey


@triton.jit
def _clamped(value):
    return tl.minimum(tl.maximum(value, 0.0), 1.0)


@triton.jit
def _adjusted(red, green, blue, kind, factor, turn, mean, C: tl.constexpr):
    """One step of colour jitter; the formulas of image_operations._blend and turn_hue."""
    if kind < HUE:
        grey = tl.where(kind == SATURATION, _luma(red, green, blue, C), 0.0)
        other = (1 - factor) * tl.where(kind == CONTRAST, mean, grey)
        red = _clamped(red * factor + other)
        green = _clamped(green * factor + other)
        blue = _clamped(blue * factor + other)
    elif kind == HUE:
        value = tl.maximum(tl.maximum(red, green), blue)
        least = tl.minimum(tl.minimum(red, green), blue)
        spread = value - least
        away = (green - red + (blue - least)) / tl.maximum(spread, 1e-12) + 1
        hue = tl.where(green >= blue, away, -away) + 6 * turn
        hue = hue - tl.floor(hue / 6) * 6
        red = least + _clamped(tl.abs(hue - 3) - 1) * spread
        green = value - _clamped(tl.abs(hue - 2) - 1) * spread
        blue = value - _clamped(tl.abs(hue - 4) - 1) * spread
    return red, green, blue


@triton.jit(do_not_specialize=["B"])
def contrast_sums(
    images, drawn, partial, B, stride_b, stride_c, stride_h, stride_w, rows, columns,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a tile of each view, the sum of grey levels that its contrast starts from: (B, tiles), where there is one."""
    sample, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    asked = sample < 0
    for slot in tl.static_range(4):
        asked = asked | (tl.load(drawn + (KIND + slot) * B + sample) == CONTRAST)
    if asked:
        pixel = tile * BLOCK + tl.arange(0, BLOCK)
        mask = pixel < rows * columns
        red, green, blue = _cut(
            images, drawn, B, sample, pixel, mask, stride_b, stride_c, stride_h, stride_w, rows, columns, C
        )
        turn = tl.load(drawn + TURN * B + sample)
        waiting = sample >= 0
        for slot in tl.static_range(4):
            kind = tl.load(drawn + (KIND + slot) * B + sample).to(tl.int32)
            factor = tl.load(drawn + (FACTOR + slot) * B + sample)
            waiting = waiting & (kind != CONTRAST)
            red, green, blue = _adjusted(red, green, blue, tl.where(waiting, kind, NOTHING), factor, turn, 0.0, C)
        total = tl.sum(tl.where(mask, _luma(red, green, blue, C), 0.0), 0)
        tl.store(partial + sample * tiles + tile, total)


@triton.jit
def _solarised(value, threshold):
    return tl.where(value >= threshold, 1 - value, value)


@triton.jit(do_not_specialize=["B"])
def views(
    images, drawn, partial, out, B, stride_b, stride_c, stride_h, stride_w, rows, columns, bright,
    C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Crop, flip, colours, grey, and solarisation where no blur comes before it: out (B, rows, columns, C) float32."""
    sample, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < rows * columns
    red, green, blue = _cut(
        images, drawn, B, sample, pixel, mask, stride_b, stride_c, stride_h, stride_w, rows, columns, C
    )
    number = tl.arange(0, BLOCK_TILES)
    sums = tl.load(partial + sample * tiles + number, mask=number < tiles, other=0.0)
    mean = tl.sum(sums, 0) / (rows * columns)  # not a number where contrast does not ask for it
    turn = tl.load(drawn + TURN * B + sample)
    for slot in tl.static_range(4):
        kind = tl.load(drawn + (KIND + slot) * B + sample).to(tl.int32)
        factor = tl.load(drawn + (FACTOR + slot) * B + sample)
        red, green, blue = _adjusted(red, green, blue, kind, factor, turn, mean, C)
    grey = tl.load(drawn + GREY * B + sample) > 0
    level = _luma(red, green, blue, C)
    now = tl.load(drawn + SOLARISE * B + sample) > tl.load(drawn + BLUR * B + sample)
    threshold = tl.where(now, bright, 2.0)  # which no value reaches
    place = out + (sample.to(tl.int64) * (rows * columns) + pixel) * C
    tl.store(place, _solarised(tl.where(grey, level, red), threshold), mask=mask)
    if C == 3:
        tl.store(place + 1, _solarised(tl.where(grey, level, green), threshold), mask=mask)
        tl.store(place + 2, _solarised(tl.where(grey, level, blue), threshold), mask=mask)


@triton.jit
def _mirrored(place, count):
    """An index reflected at the borders, its ends once: reach is below `count`."""
    place = tl.abs(place)
    return tl.where(place < count, place, 2 * (count - 1) - place)


@triton.jit(do_not_specialize=["B"])
def blurred(
    source, drawn, out, B, rows, columns, bright,
    C: tl.constexpr, REACH: tl.constexpr, ACROSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A Gaussian along one side of the chosen views; across is the second, and solarisation follows it.

    source, out: (B, rows, columns, C) float32
    """
    sample = tl.program_id(0)
    if tl.load(drawn + BLUR * B + sample) > 0:
        element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = element < rows * columns * C
        channel, column, row = element % C, element // C % columns, element // C // columns
        sigma = tl.load(drawn + SIGMA * B + sample)
        image = source + sample.to(tl.int64) * (rows * columns * C)
        total = tl.load(image + element, mask=mask, other=0.0)
        weights = 1.0
        for step in tl.static_range(1, REACH + 1):
            ratio = step / sigma
            weight = tl.exp(-0.5 * ratio * ratio)
            if ACROSS:
                near = (row * columns + _mirrored(column - step, columns)) * C + channel
                far = (row * columns + _mirrored(column + step, columns)) * C + channel
            else:
                near = (_mirrored(row - step, rows) * columns + column) * C + channel
                far = (_mirrored(row + step, rows) * columns + column) * C + channel
            pair = tl.load(image + near, mask=mask, other=0.0) + tl.load(image + far, mask=mask, other=0.0)
            total += weight * pair
            weights += 2 * weight
        total = total / weights
        if ACROSS:
            total = tl.minimum(total, 1.0)
            total = _solarised(total, tl.where(tl.load(drawn + SOLARISE * B + sample) > 0, bright, 2.0))
        tl.store(out + sample.to(tl.int64) * (rows * columns * C) + element, total, mask=mask)


@triton.jit(do_not_specialize=["shift_key", "mirror_key"])
def moved(
    images, seeds, out, shift_key, mirror_key, stride_b, stride_c, stride_h, stride_w, rows, columns,
    C: tl.constexpr, SHIFT: tl.constexpr, MIRROR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """harness.augment.shift_and_mirror: out (B, rows, columns, C) of the images' own type."""
    sample = tl.program_id(0)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = element < rows * columns * C
    channel, column, row = element % C, element // C % columns, element // C // columns
    seed = tl.load(seeds + sample).to(tl.uint64)
    zero = sample * 0
    if MIRROR:
        column = tl.where(_uniform(seed, mirror_key, zero) < 0.5, columns - 1 - column, column)
    if SHIFT > 0:
        most = 2 * SHIFT
        down = tl.minimum((_uniform(seed, shift_key, zero) * (most + 1)).to(tl.int32), most) - SHIFT
        across = tl.minimum((_uniform(seed, shift_key, zero + 1) * (most + 1)).to(tl.int32), most) - SHIFT
        row = tl.minimum(tl.maximum(row + down, 0), rows - 1)
        column = tl.minimum(tl.maximum(column + across, 0), columns - 1)
    place = images + sample.to(tl.int64) * stride_b + channel * stride_c + row * stride_h + column * stride_w
    tl.store(out + sample.to(tl.int64) * (rows * columns * C) + element, tl.load(place, mask=mask, other=0), mask=mask)
