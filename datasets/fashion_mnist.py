"""Fashion-MNIST: 70,000 photographs of clothes, 28x28, grey, in MNIST's format.

Source: H. Xiao, K. Rasul, R. Vollgraf, Fashion-MNIST: a novel image dataset for benchmarking machine learning
algorithms, arXiv:1708.07747, 2017.
"""

from __future__ import annotations

from harness import formats
from harness.contracts import PublishedFile

# The authors' bucket by its https name: torchvision's address for it (the bucket as a web site) speaks http only. It
# could not be reached from where this was written; the digests below decide whether what it sends is right.
MIRROR = "https://fashion-mnist.s3.eu-central-1.amazonaws.com"


def _pair(name: str, gz_size: int, gz_sha256: str, gz_md5: str, size: int, sha256: str) -> tuple[PublishedFile, ...]:
    """One file as published (.gz) and as it is when unpacked (recorded here from a .gz of the published digest)."""
    packed = f"FashionMNIST/raw/{name}.gz"
    return (
        PublishedFile(packed, {"sha256": gz_sha256, "md5": gz_md5}, gz_size, f"{MIRROR}/{name}.gz"),
        PublishedFile(f"FashionMNIST/raw/{name}", {"sha256": sha256}, size, archive=packed),
    )


class FashionMNIST(formats.IdxDataset):
    """Fashion-MNIST photographs of clothes."""

    name = "fashion_mnist"
    title = "Fashion-MNIST"
    licence = "MIT (Zalando SE)"
    citation = (
        "H. Xiao, K. Rasul, R. Vollgraf. Fashion-MNIST: a novel image dataset for benchmarking machine learning "
        "algorithms. arXiv:1708.07747, 2017."
    )
    default_encoder = "paper_mnist"
    mirror_keeps_label = True
    caution = "centred 28-pixel grey images: nothing is claimed beyond this data set"
    classes = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip
    folders = ("FashionMNIST/raw", "fashion-mnist", "fashion_mnist", "FashionMNIST", "")
    published = (
        *_pair(
            "train-images-idx3-ubyte", 26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d", 47040016,
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        ),
        *_pair(
            "train-labels-idx1-ubyte", 29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "25c81989df183df01b3e8a0aad5dffbe", 60008,
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        ),
        *_pair(
            "t10k-images-idx3-ubyte", 4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "bef4ecab320f06d8554ea6380940ec79", 7840016,
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        ),
        *_pair(
            "t10k-labels-idx1-ubyte", 5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            "bb300cfdad3c16e7a12a480ee83cd310", 10008,
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    )  # fmt: skip
