"""folder:PATH: order, labels, sizes and channels; every hostile thing in it named before any work."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from harness import decoding, images, mapped
from harness.contracts import HarnessError
from harness.datasets.folder import DECODED, Folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def folder(root: Path, image_size: int | None = None) -> Folder:
    return Folder(root.parent / "data", image_size, str(root))


def picture(path: Path, value: int = 100, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, value, value)).save(path)
    return path


def refusal(dataset: Folder) -> str:
    with pytest.raises(HarnessError) as caught:
        _ = dataset.info
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_reads_what_was_written(published_formats: ModuleType, root: Path) -> None:
    written = published_formats.write_image_folder(root, np.random.default_rng(0), num_unlabeled=5, size=(24, 24))
    dataset = folder(root)
    info = dataset.info
    assert info.classes == ("cat", "dog") and info.pretrain_split == "unlabeled+train"
    assert dict(info.counts) == {"unlabeled": 5, "train": 12, "test": 6} and info.image_size == (24, 24)
    for name, (pixels, labels) in written.items():
        # written number by number; read class by class
        order = np.arange(len(pixels)) if labels is None else np.argsort(labels, kind="stable")
        split = dataset.split(name)
        np.testing.assert_array_equal(split.images.permute(0, 2, 3, 1), pixels[order])
        assert split.images.is_contiguous(memory_format=torch.channels_last)
        assert (split.labels is None) == (labels is None)
        if labels is not None:
            np.testing.assert_array_equal(split.labels, labels[order])
    assert [(report.name, report.detail) for report in dataset.verify()] == [
        ("unlabeled/", "5 images"), ("train/", "12 images"), ("test/", "6 images")]  # fmt: skip
    assert not dataset.verified("train")
    with pytest.raises(HarnessError, match=r"no split 'valid'.*unlabeled, train, test"):
        dataset.split("valid")


def test_order_is_by_path_and_depth_is_free(root: Path) -> None:
    for value, name in enumerate(("a/1.png", "a/2/x.png", "a/2.png", "a-b/0.png", "B/9.JPG")):
        picture(root / "train" / name, value * 20)
    train = folder(root).split("train")
    # "B" < "a-b" < "a/..." as strings; labels by sorted class name
    assert folder(root).info.classes == ("B", "a", "a-b")
    assert train.images[:, 0, 4, 4].tolist() == [80, 60, 0, 40, 20]
    assert train.labels is not None and train.labels.tolist() == [0, 2, 1, 1, 1]


def test_sizes_default_to_the_median_short_side_and_at_most_96(root: Path) -> None:
    for number, size in enumerate(((10, 30), (40, 20), (30, 50))):
        picture(root / "train/a" / f"{number}.png", size=size)
    assert folder(root).info.image_size == (20, 20)
    assert folder(root, 17).info.image_size == (17, 17)
    assert folder(root, 17).split("train").images.shape == (3, 3, 17, 17)
    for number in range(4):
        picture(root / "unlabeled" / f"{number}.png", size=(300, 200))
    assert folder(root).info.image_size == (96, 96)


@pytest.mark.parametrize("size", [0, -3, 5000])
def test_sizes_out_of_reach(root: Path, size: int) -> None:
    with pytest.raises(HarnessError, match="--image-size"):
        folder(root, size)


def test_grey_only_if_all_are(root: Path) -> None:
    picture(root / "train/a/0.png", mode="L")
    picture(root / "train/b/0.png", mode="L")
    picture(root / "test/a/0.png", value=50)
    dataset = folder(root)
    assert dataset.info.channels == 1 and dataset.split("test").images.shape == (1, 1, 8, 8)
    picture(root / "train/b/1.png")
    assert folder(root).info.channels == 3


def test_unlabelled_only(root: Path) -> None:
    picture(root / "unlabeled/x/0.png")
    picture(root / "unlabeled/1.png")
    info = folder(root).info
    assert info.classes is None and info.pretrain_split == "unlabeled" and dict(info.counts) == {"unlabeled": 2}
    with pytest.raises(HarnessError, match="no split 'train'"):
        folder(root).split("train")


def test_hidden_and_other_files_are_passed_over(root: Path) -> None:
    picture(root / "train/a/0.png")
    picture(root / "train/a/.hidden.png")
    picture(root / "train/.git/0.png")
    (root / "train/a/notes.txt").write_text("no image")
    (root / "train/README.md").write_text("no image")
    (root / "train/a/Thumbs.db").write_bytes(b"")
    assert folder(root).info.counts == {"train": 1}


def test_no_test_folder_means_no_test_split(root: Path) -> None:
    picture(root / "train/a/0.png")
    assert "test" not in folder(root).info.counts
    with pytest.raises(HarnessError, match=r"no split 'test'; .* has train"):
        folder(root).split("test")


def test_every_unusable_file_is_named_at_once(root: Path) -> None:
    picture(root / "train/a/good.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "train/a/cut.jpg")
    (root / "train/a/cut.jpg").write_bytes((root / "train/a/cut.jpg").read_bytes()[:900])
    (root / "train/a/empty.png").write_bytes(b"")
    (root / "unlabeled").mkdir()
    (root / "unlabeled/text.png").write_text("hello")
    message = refusal(folder(root))
    assert "3 under" in message
    for name in ("train/a/cut.jpg (", "train/a/empty.png (empty file)", "unlabeled/text.png (not an image"):
        assert name in message
    states = {report.name: report.state for report in folder(root).verify()}
    assert [name for name, state in states.items() if state == "broken"] == [
        "train/a/cut.jpg", "train/a/empty.png", "unlabeled/text.png"]  # fmt: skip


def test_five_are_named_and_all_are_counted(root: Path) -> None:
    picture(root / "train/a/good.png")
    for number in range(9):
        (root / f"train/a/{number}.png").write_bytes(b"x")
    message = refusal(folder(root))
    assert "9 under" in message and message.count("train/a/") == 5 and "; ..." in message


def test_hostile_names_are_escaped(root: Path) -> None:
    picture(root / "train/a/good.png")
    (root / "train/a/\x1b[31m\n.png").write_bytes(b"x")
    (root / os.fsdecode(b"train/a/\xff.png")).write_bytes(b"x")
    assert "\\x1b[31m\\n.png" in refusal(folder(root)) and "\\udcff.png" in refusal(folder(root))
    picture(root / "train/b\n/0.png")
    assert "'train/b\\n' (unprintable characters" in refusal(folder(root))


def test_links_out_of_the_folder_are_refused(root: Path) -> None:
    picture(root / "train/a/good.png")
    outside = picture(root.parent / "outside/secret.png")
    (root / "train/a/file.png").symlink_to(outside)
    (root / "train/a/relative.png").symlink_to("../../../outside/secret.png")
    (root / "train/b").symlink_to(outside.parent)
    (root / "train/a/nothing.png").symlink_to("absent.png")
    message = refusal(folder(root))
    assert "4 under" in message and message.count("a link out of the folder") == 3
    assert "train/b (a link out of the folder)" in message and "train/a/nothing.png (a link to nothing)" in message


def test_a_split_that_is_a_link_out_is_refused(root: Path) -> None:
    picture(root.parent / "outside/secret.png")
    picture(root / "train/a/good.png")
    (root / "unlabeled").symlink_to(root.parent / "outside")
    assert "unlabeled (a link out of the folder)" in refusal(folder(root))


def test_links_inside(root: Path) -> None:
    picture(root / "train/a/0.png")
    (root / "train/a/1.png").symlink_to("0.png")
    assert folder(root).info.counts == {"train": 2}
    (root / "train/a/loop").symlink_to("..")
    assert "train/a/loop (a link to a folder)" in refusal(folder(root))


def test_the_folder_itself_may_be_a_link(root: Path) -> None:
    picture(root / "train/a/0.png")
    (root.parent / "link").symlink_to(root)
    assert folder(root.parent / "link").info.counts == {"train": 1}


def test_a_pipe_among_the_images_does_not_block(root: Path) -> None:
    picture(root / "train/a/0.png")
    os.mkfifo(root / "train/a/1.png")
    assert "train/a/1.png (not a regular file)" in refusal(folder(root))


@pytest.mark.parametrize(("prepare", "reason"), [
    (lambda root: None, "neither train/ nor unlabeled/"),
    (lambda root: picture(root / "0.png"), "neither train/ nor unlabeled/"),
    (lambda root: (root / "train").mkdir(), "train holds no images"),
    (lambda root: [picture(root / "train/a/0.png"), picture(root / "train/0.png")], "train/0.png (not in a class"),
    (lambda root: [picture(root / "train/a/0.png"), (root / "train/b").mkdir()], "train/b (a class folder without"),
    (lambda root: [picture(root / "train/a/0.png"), picture(root / "test/b/0.png")], "test/b (a class that train/"),
    (lambda root: [picture(root / "unlabeled/0.png"), picture(root / "test/b/0.png")], "test/b (a class that train/"),
    (lambda root: [picture(root / "train/a/0.png"), (root / "test").mkdir()], "test holds no images"),
])  # fmt: skip
def test_layouts_that_do_not_fit(root: Path, prepare: object, reason: str) -> None:
    prepare(root)  # type: ignore[operator]
    assert reason in refusal(folder(root))


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    assert "is not a folder" in refusal(folder(tmp_path / "nowhere\n"))
    with pytest.raises(HarnessError, match="folder:PATH"):
        Folder(tmp_path)


def test_test_images_stay_shut_until_asked_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(root / "train/a/0.png")
    picture(root / "train/b/0.png")
    (root / "test/b").mkdir(parents=True)
    (root / "test/b/0.png").write_bytes(b"broken")
    opened: list[Path] = []
    true_open = images._open
    monkeypatch.setattr(images, "_open", lambda path: (opened.append(path), true_open(path))[1])
    dataset = folder(root)
    assert dataset.info.counts["test"] == 1 and len(dataset.split("train")) == 2
    assert opened and not any("test" in path.relative_to(root).parts for path in opened)
    with pytest.raises(HarnessError, match=r"test/b/0.png \(not an image"):
        dataset.split("test")
    picture(root / "test/b/0.png")
    test = folder(root).split("test")
    assert test.labels is not None and test.labels.tolist() == [1], "numbered as in train/, where b is the second"


# --------------------------------------------------------------------------------------------- larger than memory


def tree(root: Path) -> None:
    """Six images that can be used, of other sizes and values."""
    noise = np.random.default_rng(0)
    for number, name in enumerate(("train/a/0", "train/b/1", "train/b/2", "unlabeled/3", "unlabeled/4", "test/b/5")):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (12 + number, 16, 3), dtype=np.uint8)).save(path)


def decoded_here(files: list[Path], side: int, grey: bool, target: Path, size: int) -> dict[Path, str]:
    pixels, wrong = images.read_images(files, side, grey)
    assert pixels.nbytes == size
    target.write_bytes(pixels.tobytes())
    return wrong


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "available_bytes", lambda: 100)


def test_worker_processes_decode_what_memory_does_not_hold(
    root: Path, little_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first worker dies of its first images; the one that replaces it makes the pixels that memory would hold."""
    tree(root)
    with monkeypatch.context() as plenty:
        plenty.setattr(mapped, "available_bytes", lambda: 1 << 40)
        expected = {name: folder(root).split(name) for name in ("unlabeled", "train")}
    started: list[int] = []
    true_start = decoding._Worker._start

    def start(worker: decoding._Worker) -> None:
        if not started:  # says that it is ready, and is gone when it is asked
            worker.process = subprocess.Popen(["head", "-c1"], stdin=-1, stdout=-1, text=True)
        else:
            true_start(worker)
        started.append(1)

    monkeypatch.setattr(decoding._Worker, "_start", start)
    dataset = folder(root)
    for name, split in expected.items():
        found = dataset.split(name)
        assert mapped.is_mapped(found.images) and torch.equal(found.images, split.images)
        assert found.images.is_contiguous(memory_format=torch.channels_last)
        assert (found.labels is None) == (split.labels is None)
        assert split.labels is None or found.labels is None or torch.equal(found.labels, split.labels)
    assert len(started) == 2
    parts = [dataset.split(name).images for name in ("unlabeled", "train")]
    assert mapped.join(parts).data_ptr() == parts[0].data_ptr(), "pretraining on both takes no copy"


def test_a_worker_names_what_it_cannot_use(
    root: Path, little_memory: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree(root)
    broken = root / "unlabeled/3.png"
    broken.write_bytes(broken.read_bytes()[:200])

    def ask(worker: decoding._Worker, start: int, files: list[str]) -> dict[int, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps([start, files]) + "\n"))
        with warnings.catch_warnings():
            decoding._serve(worker.words[0], int(worker.words[1]), worker.words[2] == "grey")
        ready, answer = capsys.readouterr().out.splitlines()
        assert ready == "ready"
        return {int(position): reason for position, reason in json.loads(answer).items()}

    monkeypatch.setattr(decoding._Worker, "_ask", ask)
    message = refusal(folder(root))
    assert "1 under" in message and "unlabeled/3.png (" in message and "crashed" not in message
    kept = root.parent / "data" / DECODED
    assert not list(kept.glob("*.pixels")) and not list(kept.glob("*.tmp")), "nothing half done is kept"


def test_a_decoder_that_always_crashes_names_its_files(
    root: Path, little_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(root)

    def ask(worker: object, start: int, files: list[str]) -> dict[int, str] | None:
        return None if any(file.endswith("4.png") for file in files) else {}

    monkeypatch.setattr(decoding._Worker, "_ask", ask)
    assert "unlabeled/4.png (its decoder crashed): mend" in refusal(folder(root))


def test_workers_that_cannot_start_are_one_line(
    root: Path, little_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(root)
    monkeypatch.setattr(decoding.sys, "executable", "/bin/false")
    assert "could not start (exit status 1)" in refusal(folder(root))


def test_decoded_files_are_used_again_checked_and_replaced(
    root: Path, little_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(root)
    decodings: list[int] = []

    def decode(files: list[Path], *facts: object) -> dict[Path, str]:
        decodings.append(len(files))
        return decoded_here(files, *facts)  # type: ignore[arg-type]

    monkeypatch.setattr(decoding, "_decode", decode)
    kept = root.parent / "data" / DECODED
    first = folder(root).split("train").images
    assert decodings == [5] and torch.equal(folder(root).split("train").images, first) and decodings == [5]
    test = folder(root).split("test").images
    assert decodings == [5, 1] and len(list(kept.glob("*.pixels"))) == 2

    damaged = max(kept.glob("*.pixels"), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    for damage in (content[:-1], bytes([content[0] ^ 1]) + content[1:]):
        damaged.unlink()
        damaged.write_bytes(damage)
        decodings.clear()
        assert torch.equal(folder(root).split("train").images, first) and decodings == [5]

    os.utime(root / "train/a/0.png", ns=(1, 1))
    assert torch.equal(folder(root).split("train").images, first) and decodings == [5, 5]
    assert not damaged.exists() and len(list(kept.glob("*.pixels"))) == 2, "the earlier file is gone, test's is not"
    assert torch.equal(folder(root).split("test").images, test) and decodings == [5, 5]
    assert folder(root, 4).split("train").images.shape[2:] == (4, 4) and len(list(kept.glob("*.pixels"))) == 3


def test_a_full_disk_is_one_line(root: Path, little_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(root)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    assert "disk full" in refusal(folder(root))
    assert not list((root.parent / "data" / DECODED).glob("*.tmp"))


def test_a_data_folder_that_cannot_be_written_is_one_line(root: Path, little_memory: None) -> None:
    tree(root)
    (root.parent / "data").write_text("a file where the data folder would be")
    assert "too many for memory" in refusal(folder(root))


def test_images_are_decoded_once_for_all_questions(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(root)
    read: list[int] = []
    true_read = images.read_images
    monkeypatch.setattr(images, "read_images", lambda files, *a: (read.append(len(files)), true_read(files, *a))[1])
    dataset = folder(root)
    for _ in range(2):
        dataset.verify()
        _ = dataset.info
    for name in ("train", "unlabeled", "test"):
        dataset.split(name)
    assert read == [5, 1]
