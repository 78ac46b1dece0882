"""Writers of tiny data sets in exactly the formats their publishers use; for tests, through the fixture of this name.

Every writer takes the data folder, a numpy Generator and counts, puts files where torchvision's conventions say, and
returns what it wrote as {split: (images (N, H, W, C) uint8, labels (N,) or None)}. Labels go round all classes, so
that every class has members as soon as there are as many images as classes.
"""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Written = dict[str, tuple[np.ndarray, np.ndarray | None]]


def pictures(rng: np.random.Generator, count: int, side: int, channels: int, num_classes: int = 10) -> tuple[Any, Any]:
    """(images (count, side, side, channels) uint8, labels (count,)); brightness follows the class: it is learnable."""
    labels = np.arange(count) % num_classes
    noise = rng.integers(0, 96, (count, side, side, channels))
    return (noise + (labels * 159 // max(1, num_classes - 1))[:, None, None, None]).astype(np.uint8), labels


def idx_bytes(values: np.ndarray) -> bytes:
    """An array as an idx file of unsigned bytes."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return header + values.astype(np.uint8).tobytes()


def write_idx(
    root: Path, rng: np.random.Generator, num_train: int = 40, num_test: int = 20, gz: bool = False,
    folder: str = "MNIST/raw",
) -> Written:  # fmt: skip
    """MNIST or Fashion-MNIST (folder="FashionMNIST/raw"; "" for files directly in root), plain or gzipped."""
    written: Written = {}
    (root / folder).mkdir(parents=True, exist_ok=True)
    for split, prefix, count in (("train", "train", num_train), ("test", "t10k", num_test)):
        images, labels = pictures(rng, count, 28, 1)
        for name, values in ((f"{prefix}-images-idx3-ubyte", images[..., 0]), (f"{prefix}-labels-idx1-ubyte", labels)):
            content = idx_bytes(values)
            path = root / folder / (f"{name}.gz" if gz else name)
            path.write_bytes(gzip.compress(content, 1) if gz else content)
        written[split] = (images, labels)
    return written


def _rows(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), 3072)


def _pickle(path: Path, images: np.ndarray, labels: dict[str, np.ndarray], protocol: int) -> None:
    table: dict[str, Any] = {"data": _rows(images), "batch_label": "a tiny batch"}
    table |= {key: [int(label) for label in values] for key, values in labels.items()}
    table["filenames"] = [f"image_s_{number:06d}.png" for number in range(len(images))]
    # The publisher's pickles come from Python 2, whose strings read back as bytes: so are the keys here.
    path.write_bytes(pickle.dumps({key.encode(): value for key, value in table.items()}, protocol=protocol))


def write_cifar10(
    root: Path, rng: np.random.Generator, num_train: int = 40, num_test: int = 20, protocol: int = 2,
    binary: bool = False,
) -> Written:  # fmt: skip
    """CIFAR-10 in five batches and a test batch: pickles of the python version, or records of the binary one."""
    written: Written = {"train": pictures(rng, num_train, 32, 3), "test": pictures(rng, num_test, 32, 3)}
    folder = root / ("cifar-10-batches-bin" if binary else "cifar-10-batches-py")
    folder.mkdir(parents=True, exist_ok=True)
    train_images, train_labels = written["train"]
    parts = list(zip(np.array_split(train_images, 5), np.array_split(train_labels, 5), strict=True))
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    for name, (images, labels) in zip(names, [*parts, written["test"]], strict=True):
        if binary:
            content = np.concatenate([labels[:, None].astype(np.uint8), _rows(images)], axis=1)
            (folder / f"{name}.bin").write_bytes(content.tobytes())
        else:
            _pickle(folder / name, images, {"labels": labels}, protocol)
    return written


def write_cifar100(
    root: Path, rng: np.random.Generator, num_train: int = 200, num_test: int = 100, protocol: int = 2,
    binary: bool = False,
) -> Written:  # fmt: skip
    """CIFAR-100: one file per split, with coarse labels beside the fine ones."""
    written: Written = {}
    folder = root / ("cifar-100-binary" if binary else "cifar-100-python")
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", num_train), ("test", num_test)):
        images, labels = pictures(rng, count, 32, 3, num_classes=100)
        if binary:
            both = np.stack([labels // 5, labels], axis=1).astype(np.uint8)
            (folder / f"{split}.bin").write_bytes(np.concatenate([both, _rows(images)], axis=1).tobytes())
        else:
            _pickle(folder / split, images, {"coarse_labels": labels // 5, "fine_labels": labels}, protocol)
        written[split] = (images, labels)
    return written


def write_stl10(
    root: Path, rng: np.random.Generator, num_unlabeled: int = 30, num_train: int = 40, num_test: int = 20,
    fold_size: int = 20,
) -> Written:  # fmt: skip
    """STL-10's binary version: planes stored column by column, labels from 1, ten folds as lines of positions."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True, exist_ok=True)
    written: Written = {}
    for split, count in (("unlabeled", num_unlabeled), ("train", num_train), ("test", num_test)):
        images, labels = pictures(rng, count, 96, 3)
        (folder / f"{split}_X.bin").write_bytes(np.ascontiguousarray(images.transpose(0, 3, 2, 1)).tobytes())
        if split != "unlabeled":
            (folder / f"{split}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
        written[split] = (images, None if split == "unlabeled" else labels)
    folds = [np.sort(rng.permutation(num_train)[:fold_size]) for _ in range(10)]
    lines = [" ".join(str(position) for position in fold) + " \n" for fold in folds]
    (folder / "fold_indices.txt").write_text("".join(lines))
    return written


def write_image_folder(
    root: Path, rng: np.random.Generator, classes: tuple[str, ...] = ("cat", "dog"), num_train: int = 12,
    num_test: int = 6, num_unlabeled: int = 0, size: tuple[int, int] = (40, 32), grey: bool = False,
    suffix: str = ".png",
) -> Written:  # fmt: skip
    """train/CLASS/, test/CLASS/ and unlabeled/ of image files, `size` = (width, height); 0 images: no such folder."""
    width, height = size
    written: Written = {}
    for split, count in (("unlabeled", num_unlabeled), ("train", num_train), ("test", num_test)):
        if not count:
            continue
        labels = np.arange(count) % len(classes)
        images = rng.integers(0, 96, (count, height, width, 1 if grey else 3)) + 60 * labels[:, None, None, None]
        images = images.astype(np.uint8)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = root / split if split == "unlabeled" else root / split / classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0] if grey else image).save(folder / f"{number:04d}{suffix}")
        written[split] = (images, None if split == "unlabeled" else labels)
    return written
