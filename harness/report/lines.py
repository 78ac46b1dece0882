"""Boards as one line per entry and seed: CSV for spreadsheets, Parquet for programs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.report.boards import Board, Difference, Entry
from harness.report.text import clean

if TYPE_CHECKING:
    import pandas as pd

NUMBERS = ("n", "mean", "low", "high", "p", "adjusted_p", "sign_flip_p", "sign_flip_floor", "detectable",
           "equivalence_p")  # fmt: skip
PAIRED = ("control", "null", "best_other", "floor")
COST = ("images_seen", "views_seen", "pretrain_seconds", "evaluation_seconds", "images_per_second", "peak_memory_bytes")
PLACE = ("dataset", "pretrain_data", "labels", "evaluator", "split", "metric", "n_test", "numbers_version", "data_sha256",
         "data_verified", "baseline")  # fmt: skip
OWN = ("method", "label", "title", "role", "family", "tier", "year", "encoder", "n", "mean", "deviation", "low", "high")


def lines(boards: Sequence[Board]) -> pd.DataFrame:
    """Every entry of every board, one line per seed: values and differences are fractions of 1, what does not apply is null.

    The columns `control_*`, `null_*`, `best_other_*` and `floor_*` hold that paired difference: of this seed
    (`control_difference`) and over all of them (`control_mean`, `control_low`, ...).
    """
    import pandas as pd

    return pd.DataFrame([line for board in boards for entry in board.entries for line in _lines(board, entry)])


def _lines(board: Board, entry: Entry) -> list[dict[str, Any]]:
    place = {"board": board.key, "board_encoder": board.encoder, **{name: getattr(board, name) for name in PLACE}}
    own = {("configuration" if name == "label" else name): getattr(entry, name) for name in OWN}
    rest = {
        "measured_by": entry.evaluator, "verdict": None if entry.control is None else entry.control.verdict,
        "reason": None if entry.control is None else entry.control.reason, "above_floor": entry.above_floor,
        "works": entry.works, "bold": entry.bold, **{name: getattr(entry.cost, name) for name in COST},
        "devices": ", ".join(entry.cost.devices), "flags": "; ".join(entry.flags),
    }  # fmt: skip
    out = []
    for seed in entry.seeds:
        of_seed = {"seed": seed, "value": entry.values[seed], "readout": entry.chosen[seed],
                   "pretrain_ids": ", ".join(entry.runs[seed])}  # fmt: skip
        gaps: dict[str, Any] = {}
        for name in PAIRED:
            gaps |= _gap(name, getattr(entry, name), seed)
        out.append({**place, **own, **of_seed, **gaps, **rest})
    return out


def _gap(name: str, gap: Difference | None, seed: int) -> dict[str, Any]:
    told = {f"{name}_{number}": None if gap is None else getattr(gap, number) for number in NUMBERS}
    return {f"{name}_other": None if gap is None else gap.other,
            f"{name}_difference": None if gap is None else gap.values.get(seed), **told}  # fmt: skip


def csv(boards: Sequence[Board]) -> str:
    """`lines` as CSV. A text that a spreadsheet would take for a formula is kept one by an apostrophe before it."""
    table = lines(boards)
    for name in table.columns:
        if not _is_numeric(table[name]):
            table[name] = [_inert(value) if isinstance(value, str) else value for value in table[name]]
    file = io.StringIO()
    table.to_csv(file, index=False, lineterminator="\n")
    return file.getvalue()


def _is_numeric(column: pd.Series) -> bool:
    return column.dtype.kind in "biuf"


def _inert(text: str) -> str:
    text = clean(text)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text


def parquet(boards: Sequence[Board], file: Path) -> None:
    """Write `lines` as Parquet."""
    from harness import durable

    table = lines(boards)
    durable.write(file, lambda temporary: table.to_parquet(temporary, index=False))
