# mypy: ignore-errors
"""Triton kernels of harness.batch_norm and harness.max_pool, for maps whose channels lie next to each other.

A map is a matrix of M pixels by C channels.

Sums over pixels are taken in two steps of a fixed order, so the same input gives the same bits. Statistics and all
arithmetic are float32, whatever the map is.
"""

import triton
import triton.language as tl

# Numbers of pixels and programs are not specialised on: one compilation serves every layer.


@triton.jit
def _activated(z, slope):
    return tl.where(z > 0, z, z * slope)


@triton.jit(do_not_specialize=["M", "rows_each"])
def moments(x, partial, M, C, rows_each, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of its rows, the sums of x - p and of its square, p the first pixel: (2, programs, C)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < C
    pivot = tl.load(x + columns, mask=inside, other=0).to(tl.float32)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    first = program.to(tl.int64) * rows_each
    for start in range(0, rows_each, BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & inside[None, :]
        value = tl.load(x + rows[:, None] * C + columns[None, :], mask=mask, other=0).to(tl.float32)
        value = tl.where(mask, value - pivot, 0.0)
        total += value
        squares += value * value
    place = partial + program * C + columns
    tl.store(place, tl.sum(total, 0), mask=inside)
    tl.store(place + programs * C, tl.sum(squares, 0), mask=inside)


@triton.jit(do_not_specialize=["M", "programs"])
def statistics(
    x, partial, mean, scale, running_mean, running_var, M, C, programs, momentum, eps,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of the batch from `moments`; running statistics moved by `momentum`."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < C
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, programs, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        mask = (rows < programs)[:, None] & inside[None, :]
        place = partial + rows[:, None] * C + columns[None, :]
        total += tl.load(place, mask=mask, other=0.0)
        squares += tl.load(place + programs * C, mask=mask, other=0.0)
    moved = tl.sum(total, 0) / M
    variance = tl.maximum(tl.sum(squares, 0) / M - moved * moved, 0.0)
    average = tl.load(x + columns, mask=inside, other=0).to(tl.float32) + moved
    tl.store(mean + columns, average, mask=inside)
    tl.store(scale + columns, 1.0 / tl.sqrt(variance + eps), mask=inside)
    old_mean = tl.load(running_mean + columns, mask=inside, other=0.0)
    old_var = tl.load(running_var + columns, mask=inside, other=0.0)
    unbiased = variance * (M / tl.maximum(M - 1.0, 1.0))
    tl.store(running_mean + columns, old_mean + momentum * (average - old_mean), mask=inside)
    tl.store(running_var + columns, old_var + momentum * (unbiased - old_var), mask=inside)


@triton.jit(do_not_specialize=["M"])
def normalise(
    x, other, y, mean, scale, weight, bias, M, C, slope,
    ACTIVATE: tl.constexpr, ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act((x - mean) * scale * weight + bias), with `other` added before the activation if ADD."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < C
    mask = (rows < M)[:, None] & inside[None, :]
    place = rows[:, None] * C + columns[None, :]
    factor = tl.load(weight + columns, mask=inside, other=0.0) * tl.load(scale + columns, mask=inside, other=0.0)
    centre = tl.load(mean + columns, mask=inside, other=0.0)
    shift = tl.load(bias + columns, mask=inside, other=0.0)
    value = tl.load(x + place, mask=mask, other=0).to(tl.float32)
    value = (value - centre[None, :]) * factor[None, :] + shift[None, :]
    if ADD:
        value += tl.load(other + place, mask=mask, other=0).to(tl.float32)
    if ACTIVATE:
        value = _activated(value, slope)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "rows_each"])
def gradient_sums(
    x, y, dy, partial, mean, scale, weight, bias, M, C, rows_each, slope,
    ACTIVATE: tl.constexpr, ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of its rows, the sums of dz and of dz * (x - mean) * scale, z what is activated: (2, programs, C).

    The side of the activation is computed again from x, or read from y where something was added.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < C
    rate = tl.load(scale + columns, mask=inside, other=0.0)[None, :]
    gain = tl.load(weight + columns, mask=inside, other=0.0)[None, :]
    centre = tl.load(mean + columns, mask=inside, other=0.0)[None, :]
    shift = tl.load(bias + columns, mask=inside, other=0.0)[None, :]
    plain = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    weighted = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    first = program.to(tl.int64) * rows_each
    for start in range(0, rows_each, BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & inside[None, :]
        place = rows[:, None] * C + columns[None, :]
        value = tl.load(x + place, mask=mask, other=0).to(tl.float32) - centre
        gradient = tl.load(dy + place, mask=mask, other=0).to(tl.float32)
        if ADD:
            gradient = tl.where(tl.load(y + place, mask=mask, other=0).to(tl.float32) > 0, gradient, gradient * slope)
        elif ACTIVATE:
            gradient = tl.where(value * (gain * rate) + shift > 0, gradient, gradient * slope)
        plain += gradient
        weighted += gradient * (value * rate)
    place = partial + program * C + columns
    tl.store(place, tl.sum(plain, 0), mask=inside)
    tl.store(place + programs * C, tl.sum(weighted, 0), mask=inside)


@triton.jit(do_not_specialize=["programs"])
def added_up(partial, sums, C, programs, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """(2, programs, C) -> (2, C)."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    which = tl.program_id(1)
    inside = columns < C
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, programs, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        mask = (rows < programs)[:, None] & inside[None, :]
        total += tl.load(partial + (which * programs + rows[:, None]) * C + columns[None, :], mask=mask, other=0.0)
    tl.store(sums + which * C + columns, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=["M"])
def input_gradient(
    x, y, dy, dx, dother, sums, mean, scale, weight, bias, M, C, slope,
    ACTIVATE: tl.constexpr, ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = scale * weight * (dz - mean(dz) - xhat * mean(dz * xhat)); what was added gets dz."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < C
    mask = (rows < M)[:, None] & inside[None, :]
    place = rows[:, None] * C + columns[None, :]
    rate = tl.load(scale + columns, mask=inside, other=0.0)[None, :]
    factor = tl.load(weight + columns, mask=inside, other=0.0)[None, :] * rate
    centre = tl.load(mean + columns, mask=inside, other=0.0)[None, :]
    plain = tl.load(sums + columns, mask=inside, other=0.0)[None, :] / M
    weighted = tl.load(sums + C + columns, mask=inside, other=0.0)[None, :] / M
    value = tl.load(x + place, mask=mask, other=0).to(tl.float32) - centre
    gradient = tl.load(dy + place, mask=mask, other=0).to(tl.float32)
    if ADD:
        gradient = tl.where(tl.load(y + place, mask=mask, other=0).to(tl.float32) > 0, gradient, gradient * slope)
        tl.store(dother + place, gradient.to(dother.dtype.element_ty), mask=mask)
    elif ACTIVATE:
        shift = tl.load(bias + columns, mask=inside, other=0.0)[None, :]
        gradient = tl.where(value * factor + shift > 0, gradient, gradient * slope)
    value = factor * (gradient - plain - value * rate * weighted)
    tl.store(dx + place, value.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "H", "W", "HO", "WO"])
def pooled(
    x, y, place_of, M, C, H, W, HO, WO,
    K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Maxima of K x K windows, S apart, P pixels of border; place_of: which of a window's K * K pixels it was (uint8).

    M output pixels. The first of equals is taken, and NaN wins, as in torch.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < C
    mask = (rows < M)[:, None] & inside[None, :]
    image, top, left = rows // (HO * WO), rows // WO % HO * S - P, rows % WO * S - P
    best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK_M, BLOCK_C), tl.int32)
    for i in tl.static_range(K):
        for j in tl.static_range(K):
            row, column = top + i, left + j
            within = (row >= 0) & (row < H) & (column >= 0) & (column < W)
            source = ((image * H + row) * W + column)[:, None] * C + columns[None, :]
            value = tl.load(x + source, mask=mask & within[:, None], other=float("-inf")).to(tl.float32)
            better = (value > best) | (value != value)
            best = tl.where(better, value, best)
            place = tl.where(better, i * K + j, place)
    out = rows[:, None] * C + columns[None, :]
    tl.store(y + out, best.to(y.dtype.element_ty), mask=mask)
    tl.store(place_of + out, place.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["M", "H", "W", "HO", "WO"])
def pooled_gradient(
    dy, place_of, dx, M, C, H, W, HO, WO,
    K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """For each of the M input pixels, the gradients of the windows whose maximum it was, in a fixed order."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < C
    mask = (rows < M)[:, None] & inside[None, :]
    image, row, column = rows // (H * W), rows // W % H, rows % W
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for i in tl.static_range(K):
        for j in tl.static_range(K):
            above, before = row + P - i, column + P - j  # S times the window's place, if it is one
            reached = (above >= 0) & (above % S == 0) & (above // S < HO)
            reached = reached & (before >= 0) & (before % S == 0) & (before // S < WO)
            source = ((image * HO + above // S) * WO + before // S)[:, None] * C + columns[None, :]
            valid = mask & reached[:, None]
            chosen = tl.load(place_of + source, mask=valid, other=255) == i * K + j
            total += tl.where(chosen, tl.load(dy + source, mask=valid, other=0).to(tl.float32), 0.0)
    tl.store(dx + rows[:, None] * C + columns[None, :], total.to(dx.dtype.element_ty), mask=mask)
