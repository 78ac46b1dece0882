"""CIFAR-10: 60,000 colour photographs of ten kinds of things, 32x32.

Source: A. Krizhevsky, Learning multiple layers of features from tiny images, technical report, University of Toronto,
2009. Read from the python version (pickles, through a reader that can build nothing but arrays), else the binary one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from harness import formats
from harness.contracts import PublishedFile

ARCHIVE = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"
BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))


def _member(name: str, md5: str) -> PublishedFile:
    return PublishedFile(f"{FOLDER}/{name}", {"md5": md5}, archive=ARCHIVE)


class CIFAR10(formats.CifarDataset):
    """CIFAR-10 photographs of ten classes."""

    name = "cifar10"
    title = "CIFAR-10"
    licence = "none stated by its author; cite the technical report"
    citation = "A. Krizhevsky. Learning multiple layers of features from tiny images. University of Toronto, 2009."
    default_encoder = "paper_cifar10"
    mirror_keeps_label = True
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    folders = (FOLDER, "cifar-10-batches-bin")
    split_files: ClassVar[Mapping[str, tuple[str, ...]]] = {"train": BATCHES, "test": ("test_batch",)}
    label_key = "labels"
    binary_labels = 1
    binary_folder = "cifar-10-batches-bin"
    binary_files: ClassVar[Mapping[str, str]] = {name: f"{name}.bin" for name in (*BATCHES, "test_batch")}
    published = (
        PublishedFile(
            ARCHIVE,
            {
                "sha256": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
                "md5": "c58f30108f718f92721af3b95e74349a",
            },
            170498071,
            f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}",
        ),
        _member("data_batch_1", "c99cafc152244af753f735de768cd75f"),
        _member("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
        _member("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
        _member("data_batch_4", "634d18415352ddfa80567beed471001a"),
        _member("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
        _member("test_batch", "40351d587109b95175f43aff81a1287e"),
        # Never read here (the class names are above), but torchvision wants it in a folder it is to accept.
        _member("batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),
    )
