"""What the runner keeps, repeats and refuses: every row that was lost comes back, nothing stale is returned."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

import harness
import harness.contracts
from harness import records

FAST: dict[str, Any] = {"epochs": 1, "labels": "10pc", "control": False, "tracking": "none", "evaluators": ["knn"]}
FIXED = {"num_threads": 1, "precision": "fp32"}


def run(workspace: Path, **changes: Any) -> pd.DataFrame:
    settings = {**FAST, **changes}
    return harness.run(method=settings.pop("method", "sc"), dataset=settings.pop("dataset", "digits"), workspace=workspace,
                       set={**FIXED, **settings.pop("set", {})}, **settings)  # fmt: skip


def test_a_lost_or_damaged_row_file_is_made_again(tmp_path: Path) -> None:
    first = run(tmp_path)
    assert (first.evaluator == "pretext").any()
    for path in records.runs_folder(tmp_path).rglob("*.json"):
        path.write_bytes(path.read_bytes().replace(b'"value": 0', b'"value": 1') + b" ")
    predictions = next(records.runs_folder(tmp_path).rglob("*.npz"))
    predictions.write_bytes(b"x")
    with pytest.warns(UserWarning, match="is damaged and ignored"):
        again = run(tmp_path)
    keys = ["evaluator", "readout", "split", "metric", "value"]
    assert (
        again[keys].astype(str).sort_values(keys).to_numpy().tolist()
        == first[keys].astype(str).sort_values(keys).to_numpy().tolist()
    )
    assert predictions.read_bytes() != b"x"


def test_a_non_finite_pretraining_stays_a_failure(tmp_path: Path) -> None:
    broken = {"set": {"optim.lr": 1e38, "method.distance": "squared"}}
    first = run(tmp_path, **broken)
    assert set(first.status) == {"NONFINITE"} and set(first.metric) == {"status"} and first.value.isna().all()
    for path in records.runs_folder(tmp_path).rglob("*.json"):
        path.unlink()  # as if the process had died between the weights and the row
    assert set(run(tmp_path, **broken).status) == {"NONFINITE"}
    assert set(run(tmp_path, **broken).status) == {"NONFINITE"}


def test_one_non_finite_evaluation_does_not_hide_the_others(tmp_path: Path) -> None:
    settings = {"method": "random_init", "evaluators": ["fine_tune", "knn"],
                "set": {"eval.fine_tune.default_learning_rate": 1e9, "eval.fine_tune.min_steps": 20}}  # fmt: skip
    first, again = run(tmp_path, **settings), run(tmp_path, **settings)
    assert len(again) == len(first)
    assert (again.evaluator == "knn").any()


def test_constant_features_are_reported_not_fatal(tmp_path: Path) -> None:
    from harness import figures

    with pytest.raises(ValueError, match="all the same"):
        figures.feature_map_2d(np.zeros((60, 16)), np.arange(60) % 10, "tsne")


def test_other_test_images_are_another_evaluation(tmp_path: Path, published_formats: ModuleType) -> None:
    data = tmp_path / "pets"
    published_formats.write_image_folder(data, np.random.default_rng(0), num_train=20, num_test=8)
    settings = {"method": "random_init", "dataset": f"folder:{data}", "labels": "all", "set": {"batch_size": 8}}
    first = run(tmp_path / "w", **settings)
    removed = sorted((data / "test").rglob("*.*"))[0]
    removed.unlink()
    second = run(tmp_path / "w", **settings)
    test = [frame[frame.split == "test"] for frame in (first, second)]
    assert set(test[0].eval_id).isdisjoint(test[1].eval_id)
    assert set(test[0].pretrain_id) == set(test[1].pretrain_id)
    assert set(test[1].n_test) == {int(test[0].n_test.iloc[0]) - 1}


def test_supervised_identity_holds_the_labels_themselves(tmp_path: Path, published_formats: ModuleType) -> None:
    from harness.arms import Request, make_plan
    from harness.config import Layers

    ids = []
    for name, swap in (("a", False), ("b", True)):
        data = tmp_path / name / "pets"
        published_formats.write_image_folder(data, np.random.default_rng(0), num_train=20, num_test=0, num_unlabeled=20)
        if swap:
            (data / "train" / "cat").rename(data / "train" / "x")
            (data / "train" / "dog").rename(data / "train" / "cat")
            (data / "train" / "x").rename(data / "train" / "dog")
        layers = Layers(overrides={"data.pretrain_split": "unlabeled", "batch_size": 8})
        plan = make_plan(Request("supervised", f"folder:{data}", layers, tmp_path, evaluators=("knn",), control=False))
        ids.append(plan.arms[0].pretrain_id)
    assert ids[0] != ids[1]


def test_evaluating_again_compares_with_the_controls_of_the_run(tmp_path: Path) -> None:
    from harness.arms import make_plan
    from harness.runner import evaluation_request

    first = run(tmp_path, control=True, set={"optim.lr": 0.05, "method.patch": 2})
    request = evaluation_request(
        "latest", None, None, None, tmp_path, {}, labels="10pc", evaluators=("knn",), tracking="none"
    )
    ids = {arm.method: arm.pretrain_id for arm in make_plan(request).arms}
    assert ids == dict(zip(first.method, first.pretrain_id, strict=True))
    with pytest.raises(harness.contracts.HarnessError, match="--set seed"):
        evaluation_request(
            "latest", None, None, None, tmp_path, {"seed": 1}, labels="10pc", evaluators=None, tracking="none"
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluators": []}, "--eval names no evaluator"),
        ({"evaluators": ["fine_tune"], "set": {"eval.fine_tune.transfer_depth": 99}}, "transfer_depth=99"),
        ({"set": {"eval.fine_tune.learning_rates": []}}, "eval.fine_tune.learning_rates"),
        ({"set": {"eval.fine_tune.learning_rates": [-1.0]}}, "eval.fine_tune.learning_rates"),
        ({"set": {"eval.knn.variants": [0]}}, "eval.knn.variants"),
        ({"set": {"schedule.milestones": [60, 85]}}, "schedule.milestones"),
        ({"evaluators": ["linear_probe"], "set": {"eval.linear_probe.weakest": 1e3}}, "is above strongest"),
        ({"seed": 2**70}, "setting 'seed'"),
        ({"set": {"num_threads": 10**12}}, "setting 'num_threads'"),
        ({"labels": "9" * 30 + "pc"}, "not understood"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(harness.contracts.HarnessError) as error:
        run(tmp_path / "w", **changes)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "w").exists()


def test_supervised_has_no_validation_rows_under_cross_validation(tmp_path: Path) -> None:
    rows = run(tmp_path, method="supervised", labels="3pc")
    assert set(rows[rows.evaluator == "knn"].split) == {"test"}
    assert set(rows.labels) == {"3pc"}
