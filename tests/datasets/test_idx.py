"""MNIST and Fashion-MNIST: plain or gzipped, wherever they lie; damage found; the test split left shut."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import formats
from harness.contracts import HarnessError, PublishedFile
from harness.datasets.fashion_mnist import FashionMNIST
from harness.datasets.mnist import MNIST
from harness.download import Transfer

TRAIN_IMAGES, TRAIN_LABELS = MNIST.split_files["train"]
TEST_IMAGES, TEST_LABELS = MNIST.split_files["test"]
Write = Callable[..., dict[str, tuple[np.ndarray, np.ndarray]]]


@pytest.fixture
def write(published_formats: ModuleType, tmp_path: Path) -> Write:
    return lambda **options: published_formats.write_idx(tmp_path, np.random.default_rng(0), **options)


def states(dataset: formats.PublishedDataset) -> dict[str, str]:
    return {report.name.rpartition("/")[2]: report.state for report in dataset.verify()}


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize(("kind", "folder"), [
    (MNIST, "MNIST/raw"), (MNIST, "mnist"), (MNIST, ""), (FashionMNIST, "FashionMNIST/raw"),
    (FashionMNIST, "fashion-mnist"), (FashionMNIST, ""),
])  # fmt: skip
def test_reads_what_was_written(write: Write, tmp_path: Path, kind: type[MNIST], folder: str, gz: bool) -> None:
    written = write(gz=gz, folder=folder)
    dataset = kind(tmp_path)
    for name, (pixels, labels) in written.items():
        split = dataset.split(name)
        np.testing.assert_array_equal(split.images.permute(0, 2, 3, 1), pixels)
        np.testing.assert_array_equal(split.labels, labels)
        assert split.images.is_contiguous(memory_format=torch.channels_last)
    assert dict(dataset.info.counts) == {"train": 40, "test": 20}
    assert set(states(dataset).values()) == {"readable, not the published file"}
    assert not dataset.verified("train")


def test_the_folder_that_holds_most_files_is_used(write: Write, tmp_path: Path) -> None:
    write(folder="mnist")
    (tmp_path / "MNIST/raw").mkdir(parents=True)
    shutil.copy(tmp_path / "mnist" / TRAIN_LABELS, tmp_path / "MNIST/raw")
    assert MNIST(tmp_path).folder() == tmp_path / "mnist"


def _publish(monkeypatch: pytest.MonkeyPatch, folder: Path, url: str | None = None) -> None:
    """Make the tiny .gz files in `folder` the published ones, and their contents too."""
    published = []
    for name in (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS):
        packed = (folder / f"{name}.gz").read_bytes()
        plain = gzip.decompress(packed)
        md5 = hashlib.md5(packed).hexdigest()
        published += [
            PublishedFile(f"MNIST/raw/{name}.gz", {"md5": md5}, len(packed), url or f"https://host.invalid/{name}.gz"),
            PublishedFile(f"MNIST/raw/{name}", {"sha256": hashlib.sha256(plain).hexdigest()}, len(plain),
                          archive=f"MNIST/raw/{name}.gz"),
        ]  # fmt: skip
    monkeypatch.setattr(MNIST, "published", tuple(published))


def test_published_packed_again_and_plain(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(gz=True)
    folder = tmp_path / "MNIST/raw"
    _publish(monkeypatch, folder)
    dataset = MNIST(tmp_path)
    assert set(states(dataset).values()) == {"published"} and dataset.verified("train+test")
    content = gzip.decompress((folder / f"{TRAIN_IMAGES}.gz").read_bytes())
    (folder / f"{TRAIN_IMAGES}.gz").write_bytes(gzip.compress(content, 9, mtime=1))
    assert dataset.verified("train"), "the same bytes packed differently are the same data"
    (folder / f"{TRAIN_IMAGES}.gz").unlink()
    (folder / TRAIN_IMAGES).write_bytes(content)
    assert dataset.verified("train")
    (folder / TRAIN_IMAGES).write_bytes(content[:-1] + b"!")
    assert states(dataset)[TRAIN_IMAGES] == "readable, not the published file", "nothing stale is believed"
    assert not dataset.verified("train") and dataset.verified("test")


@pytest.mark.parametrize("damage", ["missing", "garbage", "folder", "truncated"])
def test_a_bad_test_split_disturbs_nothing_else(write: Write, tmp_path: Path, damage: str) -> None:
    write()
    for name in (TEST_IMAGES, TEST_LABELS):
        path = tmp_path / "MNIST/raw" / name
        content = path.read_bytes()
        path.unlink()
        if damage == "garbage":
            path.write_bytes(b"garbage")
        elif damage == "folder":
            path.mkdir()
        elif damage == "truncated":
            path.write_bytes(content[:5])
    dataset = MNIST(tmp_path)
    assert len(dataset.split("train")) == 40
    assert dict(dataset.info.counts) == {"train": 40, "test": 0}
    with pytest.raises(HarnessError, match=TEST_IMAGES):
        dataset.split("test")
    expected = "missing" if damage in ("missing", "folder") else "broken"
    assert states(dataset)[TEST_IMAGES] == states(dataset)[TEST_LABELS] == expected


def test_train_and_info_never_open_the_test_images(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write()
    opened: list[str] = []
    true_open = formats.open_plain_or_gz
    monkeypatch.setattr(formats, "open_plain_or_gz", lambda path: (opened.append(path.name), true_open(path))[1])
    assert MNIST(tmp_path).info.counts["test"] == 20
    assert TEST_IMAGES not in opened and TRAIN_IMAGES in opened


def test_missing_files_say_what_to_put_where(tmp_path: Path) -> None:
    dataset = MNIST(tmp_path)
    for ask in (lambda: dataset.info, lambda: dataset.split("train"), lambda: dataset.fetch(offline=True)):
        with pytest.raises(HarnessError) as caught:
            ask()
        message = str(caught.value)
        assert "\n" not in message and f"{tmp_path}/MNIST/raw/{TRAIN_IMAGES}.gz" in message
        assert f"https://ossci-datasets.s3.amazonaws.com/mnist/{TRAIN_IMAGES}.gz" in message
    assert not any(tmp_path.iterdir())


def test_labels_must_fit_images_and_classes(published_formats: ModuleType, write: Write, tmp_path: Path) -> None:
    write()
    path = tmp_path / "MNIST/raw" / TRAIN_LABELS
    for labels, reason in ((np.zeros(39), "39 labels for 40 images"), (np.full(40, 10), "10 classes"),
                           (np.zeros(0), "0 labels")):  # fmt: skip
        path.write_bytes(published_formats.idx_bytes(labels))
        with pytest.raises(HarnessError, match=rf"{TRAIN_LABELS} is broken \(.*{reason}.*data fetch mnist"):
            MNIST(tmp_path).split("train")
    write()
    path.with_name(TRAIN_IMAGES).write_bytes(published_formats.idx_bytes(np.zeros((40, 27, 28))))
    with pytest.raises(HarnessError, match="27 x 28, not 28"):
        MNIST(tmp_path).split("train")


def test_a_header_that_promises_the_moon(tmp_path: Path) -> None:
    for name, packed in (("a", False), ("a.gz", True)):
        content = bytes([0, 0, 8, 3]) + b"\x7f\xff\xff\xff" * 3 + bytes(100)
        (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
        with pytest.raises(formats.BrokenFile, match="promises"):
            formats.read_idx(tmp_path / name, 3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10_000), gz=st.booleans())
def test_every_truncation_is_broken(published_formats: ModuleType, tmp_path: Path, cut: int, gz: bool) -> None:
    whole = published_formats.idx_bytes(np.random.default_rng(1).integers(0, 256, (5, 28, 28)))
    whole = gzip.compress(whole) if gz else whole
    path = tmp_path / ("x.gz" if gz else "x")
    path.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(formats.BrokenFile):
        formats.read_idx(path, 3)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_every_flipped_bit_of_a_gz_is_broken_or_harmless(
    published_formats: ModuleType, tmp_path: Path, position: int, bit: int
) -> None:
    values = np.random.default_rng(1).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    content = bytearray(gzip.compress(published_formats.idx_bytes(values)))
    content[position % len(content)] ^= 1 << bit
    path = tmp_path / "x.gz"
    path.write_bytes(content)
    with contextlib.suppress(formats.BrokenFile):
        np.testing.assert_array_equal(formats.read_idx(path, 3), values)  # harmless: in the time stamp, say


def test_fetch_brings_what_is_missing_or_broken(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_server: ModuleType
) -> None:
    write(gz=True)
    folder = tmp_path / "MNIST/raw"
    packed = folder / f"{TRAIN_IMAGES}.gz"
    content = packed.read_bytes()
    with file_server.serving(content) as server:
        _publish(monkeypatch, folder, server.url)
        dataset = MNIST(tmp_path)
        dataset.transfer = Transfer(backoff_seconds=0.01, allow_http_loopback=True)
        seen: list[object] = []
        dataset.progress = lambda *step: seen.append(step)
        assert dataset.fetch() == [f"MNIST/raw/{name}.gz: already there" for name in (
            TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)] and not server.requests  # fmt: skip
        packed.write_bytes(content[:-100])
        assert states(dataset)[packed.name] == "broken" and not dataset.verified("train")
        with pytest.raises(HarnessError, match=f"offline.*{server.url}.*{packed}"):
            dataset.fetch(offline=True)
        assert dataset.fetch()[0] == f"MNIST/raw/{TRAIN_IMAGES}.gz: fetched and checked"
        assert packed.read_bytes() == content and seen and dataset.verified("train")
        assert len(server.requests) == 1
        packed.write_bytes(gzip.compress(gzip.decompress(content)[:-1] + b"!"))
        dataset.fetch()
        assert len(server.requests) == 1, "a readable file of one's own is left alone"


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="--image-size 32"):
        MNIST(tmp_path, image_size=32)
    with pytest.raises(HarnessError, match="no split 'valid'; it has train, test"):
        MNIST(tmp_path).split("valid")
