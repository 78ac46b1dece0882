"""MNIST: 70,000 handwritten digits, 28x28, grey.

Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Gradient-based learning applied to document recognition, Proc. IEEE
86(11), 1998. Fetched from the mirror that torchvision names; read plain or .gz.
"""

from __future__ import annotations

from harness import formats
from harness.contracts import PublishedFile

MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist"


def _pair(name: str, gz_size: int, gz_sha256: str, gz_md5: str, size: int, md5: str) -> tuple[PublishedFile, ...]:
    """One file as published (.gz) and as it is when unpacked. SHA-256 as torchvision's prototypes listed them."""
    packed = f"MNIST/raw/{name}.gz"
    return (
        PublishedFile(packed, {"sha256": gz_sha256, "md5": gz_md5}, gz_size, f"{MIRROR}/{name}.gz"),
        PublishedFile(f"MNIST/raw/{name}", {"md5": md5}, size, archive=packed),
    )


class MNIST(formats.IdxDataset):
    """MNIST handwritten digits."""

    name = "mnist"
    title = "MNIST"
    licence = "none stated by its authors; built from NIST Special Databases 1 and 3 (U.S. government work)"
    citation = (
        "Y. LeCun, L. Bottou, Y. Bengio, P. Haffner. Gradient-based learning applied to document recognition. "
        "Proceedings of the IEEE 86(11), 1998."
    )
    default_encoder = "paper_mnist"
    mirror_keeps_label = False
    caution = "centred 28-pixel grey images: nothing is claimed beyond this data set"
    classes = tuple("0123456789")
    folders = ("MNIST/raw", "mnist", "MNIST", "")
    published = (
        *_pair(
            "train-images-idx3-ubyte", 9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "f68b3c2dcbeaaa9fbdd348bbdeb94873", 47040016, "6bbc9ace898e44ae57da46a324031adb",
        ),
        *_pair(
            "train-labels-idx1-ubyte", 28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "d53e105ee54ea40749a09fcbcd1e9432", 60008, "a25bea736e30d166cdddb491f175f624",
        ),
        *_pair(
            "t10k-images-idx3-ubyte", 1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "9fb629c4189551a2d022fa330f9573f3", 7840016, "2646ac647ad5339dbf082846283269ea",
        ),
        *_pair(
            "t10k-labels-idx1-ubyte", 4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            "ec29112dd5afa0611ce80d1b7f02629c", 10008, "27ae3e4e09519cfbb04c329615203637",
        ),
    )  # fmt: skip
