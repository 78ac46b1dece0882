"""`harness report` and `harness compare` through the command line, on runs of digits."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

SMALL = ("--dataset", "digits", "--labels", "10pc", "--epochs", "1", "--set", "data.num_pretrain_images=256",
         "--set", "num_threads=1", "--set", "precision=fp32", "--eval", "linear_probe,knn", "--tracking", "none")  # fmt: skip


def harness(*words: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", "from harness.cli import main; main()", *words], cwd=cwd, text=True, capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=280,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rotation beside its controls at seed 0, and at seeds 1 and 2 beside random_init only."""
    folder = tmp_path_factory.mktemp("report")
    harness("run", "--method", "rotation", "--seed", "0", *SMALL, cwd=folder)
    for method in ("rotation", "random_init"):
        harness("run", "--method", method, "--seeds", "1-2", "--no-control", *SMALL, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def rows(workspace: Path) -> pd.DataFrame:
    files = (workspace / "results" / "runs").rglob("*.json")
    return pd.DataFrame([row for file in files for row in json.loads(file.read_text())["rows"]])


def test_the_report_says_what_the_rows_say(workspace: Path, rows: pd.DataFrame) -> None:
    told = harness("report", "--csv", cwd=workspace)
    lines = pd.read_csv(io.StringIO(told.stdout))
    assert set(lines.evaluator) == {"linear_probe", "knn"}
    assert {"rotation", "random_init", "supervised", "pixels", "pixels_svm", "hog"} <= set(lines.method)
    test = rows[(rows.split == "test") & (rows.metric == "top1")]
    for line in lines.to_dict("records"):
        same = (test.method == line["method"]) & (test.evaluator == line["measured_by"]) & (test.seed == line["seed"])
        assert line["value"] == test[same & (test.readout == line["readout"])].value.item()
    probe = lines[(lines.evaluator == "linear_probe") & (lines.method == "rotation")].set_index("seed")
    base = lines[(lines.evaluator == "linear_probe") & (lines.method == "random_init")].set_index("seed")
    gap = probe.value - base.value
    assert gap.to_numpy() == pytest.approx(probe.control_difference.to_numpy()) and len(gap) == 3
    low, high = stats.t.interval(0.95, 2, loc=gap.mean(), scale=stats.sem(gap))
    assert probe.control_low.iloc[0] == pytest.approx(low) and probe.control_high.iloc[0] == pytest.approx(high)
    assert set(probe.verdict) <= {"no winner", "inconclusive", "equivalent"} and not lines.bold.any()
    assert any("missing: seed 1, 2" in flags for flags in lines[lines.method == "hog"].flags)


def test_every_form_is_written(workspace: Path, tmp_path: Path) -> None:
    document = harness(
        "report", "--markdown", "--filter", "evaluator=knn", "--parquet", str(tmp_path / "l.parquet"), cwd=workspace
    )
    assert document.stdout.startswith("# Measured results") and document.stdout.count("\n## ") == 1
    assert "missing: seed 1, 2" in document.stdout and "| rotation | " in document.stdout
    table = pd.read_parquet(tmp_path / "l.parquet")
    assert set(table.evaluator) == {"knn"} and "hog" in set(table.method)
    terminal = harness("report", "--rows", str(workspace / "results" / "runs"), cwd=tmp_path)
    assert "rotation" in terminal.stdout and "minus" in terminal.stdout


def test_mistakes_get_one_line(workspace: Path, tmp_path: Path) -> None:
    for words, message in (
        (("report", "--filter", "dataset=mnist"), "leaves no row"),
        (("report", "--markdown", "--csv"), "give one of them"),
        (("report", "--rows", str(tmp_path)), "no row file"),
        (("compare", "latest", "latest"), "both words name run"),
    ):
        error = harness(*words, cwd=workspace, code=2).stderr
        assert message in error and error.count("\n") == 1 and "Traceback" not in error


def test_an_empty_workspace_is_no_error(tmp_path: Path) -> None:
    assert "no measured evaluation" in harness("report", cwd=tmp_path).stderr


def run_id(rows: pd.DataFrame, method: str, seed: int) -> str:
    return str(rows[(rows.method == method) & (rows.seed == seed)].pretrain_id.iloc[0])


def test_compare_judges_by_test_images(workspace: Path, rows: pd.DataFrame) -> None:
    one, other = run_id(rows, "rotation", 0), run_id(rows, "random_init", 0)
    found: dict[str, Any] = json.loads(harness("compare", one, other[:10], "--json", cwd=workspace).stdout)
    assert (found["one"], found["other"]) == (one, other) and found["scope"] == "same seeds, test-set error only"
    assert found["settings"]["method_name"] == ["rotation", "random_init"] and "seed" not in found["settings"]
    assert found["curves"]["loss"][0] and not found["curves"]["loss"][1] and not found["notes"]
    judged = [r for r in found["readings"] if r["split"] == "test" and r["metric"] == "top1"]
    assert {r["evaluator"] for r in judged} == {"linear_probe", "knn"}
    from harness.registry import load_dataset

    labels = load_dataset("digits")[0](workspace).split("test").labels
    assert labels is not None
    for reading in judged:
        right = []
        for run in (one, other):
            mine = rows[(rows.pretrain_id == run) & (rows.evaluator == reading["evaluator"])]
            stored = workspace / "results" / "runs" / run / f"{mine.eval_id.iloc[0]}.predictions.npz"
            right.append(np.load(stored)[reading["readout"]] == labels.numpy())
        a, b = right
        assert reading["one"] == pytest.approx(a.mean()) and reading["difference"] == pytest.approx(a.mean() - b.mean())
        disagree = int((a & ~b).sum()), int((b & ~a).sum())
        expected = stats.binomtest(disagree[0], sum(disagree)).pvalue if sum(disagree) else 1.0
        assert reading["p"] == pytest.approx(expected)
        spread = (a.astype(float) - b).std() / len(a) ** 0.5  # Wald's interval: nearly the same at 500 images
        assert reading["low"] == pytest.approx(a.mean() - b.mean() - 1.96 * spread, abs=0.006)
        assert reading["high"] == pytest.approx(a.mean() - b.mean() + 1.96 * spread, abs=0.006)


def test_compare_shows_curves_and_says_that_seeds_differ(workspace: Path, rows: pd.DataFrame) -> None:
    printed = harness("compare", run_id(rows, "rotation", 0), run_id(rows, "rotation", 1), cwd=workspace).stdout
    assert "one run each, seeds 0 and 1, test-set error only" in printed
    assert "while pretraining" in printed and any(bar in printed for bar in "▁▂▃▄▅▆▇█")
