"""Two runs side by side: what they were told, what they read, and their curves.

One run each says nothing about the methods behind them: the intervals here are over test images alone ("same seeds,
test-set error only"), from the per-image predictions that lie beside the rows.
"""

from __future__ import annotations

import json
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness import arms, fingerprint, records, statistics
from harness.contracts import HarnessError, Row
from harness.images import digest_split
from harness.runs import Run

FACTS = ("method", "status", "steps", "images_seen", "views_seen", "device_seconds", "images_per_second",
         "peak_memory_bytes", "weights_sha256", "torch_version", "git_commit", "git_dirty", "finished_at")  # fmt: skip
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Key:
    """What makes a number of two runs the same number; label_seed: None where it follows the run's seed."""

    evaluator: str
    readout: str | None
    labels: str | None
    label_seed: int | None
    fold: int | None
    split: str
    metric: str


@dataclass(frozen=True)
class Reading(Key):
    """One number of both runs, None where a run has not got it; difference: one minus other.

    low, high: 95% interval of the difference over test images; p: McNemar; both None without predictions of both
    invalid: a fit behind it had not converged
    """

    one: float | None
    other: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    n_test: int | None
    invalid: bool


@dataclass(frozen=True)
class Comparison:
    """one, other: pretrain_ids; settings, facts: {name: (of one, of other)}, settings where they differ
    curves: {monitor: ([(step, value)] of one, of other)}; scope: what the intervals are over, in words; notes: what is missing
    """

    one: str
    other: str
    settings: dict[str, tuple[Any, Any]]
    facts: dict[str, tuple[Any, Any]]
    readings: list[Reading]
    curves: dict[str, tuple[Curve, Curve]]
    scope: str
    notes: list[str]

    def json(self) -> str:
        return json.dumps(asdict(self), default=str)


def compare(one: Run, other: Run, data_dir: Path | None = None) -> Comparison:
    """Put two finished runs of a workspace side by side.

    data_dir: where the test labels are looked for, which the predictions are judged by; without them there are no
        intervals, and a note says so. Raises HarnessError when both words name the same run.
    """
    if one.pretrain_id == other.pretrain_id:
        raise HarnessError(f"both words name run {one.pretrain_id}; name two different ones (harness list runs)")
    mine, theirs = one.facts["config"], other.facts["config"]
    settings = {
        key: (mine.get(key), theirs.get(key)) for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key)
    }
    seeds = mine["seed"], theirs["seed"]
    scope = "same seeds, test-set error only" if seeds[0] == seeds[1] else (
        f"one run each, seeds {seeds[0]} and {seeds[1]}, test-set error only")  # fmt: skip
    notes: list[str] = []
    readings = _readings(one, other, data_dir, notes)
    if not any(reading.difference is not None for reading in readings):
        notes.append("the two runs share no evaluation; make one with `harness evaluate RUN`")
    return Comparison(
        one.pretrain_id, other.pretrain_id, settings,
        {name: (one.facts.get(name), other.facts.get(name)) for name in FACTS}, readings, _curves(one, other), scope, notes,
    )  # fmt: skip


def _curves(one: Run, other: Run) -> dict[str, tuple[Curve, Curve]]:
    def curves(run: Run) -> dict[str, Curve]:
        found: dict[str, Curve] = {}
        for point in run.facts.get("curve", []):
            for name, value in point.items():
                if name != "step":
                    found.setdefault(name, []).append((point["step"], value))
        return found

    mine, theirs = curves(one), curves(other)
    return {name: (mine.get(name, []), theirs.get(name, [])) for name in dict.fromkeys([*mine, *theirs])}


# ----------------------------------------------------------------------------------------------------------- readings


def _key(row: Row) -> Key:
    label_seed = None if row.label_seed == row.seed else row.label_seed
    return Key(row.evaluator, row.readout, row.labels, label_seed, row.fold, row.split, row.metric)


def _rows(run: Run) -> dict[Key, Row]:
    """The run's numbers; of one measured twice the latest."""
    found: dict[Key, Row] = {}
    for path in sorted((records.runs_folder(run.workspace) / run.pretrain_id).glob("*.json")):
        for row in records.read(path) or []:
            before = found.get(_key(row))
            if row.value is not None and (before is None or row.finished_at >= before.finished_at):
                found[_key(row)] = row
    return found


def _readings(one: Run, other: Run, data_dir: Path | None, notes: list[str]) -> list[Reading]:
    mine, theirs = _rows(one), _rows(other)
    truth = _TestLabels(one, other, data_dir, notes)
    order = {"test": 0, "validation": 1, "pretrain": 2}
    out = []
    for key in sorted(mine.keys() | theirs.keys(), key=lambda k: (order.get(k.split, 3), *map(str, astuple(k)))):
        rows = [row for row in (mine.get(key), theirs.get(key)) if row is not None]
        difference = low = high = p = None
        if len(rows) == 2:
            assert rows[0].value is not None and rows[1].value is not None
            difference = rows[0].value - rows[1].value
            if key.split == "test" and key.metric == "top1":
                low, high, p = truth.judged(*rows)
        one_value, other_value = (row.value if (row := found.get(key)) else None for found in (mine, theirs))
        invalid = any(row.converged is False for row in rows)
        out.append(Reading(**vars(key), one=one_value, other=other_value, difference=difference, low=low, high=high, p=p,
                           n_test=rows[0].n_test, invalid=invalid))  # fmt: skip
    return out


class _TestLabels:
    """The test labels that both runs were judged by, opened when first needed."""

    def __init__(self, one: Run, other: Run, data_dir: Path | None, notes: list[str]) -> None:
        self.runs, self.data_dir, self.notes = (one, other), data_dir, notes
        self._labels: np.ndarray | None = None
        self._digests: dict[str, str] | None = None

    def judged(self, a: Row, b: Row) -> tuple[float | None, float | None, float | None]:
        """(low, high, McNemar p) of the difference over test images; all None, with a note, where it cannot be known."""
        rights = [self._right(run, row) for run, row in zip(self.runs, (a, b), strict=True)]
        if rights[0] is None or rights[1] is None or len(rights[0]) != len(rights[1]):
            return None, None, None
        interval = statistics.paired_test_set_interval(rights[0], rights[1])
        return interval.low, interval.high, statistics.mcnemar(rights[0], rights[1])[2]

    def _right(self, run: Run, row: Row) -> np.ndarray | None:
        """(n_test,) bool: which test images the row's predictions are right on."""
        labels = self._opened(run, row)
        stored = records.rows_path(run.workspace, run.pretrain_id, row.eval_id).with_suffix(".predictions.npz")
        if labels is None or not stored.is_file():
            return None
        with np.load(stored, allow_pickle=False) as arrays:
            name = row.readout if row.readout in arrays else next(iter(arrays), "")
            predicted = arrays[name] if name in arrays else np.empty(0)
        if len(predicted) != len(labels):
            return None
        right: np.ndarray = predicted == labels
        if abs(float(right.mean()) - (row.value or 0.0)) > 1e-9:
            self._note(
                f"the predictions of {run.pretrain_id} for {row.evaluator} do not give its row's value: no interval"
            )
            return None
        return right

    def _opened(self, run: Run, row: Row) -> np.ndarray | None:
        if self._digests is None:
            self._open(run)
        assert self._digests is not None
        digests = {**run.facts["identity"]["data"], **self._digests}
        if self._labels is not None and fingerprint.digest(digests) != row.data_sha256:
            self._note(f"the images at hand are not those that {run.pretrain_id} was measured on: no interval")
            return None
        return self._labels

    def _open(self, run: Run) -> None:
        self._digests = {}
        if self.runs[0].facts["config"]["dataset_name"] != self.runs[1].facts["config"]["dataset_name"]:
            self._note("different data sets: no intervals")
            return
        try:
            dataset = arms.open_dataset(run.facts["dataset"], self.data_dir, run.config.data.image_size, True)
            train, test = dataset.split("train"), dataset.split("test")
        except HarnessError as error:
            self._note(f"no intervals without the test labels: {error}")
            return
        self._digests = {"train": digest_split(train), "test": digest_split(test)}
        self._labels = test.labels.numpy()

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
