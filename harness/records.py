"""Rows: written once, read all as a DataFrame.

One sealed JSON file per (pretrain_id, eval_id) under `results/runs/`; writing it is the commit point of an evaluation.
Correctness needs no lock: the same work done twice writes the same file, and any number of processes and machines may
share or merge the folder.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from harness import durable
from harness.contracts import Row

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
    try:
        document = durable.read_sealed(path)
    except FileNotFoundError:
        return None
    expected = (document or {}).get("predictions_sha256")
    beside = path.with_suffix(".predictions.npz")
    if expected is not None and (not beside.is_file() or durable.sha256_file(beside) != expected):
        document = None
    if document is None:
        warnings.warn(f"{path} is damaged and ignored; rerun its command to make it again", stacklevel=2)
        return None
    try:
        return [Row(**row) for row in document["rows"]]
    except (KeyError, TypeError, ValidationError):
        warnings.warn(f"{path} holds rows of another format and is ignored", stacklevel=2)
        return None


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
    return frame(read_all(Path(workspace)))
