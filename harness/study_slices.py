"""Where in the range of each varied setting a search found its good values: by thirds, or by value where there are few."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from harness.studies import MethodSearch

MOST_VALUES = 5  # of a whole-number range that are told apart one by one


@dataclass(frozen=True)
class Part:
    """A part of a setting's range. count: completed trials in it; best, mean: of their values"""

    name: str
    count: int
    best: float
    mean: float


@dataclass(frozen=True)
class Slice:
    """One varied setting and the parts of its range that completed trials lie in."""

    key: str
    parts: tuple[Part, ...]


def slices(found: MethodSearch) -> list[Slice]:
    """Every varied setting of a search, in the order of its importance where that is known."""
    order = [*found.importance, *(key for key in found.space if key not in found.importance)]
    return [Slice(key, _parts(found, key)) for key in order if key in found.space]


def _parts(found: MethodSearch, key: str) -> tuple[Part, ...]:
    facts = found.space[key]
    known = values(facts)
    groups: dict[int, list[float]] = {}
    for trial in found.complete:
        if key in trial.params and trial.value is not None:
            value = trial.params[key]
            place = known.index(value) if value in known else min(2, int(3 * share(facts, value)))
            groups.setdefault(place, []).append(trial.value)
    return tuple(Part(written(known[place]) if known else _third(facts, place), len(group), max(group), fmean(group))
                 for place, group in sorted(groups.items()))  # fmt: skip


def values(facts: Mapping[str, Any]) -> list[Any]:
    """The values of a range that has few, else none. facts: as of harness.search_space.Dimension.facts"""
    if "values" in facts:
        return list(facts["values"])
    few = facts["whole"] and facts["high"] - facts["low"] < MOST_VALUES
    return list(range(int(facts["low"]), int(facts["high"]) + 1)) if few else []


def share(facts: Mapping[str, Any], value: Any) -> float:
    """Where in its range a value lies, 0 to 1; of a choice the middles of equal parts."""
    if "values" in facts:
        return (facts["values"].index(value) + 0.5) / len(facts["values"])
    low, high = facts["low"], facts["high"]
    if facts["log"]:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return min(max((value - low) / (high - low), 0.0), 1.0)


def at(facts: Mapping[str, Any], place: float) -> float:
    """The number at a share of a range that is no choice."""
    low, high = facts["low"], facts["high"]
    return float(low * (high / low) ** place if facts["log"] else low + place * (high - low))


def _third(facts: Mapping[str, Any], place: int) -> str:
    return f"{written(at(facts, place / 3))} to {written(at(facts, (place + 1) / 3))}"


def written(value: Any) -> str:
    """A setting's value as it is shown: three significant digits of a number."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


__all__ = ["Part", "Slice", "at", "share", "slices", "values", "written"]
