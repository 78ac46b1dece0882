"""Readers of the formats that several data sets share: idx (MNIST and its kin) and CIFAR's pickles and records.

Every reader checks what it is told (magic numbers, lengths, label ranges) before it believes it and raises
`BrokenFile`. CIFAR's files are pickles: they are read with an unpickler that knows plain containers and inert
stand-ins for numpy's arrays, and can build nothing else, whatever the file asks for.
"""

from __future__ import annotations

import gzip
import math
import pickle
import pickletools
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from harness import images
from harness.contracts import PublishedFile, Split
from harness.published import BrokenFile, PublishedDataset

__all__ = ["BrokenFile", "CifarDataset", "IdxDataset", "PublishedDataset", "check_labels", "read_idx"]


# ----------------------------------------------------------------------------------------------------------- idx


class IdxDataset(PublishedDataset):
    """MNIST's layout: an image and a label file per split, in Y. LeCun's idx format, plain or gzipped."""

    side = 28
    channels = 1
    split_files: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
    }

    def read(self, split: str) -> Split:
        """Decode one split, uint8 (N, 1, 28, 28)."""
        image_path, label_path = (self.require(name) for name in self.split_files[split])
        pixels = read_idx(image_path, 3)
        labels = read_idx(label_path, 1)
        if pixels.shape[1:] != (self.side, self.side):
            raise BrokenFile(image_path, f"images of {pixels.shape[1]} x {pixels.shape[2]}, not {self.side} pixels")
        check_labels(label_path, labels, len(pixels), len(self.classes))
        return images.as_split(pixels[..., None], labels)

    def count(self, split: str) -> int:
        """The number in the header of the label file."""
        path = self.require(self.split_files[split][1])
        with open_plain_or_gz(path) as stream:
            return _idx_shape(path, stream, 1)[0]

    def check(self, name: str, path: Path) -> None:
        """Raise BrokenFile unless it is a whole idx file."""
        read_idx(path, 3 if "idx3" in name else 1)


def check_labels(path: Path, labels: np.ndarray, count: int, num_classes: int) -> None:
    """Raise BrokenFile unless there are `count` labels (more than none), all in 0..num_classes-1."""
    if len(labels) != count or not count:
        raise BrokenFile(path, f"{len(labels)} labels for {count} images")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise BrokenFile(path, f"labels {labels.min()} to {labels.max()}, where {num_classes} classes are known")


def open_plain_or_gz(path: Path) -> IO[bytes]:
    """Open a file for reading, through gzip if its name ends in .gz."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _idx_shape(path: Path, stream: IO[bytes], dimensions: int) -> tuple[int, ...]:
    """Read and check an idx header: two zero bytes, type 8 (uint8), the number of dimensions, each as 4 bytes."""
    try:
        header = stream.read(4 + 4 * dimensions)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BrokenFile(path, error) from error
    if len(header) < 4 + 4 * dimensions or header[:4] != bytes([0, 0, 8, dimensions]):
        raise BrokenFile(path, f"not an idx file of unsigned bytes in {dimensions} dimensions")
    return tuple(int.from_bytes(header[start : start + 4], "big") for start in range(4, len(header), 4))


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an idx file of unsigned bytes to a writable array of `dimensions` dimensions. Raises BrokenFile."""
    with open_plain_or_gz(path) as stream:
        shape = _idx_shape(path, stream, dimensions)
        size = math.prod(shape)
        # deflate packs at most 1032 to 1: a header that promises more than that is not worth the memory
        if size > path.stat().st_size * (1032 if path.suffix == ".gz" else 1):
            raise BrokenFile(path, f"its header promises {size:,} bytes, more than the file can hold")
        values = np.empty(size, dtype=np.uint8)
        try:
            got = 0
            while got < size and (step := stream.readinto(values[got:])):  # type: ignore[attr-defined]
                got += step
            rest = stream.read(1)  # also makes gzip check its checksum
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise BrokenFile(path, error) from error
    if got != size or rest:
        raise BrokenFile(path, f"its header promises {size:,} bytes, it holds {'more' if rest else f'{got:,}'}")
    return values.reshape(shape)


# --------------------------------------------------------------------------------------------------------- CIFAR

ROW_BYTES = 3 * 32 * 32


class CifarDataset(PublishedDataset):
    """CIFAR's layout: 32x32 RGB, planes in the order red, green, blue; the python version, else the binary one.

    label_key: name of the labels in a pickle; binary_labels: label bytes before each image of the binary version, the
        last of which counts; binary_folder and binary_files: where the binary version lies, {python name: its name}
    """

    side = 32
    channels = 3
    label_key: ClassVar[str]
    binary_labels: ClassVar[int]
    binary_folder: ClassVar[str]
    binary_files: ClassVar[Mapping[str, str]]

    def _variant(self, folder: Path, name: str) -> Path | None:
        path = folder / name
        if folder == self.root / self.binary_folder:
            path = folder / self.binary_files.get(name, name)
        return path if path.is_file() else None

    def read(self, split: str) -> Split:
        """Decode one split, uint8 (N, 3, 32, 32)."""
        parts = [self._read_file(self.require(name)) for name in self.split_files[split]]
        pixels = np.empty((sum(len(rows) for rows, _ in parts), 32, 32, 3), dtype=np.uint8)
        start = 0
        for rows, _ in parts:
            pixels[start : start + len(rows)] = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            start += len(rows)
        return images.as_split(pixels, np.concatenate([labels for _, labels in parts]))

    def _read_file(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """(N, 3072) uint8 rows and (N,) int64 labels of one file of either version."""
        rows, labels = self._read_binary(path) if path.suffix == ".bin" else read_cifar_pickle(path, self.label_key)
        check_labels(path, labels, len(rows), len(self.classes))
        return rows, labels

    def _read_binary(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        record = self.binary_labels + ROW_BYTES
        values = np.fromfile(path, dtype=np.uint8)
        if not len(values) or len(values) % record:
            raise BrokenFile(path, f"{len(values):,} bytes are no whole number of {record}-byte records")
        records = values.reshape(-1, record)
        return records[:, self.binary_labels :], records[:, self.binary_labels - 1].astype(np.int64)

    def count(self, split: str) -> int:
        """Rows in a split: from the file size, or from a pickle's shape with the image bytes skipped unread."""
        paths = [self.require(name) for name in self.split_files[split]]
        record = self.binary_labels + ROW_BYTES
        return sum(p.stat().st_size // record if p.suffix == ".bin" else _pickled_rows(p) for p in paths)

    def check(self, name: str, path: Path) -> None:
        """Raise BrokenFile unless rows and labels can be read."""
        self._read_file(path)

    def member_target(self, file: PublishedFile) -> Path:
        """Always the python version's own folder: what is fetched must not land among files of the binary one."""
        return self.root / file.name


class _Array:
    """Stands in for a pickled numpy array: keeps its state as plain values and runs no numpy code on it."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


class _DType:
    """Stands in for a pickled numpy.dtype: keeps the code (`u1`), ignores the rest."""

    def __init__(self, code: object = "", *_: object) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state: object) -> None:
        pass


def _from_buffer(data: object, dtype: object, shape: object, order: object) -> _Array:
    array = _Array()
    array.state = (1, shape, dtype, order != "C", bytes(data) if isinstance(data, (bytes, bytearray)) else None)
    return array


def _encode(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("text in an unexpected encoding")
    return text.encode("latin1")  # how Python 3 writes bytes in the old protocols, which had none


class _Sealed:
    """A callable that a pickle can call but not alter (its BUILD opcode would set attributes on a bare function)."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it tries to alter the reader")


class _CifarUnpickler(pickle.Unpickler):
    """Builds dicts, lists, strings, numbers and the stand-ins above; refuses every other name."""

    known: ClassVar[dict[tuple[str, str], _Sealed]] = {
        ("numpy.core.multiarray", "_reconstruct"): _Sealed(lambda *_: _Array()),
        ("numpy._core.multiarray", "_reconstruct"): _Sealed(lambda *_: _Array()),
        ("numpy.core.numeric", "_frombuffer"): _Sealed(_from_buffer),
        ("numpy._core.numeric", "_frombuffer"): _Sealed(_from_buffer),
        ("numpy", "ndarray"): _Sealed(lambda *_: _Array()),
        ("numpy", "dtype"): _Sealed(_DType),
        ("_codecs", "encode"): _Sealed(_encode),
    }

    def find_class(self, module: str, name: str) -> _Sealed:
        """Return a stand-in. Raises UnpicklingError for any name but those of numpy's arrays."""
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")
        return self.known[module, name]


def read_cifar_pickle(path: Path, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one CIFAR pickle to (N, 3072) uint8 rows and (N,) int64 labels. Raises BrokenFile; runs no code from it."""
    try:
        with open(path, "rb") as file:
            content = _CifarUnpickler(file, encoding="bytes").load()
        if not isinstance(content, dict):
            raise ValueError("it holds no dictionary")
        table = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
        rows = _rows(table.get("data"))
        labels = table.get(label_key)
        if not isinstance(labels, list) or any(type(label) is not int for label in labels):
            raise ValueError(f"it has no list of whole numbers called {label_key}")
        return rows, np.array(labels, dtype=np.int64)
    except OSError:
        raise
    except Exception as error:  # hostile pickles make the unpickler raise nearly anything
        raise BrokenFile(path, error or type(error).__name__) from error


def _rows(array: object) -> np.ndarray:
    """Turn a stand-in into (N, 3072) uint8. Raises ValueError unless type, order, shape and length agree."""
    if not isinstance(array, _Array) or len(array.state) != 5:
        raise ValueError("it has no array called data")
    _, shape, dtype, fortran, data = array.state
    if not isinstance(dtype, _DType) or dtype.code not in ("u1", "|u1", "uint8") or fortran:
        raise ValueError("its data are not rows of unsigned bytes")
    if not isinstance(shape, tuple) or len(shape) != 2 or shape[1] != ROW_BYTES or not isinstance(data, bytes):
        raise ValueError(f"its data are not rows of {ROW_BYTES} bytes")
    if shape[0] * ROW_BYTES != len(data):
        raise ValueError(f"it has {len(data):,} bytes for {shape[0]} rows of {ROW_BYTES}")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


class _Skimmer:
    """A file whose long reads are skipped, so that a pickle's structure is seen without its images."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.readline = file.readline

    def read(self, size: int) -> bytes:
        if size < ROW_BYTES:
            return self.file.read(size)
        self.file.seek(size, 1)
        return bytes(size)


def _pickled_rows(path: Path) -> int:
    """N of the (N, 3072) array in a CIFAR pickle, from its opcodes. Raises BrokenFile when there is none."""
    before: object = None
    try:
        with open(path, "rb") as file:
            for _, argument, _ in pickletools.genops(_Skimmer(file)):  # type: ignore[arg-type]
                if argument == ROW_BYTES and type(before) is int:
                    return before
                before = argument
    except (ValueError, MemoryError, OverflowError) as error:
        raise BrokenFile(path, error) from error
    raise BrokenFile(path, f"no array of {ROW_BYTES}-byte rows")
