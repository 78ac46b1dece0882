"""The paper's tables: published numbers beside rows, and what is said below them."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from harness import reproduction
from harness.contracts import Row
from harness.grid_files import load_grid
from harness.reproduction import TABLES, compare, published


def row(method: str, seed: int, value: float, labels: str = "all", evaluator: str = "fine_tune", **words: Any) -> Row:
    fields: dict[str, Any] = dict.fromkeys(Row.model_fields)
    fields |= {
        "method": method, "seed": seed, "value": value, "labels": labels, "evaluator": evaluator, "split": "test",
        "metric": "top1", "config": {}, "dataset": "d", "data_sha256": "0", "data_verified": True, "pretrain_data": "train",
        "encoder": "e", "pretrain_id": f"{method}{seed}", "eval_id": f"{evaluator}{labels}", "steps": 1, "images_seen": 1,
        "views_seen": 1, "device": "cpu", "precision": "fp32", "num_threads": 1, "deterministic": False, "torch_version": "2",
        "harness_version": "0", "code_sha256": "0", "numbers_version": 2, "started_at": "", "finished_at": "",
        "status": "FINISHED", "converged": True,
    }  # fmt: skip
    return Row(**fields | words)


PAIR = {"sc": (0.99, 0.98, 0.985), "random_init": (0.97, 0.98, 0.96)}


def pair(**words: Any) -> list[Row]:
    return [row(method, seed, value, **words) for method, values in PAIR.items() for seed, value in enumerate(values)]


@pytest.mark.parametrize(
    ("name", "unit", "sc", "without"),
    [("table1", "accuracy", 81.34, 72.6), ("table2", "accuracy", 79.2, 72.4), ("table3", "error", 0.34, 0.63)],
)
def test_published_numbers_are_those_of_the_paper(name: str, unit: str, sc: float, without: float) -> None:
    found, rows = published(TABLES[name])
    values = {row.name: row.value for row in rows}
    assert found == unit
    assert values["Spatial contrasting initialization"] == sc
    assert values["Same model without initialization"] == without


def test_the_measured_column_is_in_the_tables_unit() -> None:
    comparison = compare(TABLES["table3"], "full", pair())
    line = next(line for line in comparison.lines if line.name == "Spatial contrasting initialization")
    errors = [100 * (1 - value) for value in PAIR["sc"]]
    assert line.measured["all"].mean == pytest.approx(fmean(errors))
    assert line.measured["all"].deviation == pytest.approx(stdev(errors))
    differences = [100 * (b - a) for a, b in zip(PAIR["sc"], PAIR["random_init"], strict=True)]
    assert comparison.gains["all"].mean == pytest.approx(fmean(differences))
    accuracy = compare(TABLES["table1"], "full", pair())
    assert accuracy.gains["all"].mean == pytest.approx(-fmean(differences))
    text = "\n".join(reproduction.remarks(comparison))
    assert "paired over 3 seeds: -1.50 points of error, 95% interval" in text and "below 6 seeds no winner" in text
    table = {cells[0]: cells[1:] for cells in reproduction.cells(comparison)}
    assert table["Spatial contrasting initialization"] == ["0.34 ± 0.02", "1.50 ± 0.50 (n = 3)"]
    assert table["DropConnect"] == ["0.21", ""]


def test_an_unconverged_arm_claims_no_difference() -> None:
    rows = [
        r.model_copy(update={"converged": False}) if (r.method, r.seed) == ("random_init", 1) else r for r in pair()
    ]
    comparison = compare(TABLES["table3"], "full", rows)
    assert comparison.gains == {}
    assert "had not converged in some seed (!), so no difference is claimed" in "\n".join(
        reproduction.remarks(comparison)
    )
    table = {cells[0]: cells[2] for cells in reproduction.cells(comparison)}
    assert table["Same model without initialization"].endswith(" !")


def test_readouts_null_control_and_floors_are_extras_below_the_published_lines() -> None:
    rows = pair() + [row("sc", 0, 0.9, evaluator="linear_probe", readout=name) for name in ("gap", "spatial")]
    rows += [
        row("sc_null", 0, 0.8),
        row("hog", 0, 0.7, evaluator="svm", readout="hog"),
        row("sc", 0, 0.1, evaluator="knn"),
    ]
    names = [cells[0] for cells in reproduction.cells(compare(TABLES["table2"], "quick", rows))]
    extras = ["sc, linear probe, gap", "sc, linear probe, spatial", "sc_null, fine-tuned", "hog, kernel machine"]
    assert names[-4:] == extras
    assert "Baseline convnet (independent replication) (not the paper's)" in names


@pytest.mark.parametrize("name", TABLES)
def test_what_differs_is_printed_and_the_quick_scale_says_what_it_is_not(name: str) -> None:
    quick, full = (compare(TABLES[name], scale, pair()) for scale in ("quick", "full"))  # type: ignore[arg-type]
    assert "NOT the table's own budget" in reproduction.title(quick)
    assert any("NOT the table's own budget" in text for text in reproduction.remarks(quick))
    assert "NOT" not in reproduction.title(full)
    assert any("reconstruction" in text or "replication" in text for text in reproduction.remarks(full))
    for scale in ("quick", "full"):
        assert load_grid(TABLES[name].grid(scale))["methods"] == ("sc",)  # type: ignore[arg-type]


def test_missing_data_says_how_to_fetch_it_and_a_wrong_table_what_there_is(forks: Any, tmp_path: Path) -> None:
    done = forks.run("reproduce", "table1", "--data-dir", "nowhere", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "harness data fetch stl10 --data-dir nowhere" in done.stderr and done.stderr.count("\n") == 1
    done = forks.run("reproduce", "table9", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "did you mean" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_table_from_tiny_files_end_to_end(
    tmp_path: Path, published_formats: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grid's settings are replaced by tiny ones; everything else is the command's own path."""
    from harness import cli, grid_files
    from harness.config import Recipe

    published_formats.write_idx(tmp_path / "data", np.random.default_rng(0), 120, 30)
    tiny = grid_files.load_grid("paper-table3-quick") | {
        "labels": ("5pc",), "seeds": "10-10", "evaluators": ("linear_probe", "fine_tune"),
    }  # fmt: skip
    run = {
        "epochs": 1,
        "num_threads": 1,
        "batch_size": 8,
        "eval.fine_tune.min_steps": 2,
        "data.num_pretrain_images": None,
    }
    tiny["recipes"] = (*tiny["recipes"], Recipe("tiny", run, {}))
    monkeypatch.setattr(grid_files, "load_grid", lambda name: tiny)
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    words = ["reproduce", "table3", "--data-dir", str(tmp_path / "data"), "--tracking", "none", "--publish", str(out)]
    assert not cli.app(words, standalone_mode=False)
    text = (out / "README.md").read_text()
    assert "NOT the table's own budget" in text and "| Spatial contrasting initialization | 0.34 ± 0.02 |" in text
    stored = [json.loads(path.read_text()) for path in (out / "rows").glob("*/*.json")]
    methods = {document["rows"][0]["method"] for document in stored}
    assert {"sc", "sc_null", "random_init", "supervised", "pixels", "pixels_svm", "hog"} <= methods
    assert "NOT the published files" in text
