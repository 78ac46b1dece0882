"""What a comparison says: boards of entries with paired differences, as plain data. `harness.report.assembly` fills them
from rows; every table, file and page is written from them and from nothing else.

A value is a fraction of 1, per seed; the mean over folds and label draws of one seed counts as one value, because the
seeds are the independent repetitions. Differences are paired seed by seed, over the folds and label draws that both have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["method", "null control", "control", "floor", "outside"]


@dataclass(frozen=True)
class Difference:
    """A paired difference of one entry to another on the same board: this one minus `other`.

    other: key of the other entry; values: {seed: difference}
    low, high: Student's t 95% interval of the mean, not adjusted, None below 3 pairs; the adjusted p decides a verdict
    p: two-sided paired t; adjusted_p: after Holm over the board's primary family, None outside it
    sign_flip_p, sign_flip_floor: exact sign-flip p and the least it can be with so many seeds; they decide nothing
    detectable: the least true difference that so many seeds would probably have shown
    equivalence_p: two one-sided tests against one point
    verdict: of a primary comparison that of harness.statistics (`gain`, `loss`, `equivalent`, `inconclusive`, `no winner`,
        `no interval`, `invalid`); of any other `exploratory`, `no interval` or `invalid`; reason: why, in words
    """

    other: str
    values: dict[int, float]
    n: int
    mean: float
    low: float | None
    high: float | None
    p: float | None
    adjusted_p: float | None
    sign_flip_p: float
    sign_flip_floor: float
    detectable: float | None
    equivalence_p: float | None
    verdict: str
    reason: str
    primary: bool


@dataclass(frozen=True)
class Cost:
    """Means over seeds; None: not recorded, or nothing was trained.

    images_seen: data-set images drawn; views_seen: encoder inputs
    pretrain_seconds, evaluation_seconds: of the device; images_per_second: of pretraining; peak_memory_bytes: the highest
    devices: device types the runs used
    """

    images_seen: float | None
    views_seen: float | None
    pretrain_seconds: float | None
    evaluation_seconds: float | None
    images_per_second: float | None
    peak_memory_bytes: float | None
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """One method in one configuration on one board.

    key: unique on its board: the method's name, with `label` where it appears more than once
    title, family, year, tier: what the method's plugin declares (its name alone where it is not installed)
    label: the settings that tell this configuration from the method's others on this board, else empty
    encoder: its network; guest: True where that is not the board's
    evaluator: what measured it: the board's, or for a floor that the board's cannot read, the floor's own
    values: {seed: headline on the board's split}; the headline readout is the one chosen on validation, run by run
    chosen: {seed: that readout}; readout: the same in one word, or as counts (`gap 1, spatial 2`)
    readouts: {readout: {seed: value}}, all of them; metrics: {other metric: mean at the headline readout}
    low, high: t 95% interval of `mean`, None below 3 seeds; deviation: over seeds, None for one
    control: to the baseline; best_other: to the best other method; null: to its null control; floor: to the best floor
    above_floor: sign of the mean paired difference to the best floor; works: whether its interval lies above 0, None
        without an interval or where the comparison is invalid
    unconverged, collapsed, missing: seeds; missing: seeds that others on the board have
    flags: the same and more, as short texts; bold: the verdict over the control is a gain
    runs: {seed: pretrain_ids}; settings: the configuration without what differs by seed
    """

    key: str
    method: str
    title: str
    role: Role
    family: str
    year: int | None
    tier: str
    label: str
    encoder: str
    guest: bool
    evaluator: str
    values: dict[int, float]
    chosen: dict[int, str]
    readout: str
    readouts: dict[str, dict[int, float]]
    metrics: dict[str, float]
    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    cost: Cost
    unconverged: tuple[int, ...]
    collapsed: tuple[int, ...]
    missing: tuple[int, ...]
    flags: tuple[str, ...]
    runs: dict[int, tuple[str, ...]]
    settings: dict[str, Any] = field(repr=False)
    control: Difference | None = None
    best_other: Difference | None = None
    null: Difference | None = None
    floor: Difference | None = None
    above_floor: bool | None = None
    works: bool | None = None
    bold: bool = False

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted(self.values))

    @property
    def n(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Published:
    """One published number, never averaged with measured ones. value, deviation: as printed by the source, in `metric`'s
    unit (`top1_accuracy_pct`, `test_error_pct`, ...); best_epoch_on_test: the source chose the epoch on the test set."""

    method: str
    metric: str
    value: str
    deviation: str
    protocol: str
    source: str
    year: str
    backbone: str
    pretrain_data: str
    pretrain_epochs: str
    note: str
    best_epoch_on_test: bool


@dataclass(frozen=True)
class Board:
    """One leaderboard: what may be compared, side by side.

    key: short, unique among the boards, fit for a file name or an anchor; title: one line; dataset_title: the data set's
    facts: what holds for every entry ({"test images": "10,000", ...}), in the order to be shown
    split: `test`, or `validation` where no test split was opened; metric: what `values`
        are: `top1`, or `top1_corrupted`, the mean over generated corruptions
    baseline: name of the method that `Entry.control` is the difference to; best_floor: key of the floor with the best mean
    entries: methods by falling mean, then null controls, controls and floors likewise
    readouts: names of all readouts, the networks' first; seeds: all seeds of any entry
    """

    key: str
    title: str
    dataset: str
    pretrain_data: str
    encoder: str
    labels: str
    evaluator: str
    split: str
    metric: str
    n_test: int | None
    numbers_version: int
    data_sha256: str
    data_verified: bool
    baseline: str
    best_floor: str | None
    readouts: tuple[str, ...]
    seeds: tuple[int, ...]
    facts: dict[str, str]
    entries: tuple[Entry, ...]
    warnings: tuple[str, ...]
    published: tuple[Published, ...]
    dataset_title: str = ""

    def entry(self, key: str) -> Entry:
        return next(entry for entry in self.entries if entry.key == key)


__all__ = ["Board", "Cost", "Difference", "Entry", "Published", "Role"]
