"""The figures of the committed rows, worked out again with pandas and scipy alone, agree to the printed digit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from harness import records
from harness.report import text
from harness.report.assembly import build
from harness.report.boards import Board

ROWS = Path(__file__).resolve().parents[2] / "results" / "studies" / "quick" / "rows"


@pytest.fixture(scope="module")
def boards() -> list[Board]:
    return build(records.load_rows(ROWS))


@pytest.fixture(scope="module")
def plain() -> pd.DataFrame:
    """The rows as they stand in the files, read by json alone."""
    return pd.DataFrame([row for file in ROWS.rglob("*.json") for row in json.loads(file.read_text())["rows"]])


def headline(plain: pd.DataFrame, dataset: str, method: str, evaluator: str) -> pd.Series:
    """Test top-1 per seed at the readout of the best validation value."""
    mine = plain[
        (plain.dataset == dataset)
        & (plain.method == method)
        & (plain.evaluator == evaluator)
        & (plain.metric == "top1")
    ]
    mine = mine.assign(readout=mine.readout.fillna(""))
    wide = mine.pivot(index=["seed", "readout"], columns="split", values="value")
    best = wide.sort_index().groupby("seed").validation.idxmax()
    return wide.test.loc[best].droplevel("readout")


def t_interval(values: np.ndarray) -> tuple[float, float]:
    low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
    return float(low), float(high)


CASES = [(d, e) for d in ("mnist", "fashion_mnist") for e in ("linear_probe", "knn", "fine_tune")]


@pytest.mark.parametrize(("dataset", "evaluator"), CASES)
def test_means_intervals_and_paired_differences(
    boards: list[Board], plain: pd.DataFrame, dataset: str, evaluator: str
) -> None:
    [board] = [b for b in boards if (b.dataset, b.evaluator) == (dataset, evaluator)]
    base = headline(plain, dataset, "random_init", evaluator)
    hog = headline(plain, dataset, "hog", "svm")
    printed = text.markdown([board])
    for method in ("sc", "sc_null", "supervised", "random_init"):
        values = headline(plain, dataset, method, evaluator)
        entry = board.entry(method)
        assert entry.values == pytest.approx(values.to_dict(), abs=0)
        low, high = t_interval(values.to_numpy())
        line = next(line for line in printed.splitlines() if line.startswith(f"| {method} "))
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        assert f"{100 * values.mean():.2f}" in cells
        assert f"{100 * low:.2f} to {100 * high:.2f}" in cells
        assert ", ".join(f"{100 * value:.2f}" for value in values) in cells
        if method == "random_init":
            assert entry.control is None
            continue
        gap = (values - base).to_numpy()
        assert entry.control is not None
        low, high = t_interval(gap)
        assert f"{100 * gap.mean():+.2f}" in cells and f"{100 * low:+.2f} to {100 * high:+.2f}" in cells
        assert entry.control.p == pytest.approx(stats.ttest_rel(values, base).pvalue)
        flips = stats.permutation_test((gap,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
        assert entry.control.sign_flip_p == pytest.approx(flips) and entry.control.sign_flip_floor == 0.25
        assert entry.floor is not None and entry.floor.other == board.best_floor == "hog"
        assert entry.floor.values == pytest.approx((values - hog).to_dict())
        above = t_interval((values - hog).to_numpy())[0] > 0
        assert entry.works is (None if entry.unconverged else above)
    null = board.entry("sc").null
    assert null is not None
    apart = headline(plain, dataset, "sc", evaluator) - headline(plain, dataset, "sc_null", evaluator)
    assert null.values == pytest.approx(apart.to_dict()) and (null.low, null.high) == pytest.approx(
        t_interval(apart.to_numpy())
    )


def test_cost_and_convergence_are_those_of_the_rows(boards: list[Board], plain: pd.DataFrame) -> None:
    [board] = [b for b in boards if (b.dataset, b.evaluator) == ("fashion_mnist", "fine_tune")]
    mine = plain[(plain.dataset == "fashion_mnist") & (plain.method == "sc")]
    tuned = mine[(mine.evaluator == "fine_tune") & (mine.split == "test") & (mine.metric == "top1")]
    cost = board.entry("sc").cost
    assert cost.images_seen == tuned.images_seen.mean() and cost.peak_memory_bytes == tuned.peak_memory_bytes.max()
    assert cost.images_per_second == pytest.approx(tuned.images_per_second.mean())
    assert cost.evaluation_seconds == pytest.approx(tuned.device_seconds.mean())
    pretext = mine[mine.evaluator == "pretext"].groupby("seed").device_seconds.first()
    assert cost.pretrain_seconds == pytest.approx(pretext.mean())
    assert board.entry("sc").unconverged == tuple(sorted(tuned[tuned.converged.eq(False)].seed))
    control = board.entry("sc").control
    assert control is not None and control.verdict == "invalid"


def test_every_committed_measurement_is_on_a_board(boards: list[Board], plain: pd.DataFrame) -> None:
    shown = {(b.dataset, e.method, e.evaluator, seed) for b in boards for e in b.entries for seed in e.values}
    test = plain[(plain.split == "test") & (plain.metric == "top1")]
    assert shown == set(test[["dataset", "method", "evaluator", "seed"]].itertuples(index=False, name=None))
