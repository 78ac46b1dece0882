"""Rows: written once, read all as a DataFrame.

One sealed JSON file per (pretrain_id, eval_id) under `results/runs/`; writing it is the commit point of an evaluation.
Correctness needs no lock: the same work done twice writes the same file, and any number of processes and machines may
share or merge the folder.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from harness import durable
from harness.errors import HarnessError
from harness.rows import Row

if TYPE_CHECKING:
    import pandas as pd


def runs_folder(workspace: Path) -> Path:
    return workspace / "results" / "runs"


def rows_path(workspace: Path, pretrain_id: str, eval_id: str) -> Path:
    return runs_folder(workspace) / pretrain_id / f"{eval_id}.json"


def write(
    workspace: Path,
    rows: Iterable[Row],
    chosen: Mapping[str, Any] | None = None,
    predictions: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Commit the rows of one evaluation; its per-image predictions are made safe first."""
    rows = list(rows)
    path = rows_path(workspace, rows[0].pretrain_id, rows[0].eval_id)
    digest = None
    if predictions:
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {name: np.asarray(values) for name, values in predictions.items()}
        np.savez_compressed(buffer, **arrays)
        durable.write_bytes(path.with_suffix(".predictions.npz"), buffer.getvalue())
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    document = {"rows": [row.model_dump(mode="json") for row in rows], "chosen": dict(chosen or {})}
    durable.write_sealed(path, {**document, "predictions_sha256": digest})


def read(path: Path) -> list[Row] | None:
    """The rows of one file; None when it is absent or was damaged (a rerun then makes it again)."""
    document = _document(path, needs_predictions=True)
    if document is None:
        return None
    try:
        return [Row(**row) for row in document["rows"]]
    except (KeyError, TypeError, ValidationError):
        warnings.warn(f"{path} holds rows of another format and is ignored", stacklevel=2)
        return None


def _document(path: Path, needs_predictions: bool) -> dict[str, Any] | None:
    """What a row file holds, if its seal is right and so are the predictions beside it; else None, with a warning.

    needs_predictions: whether predictions that the file speaks of must be there
    """
    try:
        document = durable.read_sealed(path)
    except FileNotFoundError:
        return None
    expected = (document or {}).get("predictions_sha256")
    if expected is not None:
        beside = path.with_suffix(".predictions.npz")
        there = beside.is_file()
        if (not there and needs_predictions) or (there and durable.sha256_file(beside) != expected):
            document = None
    if document is None:
        warnings.warn(f"{path} is damaged and ignored; rerun its command to make it again", stacklevel=3)
    return document


def read_all(workspace: Path) -> list[Row]:
    """Every readable row of a workspace, in a stable order."""
    rows: list[Row] = []
    for path in sorted(runs_folder(workspace).glob("*/*.json")):
        rows.extend(read(path) or [])
    return rows


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Rows as a DataFrame with one column per field, in the protocol's order."""
    import pandas as pd

    return pd.DataFrame([row.model_dump() for row in rows], columns=list(Row.model_fields))


def load_results(workspace: str | Path = ".") -> pd.DataFrame:
    """Every row under `workspace` as a DataFrame (empty, with all columns, when there are none)."""
    return _frame_of(sorted(runs_folder(Path(workspace)).glob("*/*.json")), needs_predictions=True)


def load_rows(folder: str | Path) -> pd.DataFrame:
    """Every row in the row files at or below `folder`, such as results/studies, as a DataFrame.

    Row files that were published without the predictions they speak of are read as they are. Raises HarnessError when
    there is no row file.
    """
    folder = Path(folder)
    paths = sorted(p for p in folder.rglob("*.json") if _ROW_FILE.fullmatch(f"{p.parent.name}/{p.stem}"))
    if not paths:
        raise HarnessError(f"--rows {folder}: no row file there or below (PRETRAIN_ID/EVAL_ID.json)")
    return _frame_of(paths, needs_predictions=False)


_ROW_FILE = re.compile(r"[0-9a-f]{16}/[0-9a-f]{16}")
_REQUIRED = {name for name, info in Row.model_fields.items() if info.is_required()}
_FIELDS = set(Row.model_fields)
_OPTIONAL = {name: info.default for name, info in Row.model_fields.items() if not info.is_required()}


FILES_PER_PROCESS = 2000  # for fewer files another process costs more than it saves


def _frame_of(paths: Sequence[Path], needs_predictions: bool) -> pd.DataFrame:
    """The rows of these files, read by as many processes as there are cores where there are thousands of files."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1  # elsewhere forking is not safe
    processes = max(1, min(cores, len(paths) // FILES_PER_PROCESS))
    if processes == 1:
        import pandas as pd

        return pd.DataFrame(_columns_of(paths, needs_predictions))
    size = -(-len(paths) // processes)
    parts = [paths[start : start + size] for start in range(0, len(paths), size)]
    columns: dict[str, list[Any]] = {name: [] for name in Row.model_fields}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        reading = pool.map(_columns_and_warnings, parts, repeat(needs_predictions))
        import pandas as pd  # while the others read

        for found, told in reading:
            for text in told:
                warnings.warn(text, stacklevel=3)
            for name, values in found.items():
                columns[name] += values
    return pd.DataFrame(columns)


def _columns_and_warnings(paths: Sequence[Path], needs_predictions: bool) -> tuple[dict[str, list[Any]], list[str]]:
    """As `_columns_of`, in a process whose warnings nobody would see."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        columns = _columns_of(paths, needs_predictions)
    return columns, [str(warning.message) for warning in told]


def _columns_of(paths: Iterable[Path], needs_predictions: bool) -> dict[str, list[Any]]:
    """{field: its values} of the rows of these files. Row objects would take seconds and most of a gigabyte for 10,000 files;
    what they check is what the seal vouches for, so of the format only the field names are looked at.
    """
    columns: dict[str, list[Any]] = {name: [] for name in Row.model_fields}
    words: dict[str, str] = {}  # digests, names and configurations come in many rows: one copy of each
    configs: dict[str, dict[str, Any]] = {}
    config: dict[str, Any] | None = None
    for path in paths:
        document = _document(path, needs_predictions)
        if document is None:
            continue
        rows = document.get("rows")
        if not isinstance(rows, list) or not all(_has_the_fields(row) for row in rows):
            warnings.warn(f"{path} holds rows of another format and is ignored", stacklevel=3)
            continue
        rows = [{**_OPTIONAL, **row} for row in rows]
        for row in rows:
            if row["config"] != config:  # the rows of a file mostly share theirs, and comparing is cheaper than repr
                config = configs.setdefault(repr(row["config"]), row["config"])
            row["config"] = config
        for name, values in columns.items():
            found = [row[name] for row in rows]
            values.extend([words.setdefault(value, value) if type(value) is str else value for value in found])
    return columns


def _has_the_fields(row: Any) -> bool:
    return isinstance(row, dict) and row.keys() >= _REQUIRED and row.keys() <= _FIELDS
