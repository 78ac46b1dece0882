"""Images as the harness keeps them, and image files read safely.

Decoded images are uint8 with NHWC bytes underneath: this module makes such splits, measures their statistics exactly
and digests them. Image files come from strangers, so each is looked at (kind, size, name) before a pixel is decoded,
and whatever is wrong with one becomes an `UnreadableImage` with a reason instead of a decoder's own exception.
"""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps

from harness.contracts import HarnessError, Split

# Pillow's own name of each format we open, by file suffix; every other format (PSD, EPS, PDF, ...) stays shut.
FORMAT_OF_SUFFIX = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".bmp": "BMP", ".gif": "GIF", ".webp": "WEBP",
    ".tif": "TIFF", ".tiff": "TIFF", ".ppm": "PPM", ".pgm": "PPM", ".pbm": "PPM", ".pnm": "PPM",
}  # fmt: skip
FORMATS = tuple(sorted(set(FORMAT_OF_SUFFIX.values())))
# A decoded pixel costs up to 8 bytes while it is converted: 64 Mpixel is half a gigabyte, and no photograph is larger.
MAX_PIXELS = 64 * 1024 * 1024
GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"})
MAX_THREADS = 16  # Pillow decodes outside of Python's lock
CHUNK_BYTES = 64 * 1024 * 1024


class UnreadableImage(HarnessError):
    """One image file that cannot be used; the text is the reason alone, without the file's name."""


def shown(name: object) -> str:
    """Return a file name or path fit for one line of a terminal: escaped if it holds anything unprintable."""
    text = os.fspath(name) if isinstance(name, os.PathLike) else str(name)
    return text if text.isprintable() else repr(text)


# ------------------------------------------------------------------------------------------------- decoded images


def as_split(pixels: np.ndarray, labels: np.ndarray | None) -> Split:
    """Wrap arrays as a Split without copying the pixels.

    pixels: (N, H, W, C) uint8, C-contiguous and writable; labels: (N,) integers or None
    """
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return Split(images, None if labels is None else torch.from_numpy(labels.astype(np.int64)))


def _chunks(images: torch.Tensor) -> Iterator[np.ndarray]:
    """NHWC pieces of (N, C, H, W) uint8 images of about CHUNK_BYTES each, contiguous; views wherever possible."""
    pixels = images.permute(0, 2, 3, 1)
    step = max(1, CHUNK_BYTES // max(1, pixels[:1].numel()))
    for start in range(0, len(pixels), step):
        yield np.ascontiguousarray(pixels[start : start + step].numpy())


def channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return exact (mean, std) per channel as fractions of 1; images: (N, C, H, W) uint8.

    Taken from integer histograms, so the result depends on neither the order nor the chunking of the images. std is
    at least 1e-3, and 1 for a channel that never changes (there is nothing to scale).
    """
    channels = images.shape[1]
    histogram = np.zeros((channels, 256), dtype=np.int64)
    for chunk in _chunks(images):
        for channel in range(channels):
            # torch counts uint8 directly; numpy would first widen every pixel to 8 bytes.
            counted = torch.bincount(torch.from_numpy(chunk[..., channel].reshape(-1)), minlength=256)
            histogram[channel] += counted.numpy()
    means, stds = [], []
    for counts in histogram.tolist():
        total = sum(counts)
        first = sum(value * count for value, count in enumerate(counts))
        second = sum(value * value * count for value, count in enumerate(counts))
        variance = (second * total - first * first) / (total * total)  # integers until the division: exact
        means.append(first / total / 255)
        stds.append(max(variance**0.5 / 255, 1e-3) if variance > 0 else 1.0)
    return tuple(means), tuple(stds)


def digest_split(split: Split) -> str:
    """Return the SHA-256 of a decoded split: shape, NHWC bytes, labels. Two equal digests are the same data."""
    count, channels, height, width = split.images.shape
    labels = "none" if split.labels is None else "int64"
    digest = hashlib.sha256(f"split uint8 NHWC {count} {height} {width} {channels} labels {labels}\n".encode())
    for chunk in _chunks(split.images):
        digest.update(chunk.data)
    if split.labels is not None:
        digest.update(np.ascontiguousarray(split.labels.numpy(), dtype="<i8").data)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------- image files


@dataclass(frozen=True)
class ImageFacts:
    """What the header of an image file says: its short side in pixels, and whether it is grey."""

    short_side: int
    grey: bool


def _refuse_special_files(path: Path) -> None:
    """Raise unless `path` is a regular file with bytes in it: opening a pipe or a device could block for ever."""
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise UnreadableImage("not a regular file")
    if facts.st_size == 0:
        raise UnreadableImage("empty file")


def _open(path: Path) -> Image.Image:
    """Open lazily: header only, known formats only, suffix and content in agreement, bounded size."""
    _refuse_special_files(path)
    image = Image.open(path, formats=FORMATS)
    expected = FORMAT_OF_SUFFIX.get(path.suffix.lower())
    # A phone's JPEG with a second picture inside (MPO) is a JPEG to everybody else.
    found = "JPEG" if image.format == "MPO" else image.format
    width, height = image.size
    if expected is not None and found != expected:
        image.close()
        raise UnreadableImage(f"a {found} file named {shown(path.suffix)}: rename it")
    if width * height > MAX_PIXELS or min(width, height) < 1:
        image.close()
        raise UnreadableImage(f"{width} x {height} pixels: more than the {MAX_PIXELS:,} this harness decodes")
    if image.mode == "F":
        image.close()
        raise UnreadableImage("floating-point pixels: their range is unknown, save it as 8 or 16 bit")
    return image


def _reason(error: BaseException) -> str:
    """One printable line for whatever a decoder raised."""
    if isinstance(error, UnreadableImage):
        return str(error)
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, Image.DecompressionBombError):
        return "more pixels than this harness decodes"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or not of a format that is read"
    return shown(str(error).split("\n")[0][:120] or type(error).__name__)


def inspect_image(path: Path) -> ImageFacts:
    """Read the header of one image file. Raises UnreadableImage with the reason."""
    try:
        with _open(path) as image:
            return ImageFacts(min(image.size), image.mode in GREY_MODES)
    except Exception as error:  # decoders raise anything at all on hostile bytes
        raise UnreadableImage(_reason(error)) from error


def read_image(path: Path, side: int, grey: bool) -> np.ndarray:
    """Decode one image file to (side, side, C) uint8, C = 1 if `grey` else 3.

    Turned as its EXIF says, transparency laid over white, 16-bit values scaled to 8, the first frame of an animation.
    The short side is scaled to `side` and the centre square kept, bilinear with antialiasing, in one step, so that a
    long thin image is never blown up as a whole. Raises UnreadableImage with the reason.
    """
    try:
        with _open(path) as image:
            image.load()
            flat = _flatten(ImageOps.exif_transpose(image), grey)
            width, height = flat.size
            short = min(width, height)
            left, top = (width - short) / 2, (height - short) / 2
            box = (left, top, left + short, top + short)
            square = flat.resize((side, side), Image.Resampling.BILINEAR, box=box)
            return np.asarray(square, dtype=np.uint8).reshape(side, side, 1 if grey else 3)
    except Exception as error:
        raise UnreadableImage(_reason(error)) from error


def _flatten(image: Image.Image, grey: bool) -> Image.Image:
    """Any mode -> "L" or "RGB", transparency over white."""
    if image.mode.startswith("I"):
        # 16-bit images (Pillow's convert would clip at 255 instead of scaling).
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, coloured)
    return image.convert("L" if grey else "RGB")


# --------------------------------------------------------------------------------------------------- many files

Result = TypeVar("Result")


def _each(files: Sequence[Path], read: Callable[[Path], Result]) -> Iterator[tuple[int, Result | UnreadableImage]]:
    """(position, result or what is wrong) for every file, in order, on several threads."""

    def attempt(file: Path) -> Result | UnreadableImage:
        try:
            return read(file)
        except UnreadableImage as error:
            return error

    workers = min(MAX_THREADS, os.cpu_count() or 1)
    # Filters are global, so they are set once here and not in the threads. Pillow warns about sizes (ours is the lower
    # limit) and about damaged EXIF blocks (the pixels decide).
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("ignore")
        for start in range(0, len(files), 1024):  # bounds what is decoded ahead
            yield from enumerate(pool.map(attempt, files[start : start + 1024]), start)


def inspect_images(files: Sequence[Path]) -> tuple[dict[Path, ImageFacts], dict[Path, str]]:
    """Read the headers of many image files: ({file: facts}, {file: why it cannot be used})."""
    facts: dict[Path, ImageFacts] = {}
    wrong: dict[Path, str] = {}
    for position, result in _each(files, inspect_image):
        if isinstance(result, UnreadableImage):
            wrong[files[position]] = str(result)
        else:
            facts[files[position]] = result
    return facts, wrong


def read_images(files: Sequence[Path], side: int, grey: bool) -> tuple[np.ndarray, dict[Path, str]]:
    """Decode many image files as `read_image` does: ((N, side, side, C) uint8, {file: why it cannot be used}).

    All files are tried before this returns, so that everything wrong can be reported at once; the pixels of a file
    that cannot be used are 0.
    """
    pixels = np.zeros((len(files), side, side, 1 if grey else 3), dtype=np.uint8)
    wrong: dict[Path, str] = {}
    for position, result in _each(files, lambda file: read_image(file, side, grey)):
        if isinstance(result, UnreadableImage):
            wrong[files[position]] = str(result)
        else:
            pixels[position] = result
    return pixels, wrong
