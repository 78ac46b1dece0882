"""Small inline SVG charts, drawn by hand: strips for table rows, lines, scatter with a Pareto front, dots of a map.

Colours come from the page's style sheet by class (`c0` .. `c7`, after Okabe & Ito, 2008, and `grey`), so that light and
dark pages share one drawing; where colours repeat, the marker's shape and the dash differ. Every chart carries an
accessible name, and every text passes through `escape`. Lengths are user units of a viewBox as wide as a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

COLOURS = SHAPES = 8
WIDTH = 400
_LEFT, _TOP, _BOTTOM = 44, 10, 40
_LINE = 12.5  # least distance between two labels at the right edge


@dataclass(frozen=True)
class Look:
    """How a method is drawn all over the page. colour: a class of the style sheet; shape: marker and dash, 0 to 7."""

    colour: str = "c0"
    shape: int = 0


def look(index: int, grey: bool = False) -> Look:
    """The look of the method at place `index` of its kind: eight colours, then the same with another shape."""
    return Look("grey", index % SHAPES) if grey else Look(f"c{index % COLOURS}", index // COLOURS % SHAPES)


@dataclass(frozen=True)
class Series:
    """A named curve. points: (x, y), x rising; cloud: (x, y) of what the points are means of, as small dots."""

    name: str
    points: Sequence[tuple[float, float]]
    cloud: Sequence[tuple[float, float]] = ()
    look: Look = Look()


@dataclass(frozen=True)
class Spot:
    """A named point of a scatter chart; cloud: the y that it is the mean of, as small dots."""

    name: str
    x: float
    y: float
    cloud: Sequence[float] = ()
    look: Look = Look()


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map of [low, high] to [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (self.end - self.start) * ((at - low) / ((high - low) or 1.0))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers inside [low, high], about `count` of them: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def padded(values: Iterable[float], share: float = 0.06) -> tuple[float, float]:
    """The range of `values` with a margin on both sides; one wide where all are equal."""
    found = list(values)
    low, high = min(found), max(found)
    margin = share * (high - low) or max(abs(high) * 0.05, 0.5)
    return low - margin, high + margin


def span(values: Iterable[float], intervals: Iterable[tuple[float, float]], zero: bool = False) -> tuple[float, float]:
    """The axis of a table's strips: all values, and of the intervals at most the values' own range beyond them.

    Three seeds give intervals many times wider than what was seen; drawn whole, they would squeeze the values into a dot.
    """
    found = [*values, *([0.0] if zero else [])]
    low, high = min(found), max(found)
    reach = (high - low) or max(abs(high) * 0.05, 0.005)
    bounds = [v for pair in intervals for v in pair]
    wide = (max(min([low, *bounds]), low - reach / 2), min(max([high, *bounds]), high + reach / 2))
    return padded(wide, 0.03)


def number(value: float) -> str:
    """A tick's label: as short as it can be, with k, M and G for thousands."""
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{sign}"
    return f"{value:.4g}".replace("-", "−")


# ----------------------------------------------------------------------------------------------------------- strips

STRIP_WIDTH, STRIP_HEIGHT = 240, 26


def strip(
    values: Sequence[tuple[str, float]],
    mean: float,
    interval: tuple[float, float] | None,
    span: tuple[float, float],
    *,
    name: str,
    reference: float | None = None,
    emphasis: bool = False,
) -> Markup:
    """One row of a dot plot: every (label, value) as a dot, the mean as a bar, its interval as a line.

    span: the range of the axis, shared by the rows of a table; reference: a value marked by a vertical rule
    """
    at = _strip_scale(span)
    middle = STRIP_HEIGHT / 2
    parts = []
    if reference is not None and span[0] <= reference <= span[1]:
        parts.append(f'<path class="rule" d="M{_c(at(reference))} 0V{STRIP_HEIGHT}"/>')
    if interval is not None:
        low, high = (min(max(v, span[0]), span[1]) for v in interval)
        parts.append(f'<path class="interval" d="M{_c(at(low))} {middle}H{_c(at(high))}"/>')
        for bound, shown, way in zip(interval, (low, high), (1, -1), strict=True):
            # a cap at an end, an arrow head where the axis cuts the interval off
            end = "m0 -4v8" if bound == shown else f"m{4 * way} -4l{-4 * way} 4l{4 * way} 4"
            parts.append(f'<path class="interval" d="M{_c(at(shown))} {_c(middle)}{end}"/>')
    parts += [
        f'<circle class="dot" cx="{_c(at(value))}" cy="{_c(middle)}" r="3.4"><title>{escape(label)}</title></circle>'
        for label, value in values
    ]
    parts.append(f'<path class="mean{" strong" if emphasis else ""}" d="M{_c(at(mean))} {middle - 8}v16"/>')
    return _svg(STRIP_WIDTH, STRIP_HEIGHT, name, parts, "strip")


def strip_axis(span: tuple[float, float], count: int = 4) -> Markup:
    """The axis above the strips of a table."""
    at = _strip_scale(span)
    parts = []
    for tick in ticks(*span, count):
        x = at(tick)
        anchor = "start" if x < 14 else "end" if x > STRIP_WIDTH - 14 else "middle"
        parts.append(f'<path class="axis" d="M{_c(x)} 14v5"/>')
        parts.append(f'<text x="{_c(x)}" y="11" text-anchor="{anchor}">{number(tick)}</text>')
    parts.append(f'<path class="axis" d="M0 19H{STRIP_WIDTH}"/>')
    return _svg(STRIP_WIDTH, 20, "axis", parts, "strip", hidden=True)


def _strip_scale(span: tuple[float, float]) -> Scale:
    return Scale(span[0], span[1], 5, STRIP_WIDTH - 5)


# ----------------------------------------------------------------------------------------------------------- curves


def lines(
    series: Sequence[Series],
    name: str,
    xlabel: str,
    ylabel: str,
    *,
    log_x: bool = False,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    labelled: bool = True,
    markers: bool = True,
) -> Markup:
    """Named curves with their names at the right ends; points that are not finite are left out.

    x_ticks: (place, label) where the data has its own; labelled: False leaves room for no names (one method's seeds)
    """
    kept = [_finite(s) for s in series]
    kept = [s for s in kept if s.points]
    if not kept:
        return Markup("")
    height = max(250, _TOP + _BOTTOM + int(_LINE * len(kept) * labelled))
    right = WIDTH - (118 if labelled else 12)
    xs = [x for s in kept for x, _ in s.points]
    ys = [y for s in kept for _, y in (*s.points, *s.cloud)]
    x_range = _log_range(xs) if log_x else (min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1)
    x, y = Scale(*x_range, _LEFT + 6, right - 6, log_x), Scale(*padded(ys), height - _BOTTOM, _TOP)
    parts = _frame(x, y, right, height, xlabel, ylabel, x_ticks or [(t, number(t)) for t in ticks(*x_range, 4)])
    for item in kept:
        places = [(x(px), y(py)) for px, py in item.points]
        marks = [f'<path class="line" d="{_path(places)}"{_dash(item.look)}/>']
        marks += [_small(x(px), y(py)) for px, py in item.cloud]
        if markers:
            marks += [_marker(item.look, *place) for place in places]
        parts.append(f'<g class="{item.look.colour}"><title>{escape(item.name)}</title>{"".join(marks)}</g>')
    if labelled:
        ends = [(y(s.points[-1][1]), x(s.points[-1][0]), s.name, s.look) for s in kept]
        parts += _names(ends, right, _TOP + 4, height - _BOTTOM)
    return _svg(WIDTH, height, name, parts, "chart")


def scatter(
    points: Sequence[Spot],
    front: Sequence[tuple[float, float]],
    name: str,
    xlabel: str,
    ylabel: str,
) -> Markup:
    """Named points over a logarithmic x, and a front as steps.

    An x of 0 has no logarithm: such points stand apart at the left, over a tick `0`.
    """
    if not points:
        return Markup("")
    positive = [p.x for p in points if p.x > 0]
    height, right = max(250, _TOP + _BOTTOM + int(_LINE * len(points))), WIDTH - 118
    has_zero = len(positive) < len(points)
    inner = _LEFT + (30 if has_zero else 6)
    x_range = _log_range(positive or [1.0])
    log = Scale(*x_range, inner + 8, right - 8, True)

    def x(value: float) -> float:
        return log(value) if value > 0 else _LEFT + 12

    ys = [p.y for p in points] + [v for p in points for v in p.cloud]
    y = Scale(*padded(ys), height - _BOTTOM, _TOP)
    few = sorted(set(positive))
    marks = [(t, number(float(f"{t:.2g}"))) for t in (few if len(few) <= 3 else _log_ticks(*x_range))]
    parts = _frame(x, y, right, height, xlabel, ylabel, ([(0.0, "0")] if has_zero else []) + marks)
    if has_zero and positive:
        parts.append(f'<path class="grid" d="M{inner} {_TOP}V{height - _BOTTOM}" stroke-dasharray="2 3"/>')
    if front:
        steps = f"M{_c(x(front[0][0]))} {_c(y(front[0][1]))}"
        steps += "".join(f"H{_c(x(px))}V{_c(y(py))}" for px, py in front[1:]) + f"H{right}"
        parts.append(f'<path class="front" d="{steps}"><title>Pareto front</title></path>')
    for point in points:
        place = (x(point.x), y(point.y))
        inside = _marker(point.look, *place)
        inside += "".join(_small(place[0], y(value)) for value in point.cloud)
        parts.append(f'<g class="{point.look.colour}"><title>{escape(point.name)}</title>{inside}</g>')
    ends = [(y(p.y), x(p.x), p.name, p.look) for p in points]
    parts += _names(ends, right, _TOP + 4, height - _BOTTOM)
    return _svg(WIDTH, height, name, parts, "chart")


MAP_SIDE, MAP_MARGIN = 300, 10


def dots(points: Sequence[tuple[float, float]], labels: Sequence[int], classes: Sequence[str], name: str) -> Markup:
    """A feature map: one dot per image at (x, y) in the unit square, y upwards, coloured by class.

    Each class is one path of zero-length strokes; from the ninth class on the dots are square. Up to 20 classes have
    their name at their median.
    """
    inner, margin = MAP_SIDE - 2 * MAP_MARGIN, MAP_MARGIN
    by_class: dict[int, list[tuple[float, float]]] = {}
    for (px, py), label in zip(points, labels, strict=True):
        by_class.setdefault(label, []).append((margin + px * inner, margin + (1 - py) * inner))
    parts, names = [], []
    for label, places in sorted(by_class.items()):
        title = classes[label] if 0 <= label < len(classes) else str(label)
        path = "".join(f"M{_c(x)} {_c(y)}h0" for x, y in places)
        square = " square" if label // COLOURS % 2 else ""
        parts.append(f'<path class="dots c{label % COLOURS}{square}" d="{path}"><title>{escape(title)}</title></path>')
        if len(by_class) <= 20:
            middle = (sorted(p[axis] for p in places)[len(places) // 2] for axis in (0, 1))
            x, y = middle
            names.append(
                f'<text class="halo" x="{_c(x)}" y="{_c(y + 4)}" text-anchor="middle">{escape(cut(title, 12))}</text>'
            )
    parts += names
    parts.append('<circle class="cursor" r="7" visibility="hidden"/>')
    return _svg(MAP_SIDE, MAP_SIDE, name, parts, "map")


# ------------------------------------------------------------------------------------------------------------ parts


def cut(text: str, length: int) -> str:
    """At most `length` characters, with an ellipsis where some are missing."""
    return text if len(text) <= length else text[: length - 1] + "…"


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, value) pairs that no other pair beats: cheapest first, each better than all that cost less."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda pair: (pair[0], -pair[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front


def _svg(width: float, height: float, name: str, parts: Iterable[str], kind: str, hidden: bool = False) -> Markup:
    access = 'aria-hidden="true"' if hidden else f'role="img" aria-label="{escape(name)}"'
    return Markup(f'<svg class="{kind}" viewBox="0 0 {width} {height}" {access}>{"".join(parts)}</svg>')


def _frame(
    x: Callable[[float], float], y: Scale, right: float, height: float, xlabel: str, ylabel: str,
    x_ticks: Sequence[tuple[float, str]],
) -> list[str]:  # fmt: skip
    """Horizontal grid lines, tick labels, the axis and both axis titles."""
    bottom = height - _BOTTOM
    parts = []
    for tick in ticks(y.low, y.high):
        parts.append(f'<path class="grid" d="M{_LEFT} {_c(y(tick))}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{_c(y(tick) + 4)}" text-anchor="end">{number(tick)}</text>')
    last = -math.inf
    for place, text in x_ticks:
        at = x(place)
        parts.append(f'<path class="axis" d="M{_c(at)} {bottom}v4"/>')
        if at - last > 7 * len(text) + 6:  # a label that would touch its neighbour is left out, its tick stays
            parts.append(f'<text x="{_c(at)}" y="{bottom + 16}" text-anchor="middle">{escape(text)}</text>')
            last = at
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    parts.append(
        f'<text class="title" x="{_c((_LEFT + right) / 2)}" y="{height - 6}" text-anchor="middle">{escape(xlabel)}</text>'
    )
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text class="title" transform="translate(11 {_c(middle)}) rotate(-90)" text-anchor="middle">{escape(ylabel)}</text>'
    )
    return parts


def _names(ends: Sequence[tuple[float, float, str, Look]], right: float, top: float, bottom: float) -> list[str]:
    """Names (y, x, text, look) beside the plot, spread so that none covers another, with a hair line to their point."""
    ordered = sorted(ends, key=lambda end: end[0])
    places = spread([y for y, *_ in ordered], _LINE, top, bottom)
    parts = []
    for (y, x, text, style), place in zip(ordered, places, strict=True):
        parts.append(f'<path class="leader" d="M{_c(x + 5)} {_c(y)}L{_c(right + 3)} {_c(place)}h5"/>')
        parts.append(
            f'<g class="{style.colour}">{_marker(style, right + 13, place)}</g>'
            f'<text x="{right + 20}" y="{_c(place + 4)}">{escape(cut(text, 15))}<title>{escape(text)}</title></text>'
        )
    return parts


def spread(places: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Move rising `places` as little as needed, so that they lie `distance` apart inside [low, high] where it has room.

    Labels that would touch become a block around their mean; blocks that touch are joined (pool adjacent violators).
    """
    blocks: list[tuple[float, int]] = []  # (middle, number of labels)

    def start(block: tuple[float, int]) -> float:
        extent = (block[1] - 1) * distance
        return max(low, min(block[0] - extent / 2, high - extent))

    for place in places:
        blocks.append((place, 1))
        while len(blocks) > 1 and start(blocks[-2]) + blocks[-2][1] * distance > start(blocks[-1]):
            (upper, many), (lower, few) = blocks[-2:]
            blocks[-2:] = [((upper * many + lower * few) / (many + few), many + few)]
    return [start(block) + k * distance for block in blocks for k in range(block[1])]


def _marker(style: Look, x: float, y: float) -> str:
    """A circle, square, triangle or diamond around (x, y), filled or, from the fifth shape on, hollow."""
    a = 3.6
    kind = "mark" if style.shape < 4 else "mark hollow"
    if style.shape % 4 == 0:
        return f'<circle class="{kind}" cx="{_c(x)}" cy="{_c(y)}" r="{a}"/>'
    outline = {
        1: f"M{_c(x - a)} {_c(y - a)}h{2 * a}v{2 * a}h{-2 * a}z",
        2: f"M{_c(x)} {_c(y - a - 1)}l{a + 1} {2 * a}h{-2 * a - 2}z",
        3: f"M{_c(x)} {_c(y - a - 1)}l{a + 1} {a + 1}l{-a - 1} {a + 1}l{-a - 1} {-a - 1}z",
    }[style.shape % 4]
    return f'<path class="{kind}" d="{outline}"/>'


def _small(x: float, y: float) -> str:
    return f'<circle class="small" cx="{_c(x)}" cy="{_c(y)}" r="1.7"/>'


def _dash(style: Look) -> str:
    pattern = ("", "6 3", "2 2", "8 2 2 2", "10 3", "4 4", "1 3", "6 2 1 2 1 2")[style.shape]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def _finite(series: Series) -> Series:
    points, cloud = (
        [p for p in some if math.isfinite(p[0]) and math.isfinite(p[1])] for some in (series.points, series.cloud)
    )
    return Series(series.name, points, cloud, series.look)


def _log_range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low / 1.6, high * 1.6) if high < 1.2 * low else (low, high)


def _log_ticks(low: float, high: float) -> list[float]:
    steps = (1, 2, 5) if high / low < 300 else (1,)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [m * 10.0**k for k in range(first, last + 1) for m in steps if low <= m * 10.0**k <= high]


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_c(x)} {_c(y)}" for x, y in places)


def _c(value: float) -> str:
    """A coordinate with one digit behind the point, without a trailing zero."""
    return f"{value:.1f}".removesuffix(".0")
