"""Transfer through the command line: an encoder of tiny MNIST files measured on tiny Fashion-MNIST files and others."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import harness as api
from harness import export, journal, records, runs
from harness.contracts import HarnessError

TINY = ("--set", "batch_size=8", "--epochs", "1", "--encoder", "convnet_small", "--set", "num_threads=1",
        "--set", "precision=fp32", "--tracking", "none")  # fmt: skip
KEY = ("method", "evaluator", "readout", "labels", "fold", "split", "metric", "seed")


class Harness:
    """The command in a folder that has its data in data/."""

    def __init__(self, forks: Any) -> None:
        self.forks = forks

    def __call__(self, *words: str, cwd: Path, code: int = 0) -> tuple[str, str]:
        done = self.forks.run(*words, cwd=cwd, HARNESS_DATA=str(cwd / "data"))
        assert done.returncode == code, done.stderr
        return done.stdout, done.stderr

    def rows_of(self, *words: str, cwd: Path) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self(*words, "--json", cwd=cwd)[0])["rows"]
        return rows


@pytest.fixture(scope="module")
def harness(forks: Any) -> Harness:
    return Harness(forks)


@pytest.fixture(scope="module")
def place(harness: Harness, tmp_path_factory: pytest.TempPathFactory, published_formats: ModuleType) -> Path:
    """A workspace with a finished run of sc on MNIST, and the files of both sets below data/."""
    folder = tmp_path_factory.mktemp("transfer")
    published_formats.write_idx(folder / "data", np.random.default_rng(0))
    published_formats.write_idx(folder / "data", np.random.default_rng(1), 60, 30, folder="FashionMNIST/raw")
    harness("run", "--method", "sc", "--dataset", "mnist", *TINY, "--eval", "linear_probe,representation",
            "--no-control", cwd=folder)  # fmt: skip
    return folder


def source(place: Path) -> str:
    """The pretrain_id of that run: other tests make other runs the latest one."""
    return next(run.pretrain_id for run in runs.finished(place) if run.facts["method"] == "sc")


@pytest.fixture(scope="module")
def moved(harness: Harness, place: Path) -> list[dict[str, Any]]:
    """The rows of its evaluation on Fashion-MNIST."""
    return harness.rows_of("evaluate", source(place), "--dataset", "fashion_mnist", "--eval", "linear_probe,knn,representation",
                   "--tracking", "none", cwd=place)  # fmt: skip


def test_rows_say_where_it_was_pretrained_and_where_it_was_measured(place: Path, moved: list[dict[str, Any]]) -> None:
    run = runs.find(place, source(place))
    assert run.facts["dataset"] == "mnist"
    assert {row["dataset"] for row in moved} == {"fashion_mnist"}
    own = [row for row in moved if row["method"] == "sc"]
    assert {row["pretrain_data"] for row in own} == {"mnist:train"}
    assert {row["pretrain_data"] for row in moved if row["method"] != "sc"} == {"train"}
    assert {row["pretrain_id"] for row in own} == {run.pretrain_id}
    assert {row["weights_sha256"] for row in own} == {run.facts["weights_sha256"]}
    assert {row["steps"] for row in own} == {run.facts["steps"]}
    assert {row["evaluator"] for row in own} == {
        "linear_probe",
        "knn",
        "representation",
    }  # its pretext task is told there
    assert {row["n_test"] for row in moved if row["split"] == "test"} == {30}
    keys = [tuple(row[k] for k in KEY) for row in moved]
    assert len(set(keys)) == len(keys)


def test_the_controls_are_those_of_the_new_data_by_the_same_protocol(
    harness: Harness, place: Path, moved: list[dict[str, Any]]
) -> None:
    assert {row["method"] for row in moved} == {"sc", "random_init", "supervised", "pixels", "pixels_svm", "hog"}
    assert {row["encoder"] for row in moved if row["method"] in ("sc", "random_init", "supervised")} == {
        "convnet_small"
    }
    assert len({row["label_subset_sha256"] for row in moved if row["labels"] and row["method"] != "pixels"}) == 1
    # random_init on Fashion-MNIST is the one that `harness run` there makes
    direct = harness.rows_of("run", "--method", "random_init", "--dataset", "fashion_mnist", *TINY, "--eval",
                     "linear_probe,representation", "--no-control", cwd=place)  # fmt: skip
    assert {row["eval_id"] for row in direct} <= {row["eval_id"] for row in moved if row["method"] == "random_init"}


def test_the_numbers_are_those_of_the_stored_encoder(place: Path, moved: list[dict[str, Any]]) -> None:
    """1-nearest neighbours by hand, from the files and the encoder as anybody may load it."""
    encoder = api.load_encoder(source(place), place)
    splits = {}
    for name, prefix, count in (("train", "train", 60), ("test", "t10k", 30)):
        raw = (place / "data" / "FashionMNIST" / "raw" / f"{prefix}-images-idx3-ubyte").read_bytes()[16:]
        images = torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(count, 1, 28, 28).copy())
        with torch.no_grad():
            features = encoder.read(encoder(images), "gap").double()
        splits[name] = features / features.norm(dim=1, keepdim=True), np.arange(count) % 10
    mnist = np.frombuffer((place / "data/MNIST/raw/train-images-idx3-ubyte").read_bytes()[16:], np.uint8)
    assert float(encoder.mean) == pytest.approx(mnist.mean() / 255, rel=1e-4)  # its own, not Fashion-MNIST's
    nearest = (splits["test"][0] @ splits["train"][0].T).argmax(1).numpy()
    by_hand = (splits["train"][1][nearest] == splits["test"][1]).mean()
    found = [
        r["value"]
        for r in moved
        if (r["method"], r["readout"], r["metric"], r["split"]) == ("sc", "gap", "top1_k1", "test")
    ]
    assert found == [pytest.approx(by_hand)]


def test_again_is_free_and_the_runs_own_rows_stay(harness: Harness, place: Path, moved: list[dict[str, Any]]) -> None:
    files = {p: p.stat().st_mtime_ns for p in records.runs_folder(place).rglob("*.json")}
    again = harness.rows_of("evaluate", source(place), "--dataset", "fashion_mnist", "--eval", "linear_probe,knn,representation",
                    "--tracking", "none", cwd=place)  # fmt: skip
    written = [sorted(json.dumps(row, sort_keys=True) for row in rows) for rows in (again, moved)]
    assert written[0] == written[1]
    assert {p: p.stat().st_mtime_ns for p in records.runs_folder(place).rglob("*.json")} == files
    home = [row for row in records.read_all(place) if row.method == "sc" and row.dataset == "mnist"]
    assert {row.pretrain_data for row in home} == {"train"} and not any(row.transferred for row in home)
    assert {row.eval_id for row in home}.isdisjoint(row["eval_id"] for row in moved)
    assert {row.data_sha256 for row in home}.isdisjoint(row["data_sha256"] for row in moved)
    probe, _ = export._probe_rows(runs.find(place, source(place)))  # what is exported is the probe of its own data
    assert {row.dataset for row in probe} == {"mnist"}


def test_other_images_are_another_evaluation(place: Path, moved: list[dict[str, Any]], tmp_path: Path) -> None:
    import shutil

    data = tmp_path / "data"
    shutil.copytree(place / "data", data)
    file = data / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    content = bytearray(file.read_bytes())
    content[100] ^= 255  # one pixel
    file.write_bytes(content)
    changed = api.evaluate(source(place), dataset="fashion_mnist", workspace=place, data_dir=data, control=False,
                           evaluators=["knn", "representation"], tracking="none")  # fmt: skip
    assert len(set(changed.eval_id)) == 2
    assert set(changed.eval_id).isdisjoint(row["eval_id"] for row in moved)


def test_what_does_not_fit_is_refused_in_one_line(harness: Harness, place: Path, published_formats: ModuleType) -> None:
    published_formats.write_cifar10(place / "data", np.random.default_rng(0))
    published_formats.write_stl10(place / "data", np.random.default_rng(0))
    for dataset, shape in (("stl10", "96 x 96 pixels and 3 channels;"), ("cifar10", "32 x 32 pixels and 3 channels;")):
        out, err = harness("evaluate", source(place), "--dataset", dataset, cwd=place, code=2)
        assert out == "" and err.count("\n") == 1
        assert (
            f"an encoder for 28 x 28 pixels and 1 channel (mnist) cannot be measured on {dataset}" in err
            and shape in err
        )
    before = set(place.rglob("*.json"))
    out, err = harness(
        "run", "--method", "random_init", "--dataset", "mnist", *TINY, "--transfer", "cifar10", cwd=place, code=2
    )
    assert "cannot be measured on cifar10" in err and err.count("\n") == 1
    assert set(place.rglob("*.json")) == before  # before any work
    with pytest.raises(HarnessError, match="what is pretrained on"):
        api.run("random_init", "mnist", workspace=place, data_dir=place / "data", transfer=["mnist"])


def test_a_folder_is_resized_to_the_encoder(place: Path, published_formats: ModuleType) -> None:
    pets = place / "pets"
    published_formats.write_image_folder(pets, np.random.default_rng(0), num_train=20, num_test=8, grey=True)
    rows = api.evaluate(source(place), dataset=f"folder:{pets}", workspace=place, control=False, evaluators=["knn"],
                        tracking="none")  # fmt: skip
    assert set(rows.dataset) == {"folder:pets"} and set(rows.pretrain_data) == {"mnist:train"}
    assert set(rows[rows.split == "test"].n_test) == {8}
    assert not rows.data_verified.any()


def test_a_run_goes_on_to_several_data_sets_and_seeds(harness: Harness, place: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(place / "data")
    words = ("run", "--method", "sc", "--dataset", "mnist", *TINY, "--eval", "knn", "--no-control", "--seeds", "0-1",
             "--transfer", "fashion_mnist")  # fmt: skip
    rows = harness.rows_of(*words, cwd=tmp_path)
    test = {(r["seed"], r["dataset"], r["pretrain_data"]) for r in rows if r["split"] == "test"}
    assert test == {(s, d, p) for s in (0, 1) for d, p in (("mnist", "train"), ("fashion_mnist", "mnist:train"))}
    for seed in (0, 1):
        assert len({r["weights_sha256"] for r in rows if r["seed"] == seed}) == 1
    out, _ = harness(*words, cwd=tmp_path)
    assert out.count("fashion_mnist, sc pretrained on mnist:train, seed ") == 2


def test_a_run_that_did_not_finish_is_not_transferred(place: Path, tmp_path: Path) -> None:
    settings = {"optim.lr": 1e38, "method.distance": "squared", "batch_size": 8, "encoder.name": "convnet_small"}
    failed = api.run("sc", "mnist", workspace=tmp_path, data_dir=place / "data", set=settings, control=False, epochs=1,
                     tracking="none", evaluators=["knn"], transfer=["fashion_mnist"])  # fmt: skip
    assert set(failed.status) == {"NONFINITE"} and set(failed.dataset) == {"mnist"}
    with pytest.raises(HarnessError, match=r"did not finish \(NONFINITE\)"):
        api.evaluate("latest", dataset="fashion_mnist", workspace=tmp_path, data_dir=place / "data", tracking="none")


def test_mlflow_keeps_both_data_sets_apart() -> None:
    row = {"evaluator": "knn", "readout": "gap", "split": "test", "metric": "top1", "value": 0.5, "steps": 3,
           "labels": "all", "dataset": "fashion_mnist", "finished_at": "2026-01-01T00:00:00+00:00"}  # fmt: skip
    here, there = (journal.row_point({**row, "pretrain_data": data}) for data in ("train", "mnist:train"))
    assert here is not None and there is not None
    assert here.key == "knn.gap.test.top1 labels:all" and there.key == "knn.gap.test.top1 labels:all on:fashion_mnist"


def test_robustness_and_calibration_run_beside_the_pixels_floor(harness: Harness, place: Path) -> None:
    rows = harness.rows_of("run", "--method", "sc", "--dataset", "mnist", *TINY, "--eval", "robustness,calibration,linear_probe",
                   cwd=place)  # fmt: skip
    keys = [tuple(row[k] for k in KEY) for row in rows]
    assert len(set(keys)) == len(keys)
    by_method = {
        method: {r["evaluator"] for r in rows if r["method"] == method} for method in {r["method"] for r in rows}
    }
    assert {"robustness", "calibration"} <= by_method["pixels"] & by_method["sc"] & by_method["random_init"]
    assert by_method["hog"] == by_method["pixels_svm"] == {"svm"}  # they are read by another model
    value = {(r["method"], r["evaluator"], r["readout"], r["split"], r["metric"]): r["value"] for r in rows}
    for method, readout in (("sc", "gap"), ("sc", "spatial_pca"), ("pixels", "pixels")):
        for split in ("validation", "test"):
            probe = value[method, "linear_probe", readout, split, "top1"]
            assert value[method, "robustness", readout, split, "top1_clean"] == probe
        assert value[method, "calibration", readout, "test", "nll"] == pytest.approx(
            value[method, "linear_probe", readout, "test", "nll"], rel=1e-6
        )
        unseen, every = (value[method, "robustness", readout, "test", f"top1_{m}"] for m in ("unseen", "corrupted"))
        moved = value[method, "robustness", readout, "test", "top1_translate"]
        # sc shifts its views: translations are not unseen; pixels have no views
        assert unseen == pytest.approx((8 * every - moved) / 7 if method == "sc" else every)
