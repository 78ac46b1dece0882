"""STL-10: column-major planes, labels from 1, ten folds, an unlabelled split; sizes checked, test left shut."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from harness import mapped
from harness.contracts import HarnessError
from harness.datasets import stl10
from harness.datasets.stl10 import STL10


@pytest.fixture
def written(published_formats: ModuleType, tmp_path: Path) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    return published_formats.write_stl10(tmp_path, np.random.default_rng(0))


@pytest.mark.parametrize("chunk", [256, 7])
def test_reads_what_was_written(
    written: dict[str, tuple[np.ndarray, np.ndarray | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    chunk: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(stl10, "CHUNK_IMAGES", chunk)
    dataset = STL10(tmp_path)
    for name, (pixels, labels) in written.items():
        split = dataset.split(name)
        np.testing.assert_array_equal(split.images.permute(0, 2, 3, 1), pixels)
        assert split.images.is_contiguous(memory_format=torch.channels_last)
        if labels is None:
            assert split.labels is None
        else:
            np.testing.assert_array_equal(split.labels, labels)


@pytest.mark.parametrize("order", [("train", "unlabeled"), ("unlabeled", "train")])
@pytest.mark.parametrize("memory", [1 << 40, 100])
def test_pretraining_on_both_splits_takes_no_second_memory(
    written: dict[str, tuple[np.ndarray, np.ndarray | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    order: tuple[str, str], memory: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(mapped, "available_bytes", lambda: memory)
    files = sorted(tmp_path.rglob("*"))
    dataset = STL10(tmp_path)
    for name in order:
        dataset.split(name)
    parts = [dataset.split(name).images for name in ("unlabeled", "train")]
    whole = mapped.join(parts)
    assert whole.data_ptr() == parts[0].data_ptr() and mapped.is_mapped(whole) == (memory == 100)
    expected = np.concatenate([written[name][0] for name in ("unlabeled", "train")])
    np.testing.assert_array_equal(whole.permute(0, 2, 3, 1), expected)
    np.testing.assert_array_equal(dataset.split("test").images.permute(0, 2, 3, 1), written["test"][0])
    assert sorted(tmp_path.rglob("*")) == files


def test_layout_is_column_major(tmp_path: Path, written: object) -> None:
    """The published format by hand: byte c*96*96 + x*96 + y of an image is channel c, row y, column x."""
    raw = (tmp_path / "stl10_binary/train_X.bin").read_bytes()
    image = STL10(tmp_path).split("train").images[3]
    for channel, row, column in ((0, 0, 1), (1, 5, 90), (2, 95, 0)):
        assert image[channel, row, column] == raw[3 * 27648 + channel * 9216 + column * 96 + row]


def test_info(tmp_path: Path, written: object) -> None:
    info = STL10(tmp_path).info
    assert dict(info.counts) == {"unlabeled": 30, "train": 40, "test": 20}
    assert info.pretrain_split == "unlabeled+train" and info.mirror_keeps_label and info.image_size == (96, 96)
    train = STL10(tmp_path).split("train").images.double() / 255
    np.testing.assert_allclose(info.mean, train.mean(dim=(0, 2, 3)), rtol=1e-9)


def test_files_directly_in_the_data_folder(tmp_path: Path, written: object) -> None:
    assert len(STL10(tmp_path / "stl10_binary").split("train")) == 40


def test_folds(tmp_path: Path, written: object) -> None:
    folds = STL10(tmp_path).folds
    lines = (tmp_path / "stl10_binary/fold_indices.txt").read_text().splitlines()
    assert len(folds) == 10
    for fold, line in zip(folds, lines, strict=True):
        assert fold.dtype == np.int64 and fold.tolist() == [int(word) for word in line.split()]


@pytest.mark.parametrize("damage", [
    lambda text: text.replace("\n", " "), lambda text: text + "1 2 3\n", lambda text: "x" + text,
    lambda text: "40 " + text, lambda text: "-1 " + text, lambda text: text.split()[0] + " " + text,
    lambda text: "9" * 30 + " " + text, lambda text: "", lambda text: "é" + text,
])  # fmt: skip
def test_damaged_folds_are_refused_and_disturb_nothing(tmp_path: Path, written: object, damage: object) -> None:
    path = tmp_path / "stl10_binary/fold_indices.txt"
    path.write_text(damage(path.read_text()))  # type: ignore[operator]
    dataset = STL10(tmp_path)
    assert len(dataset.split("train")) == 40 and dataset.info
    with pytest.raises(HarnessError, match=r"fold_indices.txt is broken \(.*data fetch stl10"):
        _ = dataset.folds


@pytest.mark.parametrize("name", ["unlabeled_X.bin", "test_X.bin", "test_y.bin", "fold_indices.txt"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_only_what_is_asked_for_matters(tmp_path: Path, written: object, name: str, damage: str) -> None:
    path = tmp_path / "stl10_binary" / name
    content = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(content[:-1] if damage == "cut" else b"")
    dataset = STL10(tmp_path)
    assert len(dataset.split("train")) == 40 and dataset.info.counts["train"] == 40
    if name != "fold_indices.txt":
        with pytest.raises(HarnessError, match=name):
            dataset.split(name.partition("_")[0])
    if name.endswith("X.bin"):
        assert dataset.info.counts[name.partition("_")[0]] == 0
    state = {Path(report.name).name: report.state for report in dataset.verify()}
    expected = "missing" if damage == "missing" else "broken"
    if damage == "cut" and not name.endswith("X.bin"):
        expected = "readable, not the published file"  # one label or digit less shows only beside the other files
    assert state.pop(name) == expected and set(state.values()) == {"readable, not the published file"}


def test_labels_outside_one_to_ten(tmp_path: Path, written: object) -> None:
    for label in (0, 11):
        (tmp_path / "stl10_binary/train_y.bin").write_bytes(bytes([label] * 40))
        with pytest.raises(HarnessError, match=r"train_y.bin is broken \(labels"):
            STL10(tmp_path).split("train")


def test_verified_asks_only_for_what_has_a_digest(tmp_path: Path, written: object) -> None:
    assert not STL10(tmp_path).verified("unlabeled+train")
    reports = {Path(report.name).name: report.detail for report in STL10(tmp_path).verify()}
    assert reports["fold_indices.txt"] == "no digest of it is published"
