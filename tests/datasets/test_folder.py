"""folder:PATH: order, labels, sizes and channels; every hostile thing in it named before any work."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from harness import images
from harness.contracts import HarnessError
from harness.datasets.folder import Folder


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
