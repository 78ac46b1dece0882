"""Charts: axes hold what they show, labels never cover each other, fronts agree with the definition."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.report import charts
from harness.report.charts import Look, Series, Spot

VALUES = st.floats(-1e6, 1e6, allow_nan=False)


@given(VALUES, st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_are_round_and_inside(low: float, width: float, count: int) -> None:
    found = charts.ticks(low, low + width, count)
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in found)
    assert len(found) <= count + 1
    for one, other in itertools.pairwise(found):
        step = other - one
        mantissa = step / 10 ** (len(str(int(step))) - 1) if step >= 1 else float(f"{step:e}".split("e")[0])
        assert any(mantissa == pytest.approx(m, rel=1e-4) for m in (1, 2, 5, 10))


@given(st.lists(st.floats(0, 300), min_size=1, max_size=20))
def test_spread_labels_keep_order_distance_and_bounds(places: list[float]) -> None:
    places = sorted(places)
    found = charts.spread(places, 12.5, 0, 300)
    assert len(found) == len(places)
    assert all(b - a >= 12.5 - 1e-6 for a, b in itertools.pairwise(found))
    assert found[0] >= -1e-6 and found[-1] <= 300 + 1e-6


def test_labels_with_room_stay_where_they_are() -> None:
    assert charts.spread([10, 50, 90], 12.5, 0, 100) == [10, 50, 90]
    assert charts.spread([49, 51], 12, 0, 100) == [44, 56]  # around their common middle


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=30))
def test_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    naive = {
        (cost, value) for cost, value in points
        if not any((c <= cost and v >= value) and (c, v) != (cost, value) for c, v in points)
    }  # fmt: skip
    assert set(charts.pareto(points)) == naive


@given(st.lists(VALUES, min_size=1, max_size=10), st.lists(st.tuples(VALUES, VALUES), max_size=5))
def test_the_axis_of_strips_shows_every_value(values: list[float], intervals: list[tuple[float, float]]) -> None:
    low, high = charts.span(values, [(min(pair), max(pair)) for pair in intervals], zero=True)
    assert low <= min(*values, 0) and high >= max(*values, 0)


def drawn(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def test_a_strip_puts_dots_mean_and_interval_in_their_places() -> None:
    found = drawn(charts.strip([("seed 0", 10.0), ("seed 1", 20.0)], 15.0, (0.0, 30.0), (0.0, 30.0), name="a"))
    dots = [float(dot.attrib["cx"]) for dot in found.iter("circle")]
    inner = charts.STRIP_WIDTH - 10
    assert dots == pytest.approx([5 + inner / 3, 5 + 2 * inner / 3], abs=0.06)
    mean = next(path for path in found.iter("path") if path.attrib["class"] == "mean")
    assert mean.attrib["d"].startswith(f"M{charts.STRIP_WIDTH // 2} ")


def test_a_cut_interval_has_an_arrow_head_and_a_whole_one_a_cap() -> None:
    whole = charts.strip([("s", 5.0)], 5.0, (2.0, 8.0), (0.0, 10.0), name="a")
    cut = charts.strip([("s", 5.0)], 5.0, (2.0, 80.0), (0.0, 10.0), name="a")
    assert whole.count("v8") == 2 and cut.count("v8") == 1 and "l4 4l-4 4" not in whole
    assert "l4 4l-4 4" in cut


def test_values_that_are_not_finite_are_left_out() -> None:
    svg = charts.lines([Series("a", [(1, 1.0), (2, float("nan")), (3, 3.0)], [(1, float("inf"))])], "n", "x", "y")
    assert "nan" not in svg and "inf" not in svg
    path = next(p.attrib["d"] for p in drawn(svg).iter("path") if p.attrib["class"] == "line")
    assert path.count("L") == 1
    assert charts.lines([Series("a", [(1, float("nan"))])], "n", "x", "y") == ""


@pytest.mark.parametrize("count", [1, 9, 25])
def test_names_of_many_series_do_not_overlap(count: int) -> None:
    series = [Series(f"method {k}", [(1, 50.0), (2, 50.0 + 0.01 * k)], look=charts.look(k)) for k in range(count)]
    found = drawn(charts.lines(series, "n", "x", "y"))
    heights = sorted(float(t.attrib["y"]) for t in found.iter("text") if (t.text or "").startswith("method"))
    assert len(heights) == count
    assert all(b - a >= 12 for a, b in itertools.pairwise(heights))
    assert heights[0] > 0 and heights[-1] < float(found.attrib["viewBox"].split()[3])


def test_no_two_of_sixty_methods_look_alike() -> None:
    assert len({charts.look(k) for k in range(60)} | {charts.look(k, grey=True) for k in range(8)}) == 68


def test_costs_of_zero_stand_apart() -> None:
    spots = [Spot("free", 0.0, 80.0), Spot("cheap", 10.0, 81.0), Spot("dear", 1000.0, 82.0)]
    svg = charts.scatter(spots, charts.pareto((s.x, s.y) for s in spots), "n", "x", "y")
    places = {g[0].text: float(g[1].attrib["cx"]) for g in drawn(svg).iter("g") if len(g) == 2 and g[0].tag == "title"}
    assert places["free"] < places["cheap"] < places["dear"]


HOSTILE = "</svg><script>alert(1)</script>\"' onload=x & <b>"


def test_hostile_names_stay_text() -> None:
    pictures = [
        charts.lines([Series(HOSTILE, [(1, 1.0), (2, 2.0)])], HOSTILE, HOSTILE, HOSTILE, x_ticks=[(1.0, HOSTILE)]),
        charts.scatter([Spot(HOSTILE, 1.0, 1.0)], [], HOSTILE, HOSTILE, HOSTILE),
        charts.strip([(HOSTILE, 1.0)], 1.0, None, (0.0, 2.0), name=HOSTILE),
        charts.dots([(0.5, 0.5)], [0], [HOSTILE], HOSTILE),
    ]
    for svg in pictures:
        assert "<script" not in svg and "<b>" not in svg
        root = drawn(svg)  # whole, or this raises
        assert root.attrib["aria-label"] == HOSTILE
        assert not [e for e in root.iter() for name in e.attrib if name.startswith("on")]


def test_dots_lie_where_the_script_looks_for_them() -> None:
    svg = charts.dots([(0.0, 0.0), (1.0, 1.0)], [0, 0], ["a"], "n")
    places = re.findall(r"M([\d.]+) ([\d.]+)h0", svg)
    side, margin = charts.MAP_SIDE, charts.MAP_MARGIN
    assert [(float(x), float(y)) for x, y in places] == [(margin, side - margin), (side - margin, margin)]
    assert Look() == charts.look(0)
