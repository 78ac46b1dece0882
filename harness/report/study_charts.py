"""Drawings of a search: parallel coordinates, slices through the varied settings, bars of importance.

In the manner of harness.report.charts: inline SVG, colours by class, every text escaped. Parallel coordinates lie on their
side, one axis under the other, because the names of settings are long and a telephone is narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from harness.report.charts import WIDTH, Look, Scale, _c, _path, _svg, cut, number, padded, ticks
from harness.studies import MethodSearch, Trial
from harness.study_slices import at, share, values, written

GOOD = 4  # one completed trial in so many is drawn strongly
_AXIS = 40  # from one parallel axis to the next
_EDGE = 8
_PANEL_WIDTH, _PANEL_HEIGHT, _PANEL_INNER = 172, 122, 72
_LEFT, _BAR = 42, 30


def parallel(found: MethodSearch, value: Callable[[Trial], float], title: str, name: str, style: Look) -> Markup:
    """One line per completed trial through its value and its settings; the best quarter strong, the best one apart.

    value: what the first axis shows of a trial; title: of that axis; name: of the drawing
    """
    trials = sorted(found.complete, key=lambda trial: trial.value or 0.0)
    if not trials:
        return Markup("")
    left, right = _EDGE, WIDTH - _EDGE
    across = Scale(*padded(map(value, trials), 0.02), left, right)
    heights = [_AXIS * (place + 1) - 8 for place in range(1 + len(found.space))]
    lines = []
    for place, trial in enumerate(trials):
        spots = [(across(value(trial)), float(heights[0]))]
        spots += [(left + (right - left) * share(facts, trial.params[key]), float(height))
                  for height, (key, facts) in zip(heights[1:], found.space.items(), strict=True)
                  if key in trial.params]  # fmt: skip
        rank = len(trials) - place
        kind = "trial best" if rank == 1 else "trial good" if rank <= len(trials) / GOOD else "trial"
        words = f"trial {trial.number}: {number(value(trial))}"
        lines.append(f'<path class="{kind}" d="{_path(spots)}"><title>{escape(words)}</title></path>')
    low, high = (number(float(f"{bound:.4g}")) for bound in (across.low, across.high))
    axes = [_axis(heights[0], title, f"{low} to {high}")]
    for height, (key, facts) in zip(heights[1:], found.space.items(), strict=True):
        known = values(facts)
        axes.append(_axis(height, key, _range(facts), [left + (right - left) * share(facts, v) for v in known]))
    body = [f'<g class="{style.colour}">{"".join(lines)}</g>', *axes]
    return _svg(WIDTH, heights[-1] + 10, name, body, "chart")


def _axis(height: float, title: str, bounds: str, marks: Sequence[float] = ()) -> str:
    shown = cut(title, 30)
    at_right = cut(bounds, max(8, 58 - len(shown)))
    notches = "".join(f"M{_c(x)} {height - 4}v8" for x in marks)
    return (f'<path class="axis" d="M{_EDGE} {height}H{WIDTH - _EDGE}{notches}"/>'
            f'<text class="over" x="{_EDGE}" y="{height - 8}">{escape(shown)}<title>{escape(title)}</title></text>'
            f'<text class="over soft" x="{WIDTH - _EDGE}" y="{height - 8}" text-anchor="end">{escape(at_right)}'
            f"<title>{escape(bounds)}</title></text>")  # fmt: skip


def _range(facts: Mapping[str, Any]) -> str:
    """`0.01 to 0.3, log`, or the values in their order from left to right."""
    known = values(facts)
    if known:
        return " | ".join(map(written, known))
    return f"{written(facts['low'])} to {written(facts['high'])}{', log' if facts['log'] else ''}"


def slices(found: MethodSearch, order: Sequence[str], value: Callable[[Trial], float], title: str, name: str,
           style: Look) -> Markup:  # fmt: skip
    """Value against each varied setting of the completed trials, two panels side by side on one scale.

    order: the settings, first ones first
    """
    trials = found.complete
    if not trials or not order:
        return Markup("")
    bounds = padded(value(trial) for trial in trials)
    parts = []
    for place, key in enumerate(order):
        left, top = _LEFT + place % 2 * (_PANEL_WIDTH + 12), 8 + place // 2 * _PANEL_HEIGHT
        y = Scale(*bounds, top + _PANEL_INNER, top)
        parts.append(_panel(found, key, value, left, y, place % 2 == 0, style))
    rows = -(-len(order) // 2)
    height = 8 + rows * _PANEL_HEIGHT
    parts.append(f'<text class="title" transform="translate(9 {_c(height / 2)}) rotate(-90)" text-anchor="middle">'
                 f"{escape(title)}</text>")  # fmt: skip
    return _svg(WIDTH, height, name, parts, "chart")


def _panel(found: MethodSearch, key: str, value: Callable[[Trial], float], left: float, y: Scale, first: bool,
           style: Look) -> str:  # fmt: skip
    facts, right, bottom = found.space[key], left + _PANEL_WIDTH, y.start
    x = Scale(0, 1, left + 6, right - 6)
    parts = []
    for tick in ticks(y.low, y.high, 4):
        parts.append(f'<path class="grid" d="M{left} {_c(y(tick))}H{right}"/>')
        if first:
            parts.append(f'<text x="{left - 5}" y="{_c(y(tick) + 4)}" text-anchor="end">{number(tick)}</text>')
    best = found.best
    dots = []
    for trial in found.complete:
        if key in trial.params:
            kind, radius = ("mark", 4.2) if trial is best else ("small", 2.8)
            words = f"trial {trial.number}: {number(value(trial))} at {written(trial.params[key])}"
            dots.append(f'<circle class="{kind}" cx="{_c(x(share(facts, trial.params[key])))}" cy="{_c(y(value(trial)))}" '
                        f'r="{radius}"><title>{escape(words)}</title></circle>')  # fmt: skip
    parts += [
        f'<path class="axis" d="M{left} {_c(bottom)}H{right}"/>',
        f'<g class="{style.colour}">{"".join(dots)}</g>',
    ]
    parts += _marks(facts, x, bottom)
    parts.append(f'<text class="title" x="{_c((left + right) / 2)}" y="{_c(bottom + 32)}" text-anchor="middle">'
                 f"{escape(cut(key, 26))}<title>{escape(key)}</title></text>")  # fmt: skip
    return "".join(parts)


def _marks(facts: Mapping[str, Any], x: Scale, bottom: float) -> list[str]:
    """Values of a choice under their places; of a range its ends and its middle."""
    known = values(facts)
    if known:
        room = max(1, int((x.end - x.start) / len(known) / 6.5))
        places = [(share(facts, one), cut(written(one), room), "middle") for one in known]
    else:
        sides = ((0.0, "start"), (0.5, "middle"), (1.0, "end"))
        places = [(place, written(float(f"{at(facts, place):.2g}")), side) for place, side in sides]
    return [f'<path class="axis" d="M{_c(x(place))} {_c(bottom)}v4"/><text x="{_c(x(place))}" y="{_c(bottom + 16)}" '
            f'text-anchor="{side}">{escape(text)}</text>' for place, text, side in places]  # fmt: skip


def bars(shares: Mapping[str, float], name: str, style: Look) -> Markup:
    """A bar for each share of 1, its name above it. shares: as they are to be drawn"""
    if not shares:
        return Markup("")
    most, right = max(max(shares.values()), 1e-9), WIDTH - 46
    parts = []
    for place, (key, portion) in enumerate(shares.items()):
        top = place * _BAR
        width = max(1.0, right * portion / most)
        parts.append(f'<text x="0" y="{top + 12}">{escape(cut(key, 44))}<title>{escape(key)}</title></text>'
                     f'<g class="{style.colour}"><path class="bar" d="M0 {top + 16}h{_c(width)}v9h{_c(-width)}z"/></g>'
                     f'<text x="{_c(width + 6)}" y="{top + 25}">{100 * portion:.0f}%</text>')  # fmt: skip
    return _svg(WIDTH, _BAR * len(shares), name, parts, "chart")


__all__ = ["bars", "parallel", "slices"]
