"""How numbers are written on the page: per cent and points with two digits, a real minus, units that stay short."""

from __future__ import annotations

import math

MINUS = "−"
THIN = "\u202f"  # narrow no-break space


def is_share(metric: str) -> bool:
    """Whether a metric is a fraction of 1 that readers know in per cent."""
    return metric.startswith("top1")


def value(number: float | None, metric: str = "top1") -> str:
    """A measured value: `87.81` (per cent) of a share, else four significant digits."""
    if number is None:
        return "–"
    if is_share(metric):
        return f"{100 * number:.2f}"
    return f"{number:.4g}".replace("-", MINUS)


def points(number: float | None, metric: str = "top1") -> str:
    """A difference with its sign: `+2.57` points of a share."""
    if number is None:
        return "–"
    text = f"{100 * number:+.2f}" if is_share(metric) else f"{number:+.4g}"
    return text.replace("-", MINUS)


def interval(low: float | None, high: float | None, metric: str = "top1", signed: bool = False) -> str:
    """`84.94 to 94.21`; empty where there is none."""
    if low is None or high is None:
        return ""
    write = points if signed else value
    return f"{write(low, metric)} to {write(high, metric)}"


def probability(number: float | None) -> str:
    """A p value: three digits, `<0.001` below."""
    if number is None:
        return "–"
    return "<0.001" if number < 0.001 else f"{number:.3f}"


def count(number: float | None) -> str:
    """A number of things: exact with separators up to 99,999, else with k, M or G."""
    if number is None:
        return "–"
    if abs(number) < 100_000:
        return f"{number:,.0f}"
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{THIN}{sign}"
    raise AssertionError("unreachable")


def seconds(number: float | None) -> str:
    """A duration: seconds, minutes or hours."""
    if number is None:
        return "–"
    for size, sign in ((3600, "h"), (60, "min")):
        if number >= 2 * size:
            return f"{number / size:.3g}{THIN}{sign}"
    return f"{number:.3g}{THIN}s"


def memory(number: float | None) -> str:
    """Bytes in MiB or GiB."""
    if number is None:
        return "–"
    return f"{number / 2**30:.2f}{THIN}GiB" if number >= 2**30 else f"{number / 2**20:.0f}{THIN}MiB"


def raw(number: float | None) -> str:
    """A row's value as it stands, to six significant digits."""
    if number is None or not math.isfinite(number):
        return "–"
    return f"{number:.6g}".replace("-", MINUS)
