"""What cells of a grid cost: seconds as far as the workspace's rows have measured similar ones on such a device.

Similar means: for a pretraining the same method, data set, encoder, device type, precision and threads (seconds per image
seen, or in all where nothing is trained); for an evaluation the same evaluator, data set, encoder and label budget, of
the same method where there is one. What was never measured has no estimate, and is counted as unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from harness.arms import pretext_id
from harness.contracts import Row
from harness.grid import Cell

PRETEXT = "pretext"


class Timings:
    """Measured durations, by what they were spent on."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._seconds: dict[tuple[Any, ...], list[float]] = {}
        self._known: set[tuple[str, str]] = set()
        self.add(rows)

    def add(self, rows: Iterable[Row]) -> None:
        """Take in rows; all rows of one evaluation share their duration, which counts once."""
        for row in rows:
            if row.device_seconds is None or row.status != "FINISHED" or (row.pretrain_id, row.eval_id) in self._known:
                continue
            self._known.add((row.pretrain_id, row.eval_id))
            place = (row.dataset, row.encoder, row.device, row.precision, row.num_threads)
            if row.evaluator == PRETEXT:
                seconds = row.device_seconds / (row.images_seen or 1)
                self._seconds.setdefault((PRETEXT, row.method, *place), []).append(seconds)
            else:
                for method in (row.method, None):
                    key = (row.evaluator, row.labels, method, *place)
                    self._seconds.setdefault(key, []).append(row.device_seconds)

    def estimate(self, cell: Cell, missing: Sequence[str]) -> float | None:
        """Seconds that the missing eval_ids of a cell will take; None where one of them was never measured."""
        place = (cell.dataset, cell.encoder, cell.device, cell.precision, cell.num_threads)
        parts: list[float | None] = []
        if pretext_id(cell.pretrain_id) in missing:
            each = self._median((PRETEXT, cell.method, *place))
            parts.append(None if each is None else each * (cell.images or 1))
        for evaluation in cell.evaluations:
            if evaluation.eval_id in missing:
                keys = ((evaluation.evaluator, evaluation.labels, method, *place) for method in (cell.method, None))
                parts.append(next((found for key in keys if (found := self._median(key)) is not None), None))
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    def total(self, cells: Iterable[Cell], missing: Callable[[Cell], Sequence[str]]) -> tuple[float | None, int]:
        """(Seconds of the cells that can be estimated, or None where none can; how many cannot)."""
        estimates = [self.estimate(cell, missing(cell)) for cell in cells]
        known = [value for value in estimates if value is not None]
        unknown = len(estimates) - len(known)
        return (sum(known) if known or not unknown else None), unknown

    def _median(self, key: tuple[Any, ...]) -> float | None:
        found = self._seconds.get(key)
        return median(found) if found else None


__all__ = ["Timings"]
