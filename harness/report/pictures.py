"""The pictures that runs left beside their weights, made small enough for one page.

Of each method on each data set the run with the lowest seed that left any; a cap on the whole, and what did not fit is
said. Where only rows are at hand, there are none.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.contracts import Row
from harness.runs import checkpoint_folder

MOST_BYTES = 3_000_000  # of all pictures of a page, as they stand in it
_WIDEST = 900  # pixels: twice what a picture gets on the page, for fine screens
_KINDS = {"views": "What the method saw", "filters": "First-layer filters", "neighbours": "Nearest neighbours"}


@dataclass(frozen=True)
class Picture:
    """One picture for an `img` element: data is a data URI; width and height in pixels; alt says what it shows."""

    kind: str
    title: str
    data: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class FeatureMap:
    """Points and thumbnails of one run's features. planes: {kind: (K, 2) in the unit square}; labels: (K,) class
    numbers; sheet: thumbnails row by row, `columns` of them to a row; shares: of the variance, first two components."""

    readout: str
    budget: str
    classes: tuple[str, ...]
    labels: tuple[int, ...]
    planes: dict[str, tuple[tuple[float, float], ...]]
    shares: tuple[float, ...]
    columns: int
    sheet: Picture


@dataclass(frozen=True)
class Album:
    """The pictures of one run. left_out: titles of those that the cap on the page did not let in."""

    method: str
    dataset: str
    seed: int
    pretrain_id: str
    pictures: tuple[Picture, ...] = ()
    map: FeatureMap | None = None
    left_out: tuple[str, ...] = field(default=())


def albums(rows: Iterable[Row], workspace: Path, methods: Sequence[str], most_bytes: int = MOST_BYTES) -> list[Album]:
    """One album per (data set, method) of `methods` with pictures, in their order, within `most_bytes` altogether.

    What every method has (views, then maps, ...) is let in method by method, so that the cap bites the last kinds, not
    the last methods.
    """
    chosen: dict[tuple[str, str], Row] = {}
    runs: dict[tuple[str, str, str], Row] = {}
    for row in rows:  # a folder is looked for once, not for every row of its run
        runs.setdefault((row.dataset, row.method, row.pretrain_id), row)
    for row in runs.values():
        key = (row.dataset, row.method)
        if (
            row.method in methods
            and _folder(workspace, row).is_dir()
            and row.seed < getattr(chosen.get(key), "seed", 1e99)
        ):
            chosen[key] = row
    order = sorted(chosen.values(), key=lambda row: (row.dataset, methods.index(row.method)))
    left, found = (
        most_bytes,
        {row.pretrain_id: Album(row.method, row.dataset, row.seed, row.pretrain_id) for row in order},
    )
    for wanted in ("views", "map", "filters", "neighbours", "confusion"):
        for row in order:
            album, folder = found[row.pretrain_id], _folder(workspace, row)
            for name, title in _files(folder, wanted):
                item = _feature_map(folder) if wanted == "map" else _picture(folder / name, wanted, title, row)
                size = 0 if item is None else len((item.sheet if isinstance(item, FeatureMap) else item).data)
                if item is None or size > left:
                    change: dict[str, Any] = {"left_out": (*album.left_out, title)} if item is not None else {}
                elif isinstance(item, FeatureMap):
                    change, left = {"map": item}, left - size
                else:
                    change, left = {"pictures": (*album.pictures, item)}, left - size
                album = Album(**{**vars(album), **change})
            found[row.pretrain_id] = album
    return [album for album in found.values() if album.pictures or album.map or album.left_out]


def _folder(workspace: Path, row: Row) -> Path:
    return checkpoint_folder(workspace, row.pretrain_id) / "figures"


def _files(folder: Path, kind: str) -> list[tuple[str, str]]:
    """(file name, title) of one kind of picture."""
    if kind == "map":
        return [("map.json", "Feature map")] if (folder / "map.json").is_file() else []
    if kind == "confusion":
        names = sorted(path.name for path in folder.glob("confusion_*.png"))
        return [(name, f"Confusion, {_words(name)}") for name in names if "_fold" not in name]
    return [(f"{kind}.png", _KINDS[kind])] if (folder / f"{kind}.png").is_file() else []


def _words(name: str) -> str:
    return re.sub(r"^confusion_|\.png$", "", name).replace("linear_probe", "linear probe").replace("_", " ")


def _picture(path: Path, kind: str, title: str, row: Row) -> Picture | None:
    """One of a run's own pictures, no wider than the page can show."""
    opened = _open(path)
    if opened is None:
        return None
    small = opened.convert("RGB")
    if small.width > _WIDEST:
        small = small.resize((_WIDEST, round(small.height * _WIDEST / small.width)))
    alt = f"{title}: {row.method} on {row.dataset}, seed {row.seed}"
    return _embedded(small, kind, title, alt)


def _open(path: Path) -> Any:
    """The decoded picture, or None where the file is missing, broken or absurdly large."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.width * image.height > 50_000_000:
                return None
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _embedded(image: Any, kind: str, title: str, alt: str) -> Picture:
    """Photographs and their kin as WebP, drawings with few colours as PNG: what is smaller for each."""
    buffer = io.BytesIO()
    ending = "webp" if kind in ("views", "neighbours", "sheet") else "png"
    if ending == "webp":
        image.convert("RGB").save(buffer, ending, quality=70)
    else:
        image.quantize(256).save(buffer, ending, optimize=True)
    data = f"data:image/{ending};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(kind, title, data, image.width, image.height, alt)


def _feature_map(folder: Path) -> FeatureMap | None:
    """The map of a run; None where a file is missing or does not hold what harness.feature_maps writes."""
    sheet = _open(folder / "map_images.png")
    try:
        found = json.loads((folder / "map.json").read_bytes())
        labels = tuple(int(label) for label in found["labels"])
        planes = {
            kind: tuple((float(x), float(y)) for x, y in found[kind]) for kind in ("pca", "tsne") if kind in found
        }
        good = sheet is not None and planes and all(len(plane) == len(labels) for plane in planes.values())
        return FeatureMap(
            str(found["readout"]), str(found["budget"]), tuple(str(name) for name in found["classes"]), labels, planes,
            tuple(float(share) for share in found["shares"]), int(found["columns"]),
            _embedded(sheet, "sheet", "Thumbnails", "The images behind the points, in their order"),
        ) if good else None  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None
