"""A tiny real workspace, and boards made from rows without harness.report.assembly: the page is tested by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd
import pytest
from scipy import stats

import harness
from harness.report.boards import Board, Cost, Difference, Entry, Published

BASELINE = "random_init"
ROLES = {"random_init": "control", "pixels": "floor", "hog": "floor", "pixels_svm": "floor", "sc_null": "null control"}


def difference(one: dict[int, float], other: dict[int, float], name: str, reason: str = "3 seeds") -> Difference | None:
    values = {seed: value - other[seed] for seed, value in one.items() if seed in other}
    if not values:
        return None
    low, high = interval(list(values.values()))
    return Difference(name, values, len(values), fmean(values.values()), low, high, 0.25, None, 0.25, 0.25, 0.031, 0.4,
                      "exploratory", reason, False)  # fmt: skip


def interval(values: list[float]) -> tuple[float | None, float | None]:
    if len(values) < 3:
        return None, None
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return fmean(values) - half, fmean(values) + half


def boards_from(rows: pd.DataFrame, **text: Any) -> list[Board]:
    """A board per (data set, labels) of the linear probe's gap readout (a floor's only one); `text` replaces words."""
    rows = rows[(rows.split == "test") & rows.metric.isin(["top1"]) & rows.evaluator.isin(["linear_probe", "svm"])]
    rows = rows[rows.readout.isin(["gap", "hog", "pixels"])]
    boards = []
    for (dataset, labels), here in rows.groupby(["dataset", "labels"]):
        values = {
            m: dict(zip(g.seed.astype(int), g.value.astype(float), strict=True)) for m, g in here.groupby("method")
        }
        floors = [m for m in values if ROLES.get(m) == "floor"]
        best = max(floors, key=lambda m: fmean(values[m].values()), default=None)
        entries = []
        for method, mine in values.items():
            group = here[here.method == method]
            low, high = interval(list(mine.values()))
            runs = {int(s): tuple(g.pretrain_id) for s, g in group.groupby("seed")}
            cost = Cost(float(group.images_seen.mean()), float(group.views_seen.mean()), None, None,
                        None, float(group.peak_memory_bytes.max()), ("cpu",))  # fmt: skip
            entries.append(Entry(
                key=text.get("key", "") + method, method=method, title=text.get("title", method), role=ROLES.get(method, "method"),
                family=text.get("family", "f"), year=2016, tier="ranked", label="", encoder="convnet_small", guest=False,
                evaluator="linear_probe", values=mine, chosen=dict.fromkeys(mine, "gap"), readout=text.get("readout", "gap"),
                readouts={"gap": mine}, metrics={}, mean=fmean(mine.values()), deviation=None, low=low, high=high, cost=cost,
                unconverged=(), collapsed=(), missing=(), flags=(text["flag"],) if "flag" in text else (), runs=runs, settings={},
                control=None if method == BASELINE or BASELINE not in values
                else difference(mine, values[BASELINE], BASELINE, text.get("reason", "3 seeds")),
                floor=None if best in (None, method) else difference(mine, values[best], str(best)),
            ))  # fmt: skip
        entries.sort(key=lambda e: (["method", "null control", "control", "floor"].index(e.role), -e.mean))
        note = text.get("note", "")
        published = (Published("Published", "top1_accuracy_pct", "91.5", "0.2", note or "linear", note or "a source",
                               "2016", "net", "train", "100", note, True),)  # fmt: skip
        boards.append(Board(
            key=f"{dataset}-{labels}", title=text.get("title", f"{dataset}, {labels} labels"), dataset=text.get("dataset", dataset),
            pretrain_data="train", encoder="convnet_small", labels=text.get("labels", labels), evaluator="linear_probe",
            split="test", metric="top1", n_test=int(here.n_test.max()), numbers_version=2, data_sha256="0" * 64,
            data_verified=True, baseline=BASELINE, best_floor=None if best is None else text.get("key", "") + best,
            readouts=("gap",), seeds=tuple(sorted({int(s) for s in here.seed})), facts={"test images": text.get("fact", "500")},
            entries=tuple(entries), warnings=(text.get("warning", "fewer than six seeds"),), published=published,
        ))  # fmt: skip
    return boards


@pytest.fixture(scope="session")
def make_boards() -> Callable[..., list[Board]]:
    return boards_from


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of a method on digits at two label budgets, with an untrained network and the pixels floor: real rows,
    weights, figures and maps."""
    folder = tmp_path_factory.mktemp("report")
    shared: dict[str, Any] = {"dataset": "digits", "epochs": 1, "control": False, "tracking": "none", "workspace": folder,
                              "set": {"num_threads": 1, "precision": "fp32"}}  # fmt: skip
    for labels in ("10pc", "30pc"):
        for method in ("sc", "random_init", "pixels"):
            harness.run(method=method, labels=labels, seeds="0-1", evaluators=["linear_probe"], **shared)
    return folder


@pytest.fixture(scope="session")
def rows(workspace: Path) -> pd.DataFrame:
    return harness.load_results(workspace)
