"""Features of your own images: what the probe of a finished run would have read from them, as one Parquet file.

One row per image in the order of paths (or of the array), one column per readout of the encoder (`gap`, `spatial`) as a
list of float32. Image files become squares of the run's size exactly as a `folder:` data set makes them; an array must
have that size already, since how to resize it is not ours to guess. `spatial_pca` is not here: it is a projection that
each probe fits to its own label budget.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from harness import arms, durable, images, runs
from harness.contracts import HarnessError
from harness.evaluation import EXTRACTION_BATCH, computing_in, extract
from harness.images import shown

if TYPE_CHECKING:
    import pyarrow as pa

NAMED_PROBLEMS = 5

# (file names or array positions, pixels (n, H, W, C) uint8) of at most EXTRACTION_BATCH images
Chunk = tuple[list[str] | list[int], np.ndarray]


def embed(run: runs.Run, source: Path, out: Path) -> int:
    """Write the features of every image of `source` to `out`; returns how many images there were.

    source: a folder (searched to any depth; hidden files and files without an image suffix are passed over), one image
        file, or an .npy file of uint8 (N, H, W) or (N, H, W, C) in the run's size and channels
    out: a new .parquet file. It is there whole or not at all. Columns: `path` (below `source`) or `index`, then one
        per readout
    Raises HarnessError naming the images that cannot be used, or what is wrong with `source` or `out`.
    """
    if out.suffix != ".parquet":
        raise HarnessError(f"{shown(out)}: features are written as Parquet; give a name that ends in .parquet")
    if out.exists():
        raise HarnessError(f"{shown(out)} exists already and is not overwritten; remove it or give another name")
    if not source.exists():
        raise HarnessError(f"{shown(source)}: there is no such file or folder")
    count = 0

    def fill(temporary: Path) -> None:
        nonlocal count
        count = _write(run, source, temporary)

    try:
        durable.write(out, fill)
    except OSError as error:
        raise HarnessError(f"cannot write {shown(out)}: {error.strerror or error}") from error
    return count


def home_device(run: runs.Run) -> torch.device:
    """The kind of device that the run was measured on, where there is one, else the CPU: it decides the last bits."""
    try:
        return arms.resolve_device(run.facts["identity"]["device"])
    except HarnessError:
        return torch.device("cpu")


def _write(run: runs.Run, source: Path, target: Path) -> int:
    """Extract batch by batch, so that memory holds one batch of images and features whatever there is to embed."""
    import pyarrow as pa
    from pyarrow import parquet

    device = home_device(run)
    encoder = run.encoder().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    by_index = source.suffix == ".npy"
    keys = pa.field("index", pa.int64()) if by_index else pa.field("path", pa.string())
    fields = [keys, *(pa.field(name, pa.list_(pa.float32())) for name in encoder.readouts)]
    schema = pa.schema(fields, metadata={"harness": json.dumps(_origin(run))})
    problems: list[str] = []
    count = 0
    with parquet.ParquetWriter(target, schema) as writer:
        for names, pixels in _array(run, source) if by_index else _files(run, source, problems):
            if problems:  # nothing will be kept: look for further broken images only
                continue
            batch = images.as_split(pixels, None).images
            with computing_in(run.config.precision, device):  # the numbers that the probe saw
                features = extract(encoder, batch, torch.arange(len(batch)), device)
            columns = [pa.array(names, keys.type), *(_lists(features[name]) for name in encoder.readouts)]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            count += len(names)
    if problems:
        more = f" and {len(problems) - NAMED_PROBLEMS} more" if len(problems) > NAMED_PROBLEMS else ""
        raise HarnessError(f"{len(problems)} images cannot be used: {', '.join(problems[:NAMED_PROBLEMS])}{more}")
    if not count:
        raise HarnessError(f"{shown(source)} holds no images ({', '.join(images.FORMAT_OF_SUFFIX)})")
    return count


def _origin(run: runs.Run) -> dict[str, Any]:
    """What made the features; kept in the file."""
    facts = run.facts
    return {
        "pretrain_id": run.pretrain_id, "weights_sha256": facts["weights_sha256"], "method": facts["method"],
        "dataset": facts["config"]["dataset_name"], "encoder": facts["config"]["encoder.name"],
        "image_size": list(run.info.image_size),
    }  # fmt: skip


def _lists(features: Tensor) -> pa.Array:
    """(n, D) float32 -> n lists of D."""
    import pyarrow as pa

    rows, width = features.shape
    return pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * width, features.reshape(-1).numpy())


# -------------------------------------------------------------------------------------------------------- arrays


def _array(run: runs.Run, path: Path) -> Iterator[Chunk]:
    """Batches of an .npy file, which is mapped, not read whole."""
    height, width = run.info.image_size
    channels = run.info.channels
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = shown(str(error).split("\n")[0][:120])
        raise HarnessError(f"{shown(path)} is not a readable .npy array: {reason}") from None
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (height, width, channels):
        raise HarnessError(
            f"{shown(path)} is {pixels.dtype} {pixels.shape}; this run takes uint8 (N, {height}, {width}, {channels})"
        )
    if not len(pixels):
        raise HarnessError(f"{shown(path)} holds no images")
    for start in range(0, len(pixels), EXTRACTION_BATCH):
        part = np.array(pixels[start : start + EXTRACTION_BATCH])
        yield list(range(start, start + len(part))), part


# --------------------------------------------------------------------------------------------------------- files


def _files(run: runs.Run, source: Path, problems: list[str]) -> Iterator[Chunk]:
    """Batches of decoded image files; those that cannot be used go into `problems`, by name."""
    (height, width), channels = run.info.image_size, run.info.channels
    if height != width or channels not in (1, 3):
        raise HarnessError(
            f"this run takes {height} x {width} images of {channels} channels, which image files are not turned into; "
            f"give an .npy array of uint8 (N, {height}, {width}, {channels})"
        )
    top = source if source.is_dir() else source.parent
    files = sorted(_walk(source, problems), key=lambda path: path.relative_to(top).as_posix())

    def decode(path: Path) -> np.ndarray | None:
        try:
            return images.read_image(path, height, grey=channels == 1)
        except images.UnreadableImage as error:
            problems.append(f"{shown(path.relative_to(top))} ({error})")
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders release the interpreter's lock
        for start in range(0, len(files), EXTRACTION_BATCH):
            chunk = files[start : start + EXTRACTION_BATCH]
            decoded = [pixels for pixels in pool.map(decode, chunk) if pixels is not None]
            problems.sort()
            if decoded:
                yield [shown(path.relative_to(top)) for path in chunk], np.stack(decoded)


def _walk(source: Path, problems: list[str]) -> Iterator[Path]:
    """Image files at or below `source`; a link that leads out is a problem, one to a folder is passed over."""
    if not source.is_dir():
        yield source
        return
    inside = source.resolve()

    def unlisted(error: OSError) -> None:
        problems.append(f"{shown(Path(error.filename).relative_to(source))}/ ({error.strerror})")

    for parent, folders, names in os.walk(source, onerror=unlisted):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if name.startswith(".") or path.suffix.lower() not in images.FORMAT_OF_SUFFIX:
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                problems.append(f"{shown(path.relative_to(source))} (a link out of the folder)")
                continue
            yield path
