"""CIFAR-10, CIFAR-100, STL-10 and a colour folder: tiny files in the exact published formats through verify and run."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import harness

SMALL: dict[str, Any] = {
    "epochs": 1, "encoder": "convnet_small", "batch_size": 8, "evaluators": ["linear_probe", "knn"], "tracking": "none",
    "set": {"num_threads": 1, "precision": "fp32"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "writer", "labels", "num_test"),
    [
        ("cifar10", "write_cifar10", "4pc", 20),
        ("cifar100", "write_cifar100", "2pc", 100),
        ("stl10", "write_stl10", "4pc", 20),
    ],
)
def test_verify_and_run(
    name: str, writer: str, labels: str, num_test: int, tmp_path: Path, published_formats: ModuleType, forks: Any
) -> None:
    data = tmp_path / "data"
    getattr(published_formats, writer)(data, np.random.default_rng(0))
    done = forks.run("data", "verify", name, "--data-dir", str(data), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {file["state"] for file in json.loads(done.stdout)["files"]} == {"readable, not the published file"}
    rows = harness.run(method="sc", dataset=name, data_dir=data, workspace=tmp_path / "w", labels=labels, **SMALL)
    test = rows[(rows.split == "test") & (rows.metric == "top1")]
    assert {"sc", "sc_null", "random_init", "supervised", "pixels", "pixels_svm", "hog"} == set(test.method)
    assert set(test.n_test) == {num_test}
    assert not rows.data_verified.any()  # said in every row
    assert set(rows.pretrain_data) == {"unlabeled+train" if name == "stl10" else "train"}


def test_stl10_folds(tmp_path: Path, published_formats: ModuleType) -> None:
    data = tmp_path / "data"
    published_formats.write_stl10(data, np.random.default_rng(0))
    rows = harness.run(
        method="sc", dataset="stl10", data_dir=data, workspace=tmp_path / "w", labels="folds", control=False, **SMALL
    )
    probe = rows[
        (rows.evaluator == "linear_probe") & (rows.readout == "gap") & (rows.split == "test") & (rows.metric == "top1")
    ]
    assert sorted(probe.fold) == list(range(10))
    assert probe.label_subset_sha256.nunique() > 1
    assert set(probe.labels) == {"folds"}
    assert rows.pretrain_id.nunique() == 1  # one pretraining serves all folds


def test_a_folder_with_test_images_among_the_unlabelled(tmp_path: Path, published_formats: ModuleType) -> None:
    import shutil

    data = tmp_path / "pets"
    published_formats.write_image_folder(data, np.random.default_rng(0), num_train=20, num_test=6, num_unlabeled=10)
    stolen = sorted((data / "test").rglob("*.*"))[:2]
    for number, image in enumerate(stolen):
        shutil.copy(image, data / "unlabeled" / f"stolen{number}{image.suffix}")
    rows = harness.run(
        method="sc", dataset=f"folder:{data}", workspace=tmp_path / "w", labels="all", control=False, **SMALL
    )
    assert set(rows[rows.split == "test"].test_overlap) == {2}
    assert set(rows.dataset) == {"folder:pets"}
    assert str(tmp_path) not in rows.to_json()


def test_an_unlabelled_folder_runs_label_free_evaluators_only(tmp_path: Path, published_formats: ModuleType) -> None:
    data = tmp_path / "plain"
    published_formats.write_image_folder(data, np.random.default_rng(0), num_train=0, num_test=0, num_unlabeled=20)
    settings = {k: v for k, v in SMALL.items() if k != "evaluators"}
    rows = harness.run(method="sc", dataset=f"folder:{data}", workspace=tmp_path / "w", **settings)
    assert set(rows.evaluator) <= {"pretext", "representation"}
    with pytest.raises(Exception, match="has no labels, so --eval knn cannot run"):
        harness.run(method="sc", dataset=f"folder:{data}", workspace=tmp_path / "w", evaluators=["knn"], **settings)


def test_a_broken_test_file_is_refused_by_name_before_training(tmp_path: Path, published_formats: ModuleType) -> None:
    data = tmp_path / "data"
    published_formats.write_cifar10(data, np.random.default_rng(0))
    broken = next(data.rglob("test_batch"))
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(Exception, match="test_batch"):
        harness.run(method="sc", dataset="cifar10", data_dir=data, workspace=tmp_path / "w", labels="4pc", **SMALL)
    assert not (tmp_path / "w").exists()
