"""`harness report` and `harness compare` through the command line, on runs of digits."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from harness import run
from harness.cli import app
from harness.contracts import HarnessError
from harness.registry import load_dataset

SMALL: dict[str, Any] = {
    "dataset": "digits", "labels": "10pc", "epochs": 1, "control": False, "tracking": "none", "precision": "fp32",
    "num_threads": 1, "evaluators": ["linear_probe", "knn"], "set": {"data.num_pretrain_images": 256},
}  # fmt: skip


def invoke(*words: str, cwd: Path) -> str:
    """What a command prints, run in this process."""
    done = CliRunner().invoke(app, [*words, "--workspace", str(cwd)])
    if done.exception is not None:
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rotation and random_init at three seeds, HOG at one."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.run_figures._add", lambda *_, **__: None)  # no pictures here
        for method, seeds in (("hog", [0]), ("random_init", [0, 1, 2]), ("rotation", [0, 1, 2])):
            run(method, workspace=folder, seeds=seeds, **SMALL)
    return folder


@pytest.fixture(scope="module")
def rows(workspace: Path) -> pd.DataFrame:
    files = (workspace / "results" / "runs").rglob("*.json")
    return pd.DataFrame([row for file in files for row in json.loads(file.read_text())["rows"]])


def test_the_report_says_what_the_rows_say(workspace: Path, rows: pd.DataFrame) -> None:
    lines = pd.read_csv(io.StringIO(invoke("report", "--csv", cwd=workspace)))
    assert set(lines.evaluator) == {"linear_probe", "knn"}
    assert {"rotation", "random_init", "hog"} == set(lines.method)
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
    assert any("missing: seed 1, 2" in flags for flags in lines[lines.method == "hog"]["flags"])


def test_every_form_is_written(workspace: Path, tmp_path: Path) -> None:
    file = tmp_path / "lines.parquet"
    document = invoke("report", "--markdown", "--filter", "evaluator=knn", "--parquet", str(file), cwd=workspace)
    assert "# Measured results" in document and document.count("\n## ") == 1
    assert "missing: seed 1, 2" in document and "| rotation | " in document
    table = pd.read_parquet(file)
    assert set(table.evaluator) == {"knn"} and "hog" in set(table.method)
    assert r"\toprule" in invoke("report", "--latex", "--primary", "rotation", cwd=workspace)
    terminal = invoke("report", "--rows", str(workspace / "results" / "runs"), cwd=tmp_path)
    assert "rotation" in terminal and "minus" in terminal


def test_mistakes_get_one_line(forks: Any, workspace: Path, tmp_path: Path) -> None:
    for words, message in (
        (("report", "--filter", "dataset=mnist"), "leaves no row"), (("report", "--rows", str(tmp_path)), "no row file"),
        (("compare", "latest", "latest"), "both words name run"),
    ):  # fmt: skip
        with pytest.raises(HarnessError, match=message):
            invoke(*words, cwd=workspace)
    done = forks.run("report", "--filter", "sead=1", cwd=workspace)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "did you mean seed" in done.stderr


def test_an_empty_workspace_is_no_error(forks: Any, tmp_path: Path) -> None:
    done = forks.run("report", cwd=tmp_path)
    assert done.returncode == 0 and "no measured evaluation" in done.stderr and done.stdout == ""


def run_id(rows: pd.DataFrame, method: str, seed: int) -> str:
    return str(rows[(rows.method == method) & (rows.seed == seed)].pretrain_id.iloc[0])


def test_compare_judges_by_test_images(workspace: Path, rows: pd.DataFrame) -> None:
    one, other = run_id(rows, "rotation", 0), run_id(rows, "random_init", 0)
    found: dict[str, Any] = json.loads(invoke("compare", one, other[:10], "--json", cwd=workspace))
    assert (found["one"], found["other"]) == (one, other) and found["scope"] == "same seeds, test-set error only"
    assert found["settings"]["method_name"] == ["rotation", "random_init"] and "seed" not in found["settings"]
    assert found["curves"]["loss"][0] and not found["curves"]["loss"][1] and not found["notes"]
    judged = [r for r in found["readings"] if r["split"] == "test" and r["metric"] == "top1"]
    assert {r["evaluator"] for r in judged} == {"linear_probe", "knn"}
    labels = load_dataset("digits")[0](workspace).split("test").labels
    assert labels is not None
    for reading in judged:
        right = []
        for word in (one, other):
            mine = rows[(rows.pretrain_id == word) & (rows.evaluator == reading["evaluator"])]
            stored = workspace / "results" / "runs" / word / f"{mine.eval_id.iloc[0]}.predictions.npz"
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
    printed = invoke("compare", run_id(rows, "rotation", 0), run_id(rows, "rotation", 1), cwd=workspace)
    assert "one run each, seeds 0 and 1, test-set error only" in printed
    assert "while pretraining" in printed and any(bar in printed for bar in "▁▂▃▄▅▆▇█")
