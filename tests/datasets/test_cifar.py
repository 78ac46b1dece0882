"""CIFAR-10 and CIFAR-100: both versions read right, and no pickle gets to run or build anything."""

from __future__ import annotations

import hashlib
import io
import pickle
import subprocess
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import formats
from harness.contracts import HarnessError, PublishedFile
from harness.datasets.cifar10 import CIFAR10
from harness.datasets.cifar100 import CIFAR100
from harness.download import Transfer

KINDS = [(CIFAR10, "write_cifar10"), (CIFAR100, "write_cifar100")]


@pytest.mark.parametrize(("kind", "writer"), KINDS)
@pytest.mark.parametrize("options", [{"protocol": 2}, {"protocol": 4}, {"protocol": 5}, {"binary": True}])
def test_reads_what_was_written(
    published_formats: ModuleType, tmp_path: Path, kind: type[formats.CifarDataset], writer: str,
    options: dict[str, object],
) -> None:  # fmt: skip
    written = getattr(published_formats, writer)(tmp_path, np.random.default_rng(0), **options)
    dataset = kind(tmp_path)
    assert dict(dataset.info.counts) == {name: len(labels) for name, (_, labels) in written.items()}
    for name, (pixels, labels) in written.items():
        split = dataset.split(name)
        np.testing.assert_array_equal(split.images.permute(0, 2, 3, 1), pixels)
        np.testing.assert_array_equal(split.labels, labels)
        assert split.images.is_contiguous(memory_format=torch.channels_last)
    assert {report.state for report in dataset.verify()} == {"readable, not the published file"}
    assert dataset.info.num_classes == (10 if kind is CIFAR10 else 100)


def test_class_names_are_in_the_published_order() -> None:
    assert list(CIFAR100.classes) == sorted(set(CIFAR100.classes)) and len(CIFAR100.classes) == 100
    assert list(CIFAR10.classes) == sorted(set(CIFAR10.classes)) and len(CIFAR10.classes) == 10


def test_the_plain_unpickler_reads_the_same(published_formats: ModuleType, tmp_path: Path) -> None:
    published_formats.write_cifar10(tmp_path, np.random.default_rng(0))
    path = tmp_path / "cifar-10-batches-py/test_batch"
    table = pickle.loads(path.read_bytes(), encoding="bytes")
    rows, labels = formats.read_cifar_pickle(path, "labels")
    np.testing.assert_array_equal(rows, table[b"data"])
    assert labels.tolist() == table[b"labels"]


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return subprocess.check_output, (["touch", "owned"],)


HOSTILE = [
    pickle.dumps(Hostile()), pickle.dumps({b"data": Hostile()}), pickle.dumps([Hostile()], protocol=0),
    b"cos\nsystem\n(S'touch owned'\ntR.", b"c__builtin__\neval\n(S'1'\ntR.", b"cnumpy\nload\n(S'x'\ntR.",
    b"cnumpy.core.multiarray\n_reconstruct\n(dS'a'\nI1\nsb.",  # BUILD: set an attribute on what find_class gave
    b"cnumpy\nndarray\n(I99999999999999\ntR.", b"Pid\n.", b"\x80\x02]q\x00h\x00a.", b"\x80\x05N.", b"", b"garbage",
    b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", pickle.dumps({b"data": np.zeros((2, 3072))}),
    pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)}), pickle.dumps({b"data": b"x" * 3072, b"labels": [1]}),
    pickle.dumps({b"data": np.zeros((2, 3071), np.uint8), b"labels": [1, 2]}),
    pickle.dumps({b"data": np.asfortranarray(np.zeros((2, 3072), np.uint8)), b"labels": [1, 2]}),
    pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 10]}),
    pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, -1]}),
    pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2, 3]}),
    pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2.0]}),
    pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2**80]}),
    pickle.dumps({b"data": np.array([None] * 2), b"labels": [1, 2]}),
]  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE)
def test_hostile_pickles_are_broken_files(
    published_formats: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    published_formats.write_cifar10(tmp_path, np.random.default_rng(0))
    path = tmp_path / "cifar-10-batches-py/data_batch_3"
    path.write_bytes(content)
    dataset = CIFAR10(tmp_path)
    with pytest.raises(HarnessError, match=r"data_batch_3 is broken \(.*data fetch cifar10") as caught:
        dataset.split("train")
    assert "\n" not in str(caught.value)
    assert {r.name: r.state for r in dataset.verify()}["cifar-10-batches-py/data_batch_3"] == "broken"
    assert not (tmp_path / "owned").exists()
    assert len(dataset.split("test")) == 20


def test_a_pickle_cannot_alter_the_reader(tmp_path: Path) -> None:
    for name in (b"numpy\nndarray", b"numpy\ndtype", b"_codecs\nencode", b"numpy._core.numeric\n_frombuffer"):
        (tmp_path / "x").write_bytes(b"c" + name + b"\n(dS'__code__'\nI1\nsb.")
        with pytest.raises(formats.BrokenFile, match="tries to alter the reader"):
            formats.read_cifar_pickle(tmp_path / "x", "labels")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.booleans())
def test_damaged_pickles_give_rows_or_a_reason(
    published_formats: ModuleType, tmp_path: Path, position: int, value: int, cut: bool
) -> None:
    path = tmp_path / "cifar-10-batches-py/test_batch"
    if not path.exists():
        published_formats.write_cifar10(tmp_path, np.random.default_rng(0), num_train=5, num_test=2)
        path.with_name("whole").write_bytes(path.read_bytes())
    content = bytearray(path.with_name("whole").read_bytes())
    # image bytes may hold anything: aim at the structure before and behind them as well
    at = (position % 100, len(content) - 1 - position % 200, position % len(content))[position % 3]
    content[at] = value
    path.write_bytes(content[:at] if cut else content)
    dataset = CIFAR10(tmp_path)
    try:
        split = dataset.split("test")
    except HarnessError as error:
        assert "test_batch is broken" in str(error) and "\n" not in str(error)
    else:
        assert not cut and split.labels is not None and len(split) == len(split.labels)
    assert dataset.info.counts["test"] >= 0


@pytest.mark.parametrize("damage", ["missing", "garbage"])
def test_a_bad_test_batch_disturbs_nothing_else(published_formats: ModuleType, tmp_path: Path, damage: str) -> None:
    published_formats.write_cifar10(tmp_path, np.random.default_rng(0))
    path = tmp_path / "cifar-10-batches-py/test_batch"
    path.unlink() if damage == "missing" else path.write_bytes(b"garbage")
    dataset = CIFAR10(tmp_path)
    assert dict(dataset.info.counts) == {"train": 40, "test": 0}
    with pytest.raises(HarnessError, match="test_batch"):
        dataset.split("test")


def test_counting_the_test_split_skips_its_images(
    published_formats: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published_formats.write_cifar10(tmp_path, np.random.default_rng(0))
    most = 0
    true_read = formats._Skimmer.read

    def read(self: formats._Skimmer, size: int) -> bytes:
        nonlocal most
        before = self.file.tell()
        content = true_read(self, size)
        if size < formats.ROW_BYTES:
            most += self.file.tell() - before
        return content

    monkeypatch.setattr(formats._Skimmer, "read", read)
    assert CIFAR10(tmp_path).info.counts["test"] == 20
    assert 0 < most < 3072, "fewer bytes than one image were looked at"


def test_binary_files_of_odd_length(published_formats: ModuleType, tmp_path: Path) -> None:
    published_formats.write_cifar100(tmp_path, np.random.default_rng(0), binary=True)
    path = tmp_path / "cifar-100-binary/train.bin"
    for content in (path.read_bytes()[:-1], b""):
        path.write_bytes(content)
        with pytest.raises(HarnessError, match="no whole number of 3074-byte records"):
            CIFAR100(tmp_path).split("train")


def test_fetch_unpacks_the_published_members(
    published_formats: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_server: ModuleType
) -> None:
    made, root = tmp_path / "made", tmp_path / "data"
    written = published_formats.write_cifar100(made, np.random.default_rng(0))
    (made / "cifar-100-python/meta").write_bytes(b"names")
    packed = io.BytesIO()
    members = []
    with tarfile.open(fileobj=packed, mode="w:gz") as tape:
        for name in ("train", "meta", "test"):
            path = made / "cifar-100-python" / name
            tape.add(path, f"cifar-100-python/{name}")
            md5 = hashlib.md5(path.read_bytes()).hexdigest()
            members.append(PublishedFile(f"cifar-100-python/{name}", {"md5": md5}, archive="c.tar.gz"))
        tape.addfile(tarfile.TarInfo("../escape"), io.BytesIO())
    content = packed.getvalue()
    with file_server.serving(content, file_server.Answer(cut=1000), file_server.Answer()) as server:
        archive = PublishedFile("c.tar.gz", {"sha256": hashlib.sha256(content).hexdigest()}, len(content), server.url)
        monkeypatch.setattr(CIFAR100, "published", (archive, *members))
        dataset = CIFAR100(root)
        dataset.transfer = Transfer(backoff_seconds=0.01, allow_http_loopback=True)
        with pytest.raises(HarnessError, match=f"put {server.url} at {root}/c.tar.gz"):
            dataset.split("train")
        assert dataset.fetch() == ["c.tar.gz: fetched and checked"]
        np.testing.assert_array_equal(dataset.split("train").labels, written["train"][1])
        assert dataset.verified("train+test") and (root / "cifar-100-python/meta").read_bytes() == b"names"
        assert not (tmp_path / "escape").exists()
        assert dataset.fetch() == ["c.tar.gz: already there"]
        (root / "cifar-100-python/train").unlink()
        assert dataset.fetch(offline=True) == ["c.tar.gz: fetched and checked"], "from the archive on disk"
        assert len(server.requests) == 2
