"""CIFAR-100: 60,000 colour photographs of a hundred kinds of things (the fine labels), 32x32.

Source: A. Krizhevsky, Learning multiple layers of features from tiny images, technical report, University of Toronto,
2009. Read from the python version (pickles, through a reader that can build nothing but arrays), else the binary one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from harness import formats
from harness.contracts import PublishedFile

ARCHIVE = "cifar-100-python.tar.gz"
FOLDER = "cifar-100-python"


def _member(name: str, md5: str) -> PublishedFile:
    return PublishedFile(f"{FOLDER}/{name}", {"md5": md5}, archive=ARCHIVE)


class CIFAR100(formats.CifarDataset):
    """CIFAR-100 photographs of a hundred classes."""

    name = "cifar100"
    title = "CIFAR-100"
    licence = "none stated by its author; cite the technical report"
    citation = "A. Krizhevsky. Learning multiple layers of features from tiny images. University of Toronto, 2009."
    default_encoder = "paper_cifar10"
    mirror_keeps_label = True
    classes = (
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
        "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee",
        "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant",
        "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower",
        "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom",
        "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate",
        "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark",
        "shrew", "skunk", "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower",
        "sweet_pepper", "table", "tank", "telephone", "television", "tiger", "tractor", "train", "trout", "tulip",
        "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
    )  # fmt: skip
    folders = (FOLDER, "cifar-100-binary")
    split_files: ClassVar[Mapping[str, tuple[str, ...]]] = {"train": ("train",), "test": ("test",)}
    label_key = "fine_labels"
    binary_labels = 2  # the coarse label, then the fine one
    binary_folder = "cifar-100-binary"
    binary_files: ClassVar[Mapping[str, str]] = {"train": "train.bin", "test": "test.bin"}
    published = (
        PublishedFile(
            ARCHIVE,
            {
                "sha256": "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
                "md5": "eb9058c3a382ffc7106e4002c42a8d85",
            },
            169001437,
            f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}",
        ),
        _member("train", "16019d7e3df5f24257cddd939b257f8d"),
        _member("test", "f0ef6b0ae62326f3e7ffdfab6717acfc"),
        # Never read here (the class names are above), but torchvision wants it in a folder it is to accept.
        _member("meta", "7973b15100ade9c7d40fb424638fde48"),
    )
