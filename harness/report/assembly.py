"""build(rows) -> boards: which rows may be compared, and what the comparison says.

Rows of another data digest, engine version or label budget stand on a board of their own; rows of another code digest or
configuration are an entry of their own. Nothing is averaged but folds and label draws within a seed, and seeds.

A board belongs to one encoder. A method with a network of its own (the floors, k-means on patches) is a guest on every
board of the same data and labels, unless that network has been run under the baseline too and so has its own board.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from harness import declarations, statistics
from harness.encoder_names import ABOUT
from harness.errors import HarnessError
from harness.registry import DEFAULT_EVALUATORS
from harness.report import published
from harness.report import warnings as checks
from harness.report.boards import Board, Difference, Entry
from harness.report.entries import Arm, Headlines, arms_of, entry_of, flags_of, paired_values
from harness.report.measurements import CLEAN, CORRUPTED, Measured, Plugin, label_free, lost, measured, plugins_of

if TYPE_CHECKING:
    import pandas as pd

BASELINE = "random_init"
FLOOR_EVALUATORS = ("linear_probe", "svm")  # how a floor is read where the board's evaluator has not read it
ORDER = ("method", "outside", "null control", "control", "floor")
NETWORK_READOUTS = ("gap", "spatial", "spatial_pca", "cls", "mean")
MARGIN = 0.01  # one point: smaller differences count as equivalent


@dataclass(frozen=True)
class Family:
    """What the comparisons of a board are made with. primary: the methods whose difference to `baseline`, at the headline,
    is the declared family of Holm's correction, board by board; None: those of tier `ranked`."""

    baseline: str = BASELINE
    primary: tuple[str, ...] | None = None

    def holds(self, entry: Entry) -> bool:
        if entry.role != "method" or entry.method == self.baseline:
            return False
        return entry.tier == "ranked" if self.primary is None else entry.method in self.primary


@dataclass(frozen=True)
class Place:
    """What measurements must share to stand on one board. data: the unlabelled images in words."""

    dataset: str
    data: str
    labels: str
    data_sha256: str
    numbers_version: int

    def order(self) -> tuple[Any, ...]:
        """Data sets by name, label budgets by size."""
        count = re.match(r"[0-9.]+", self.labels)
        size = float(count[0]) if count and count[0].count(".") < 2 else float("inf")
        return (self.dataset, self.data, size, self.labels, -self.numbers_version, self.data_sha256)


def build(rows: pd.DataFrame, baseline: str = BASELINE, primary: Sequence[str] | None = None) -> list[Board]:
    """Every board that `rows` (as of harness.load_results) can fill, in a stable order; see Family for the arguments.

    Methods outside the primary family are compared as well, as exploration: intervals, no verdict.
    """
    rows = rows.reset_index(drop=True)
    found = measured(rows)
    plugins = plugins_of(one.method for one in found)
    family = Family(baseline, None if primary is None else tuple(primary))
    places: dict[Place, list[Measured]] = {}
    for one in found:
        place = Place(one.dataset, one.data, one.labels, one.data_sha256, one.numbers_version)
        places.setdefault(place, []).append(one)
    beside, failed, checked = label_free(rows), lost(rows), _to_check(rows)
    kept = set(checked.index)
    boards = []
    for place in sorted(places, key=Place.order):
        for encoder, members in _by_encoder(places[place], plugins).items():
            evaluators = {one.evaluator for one in members if plugins[one.method].role != "floor"}
            for evaluator in sorted(evaluators, key=_rank):
                here = _read_by(evaluator, members, plugins)
                board = _board(place, encoder, evaluator, here, plugins, family)
                told = {row for one in here for row in (*one.rows, *beside.get(one.pretrain_id, ()))}
                told |= set(failed.get((place.dataset, encoder), ()))
                boards.append(replace(board, warnings=tuple(checks.all_of(checked.loc[sorted(told & kept)]))))
    return _told_apart(boards)


CHECKED = (
    "method", "dataset", "pretrain_data", "encoder", "labels", "evaluator", "seed", "split", "pretrain_id", "status",
    "code_sha256", "numbers_version", "harness_version", "torch_version", "data_sha256", "git_dirty", "test_overlap",
    "images_seen", "label_subset_sha256", "collapsed", "converged", "value",
)  # fmt: skip


def _to_check(rows: pd.DataFrame) -> pd.DataFrame:
    """One row of every kind that a warning can tell apart: the rows of one evaluation are mostly alike in what is checked."""
    slim = rows[list(CHECKED)].astype(object)
    slim["value"] = slim["value"].where(rows["value"].isna(), 0.0)
    return slim.drop_duplicates()


def _rank(evaluator: str) -> tuple[int, str]:
    """The default evaluators first, in their order."""
    place = DEFAULT_EVALUATORS.index(evaluator) if evaluator in DEFAULT_EVALUATORS else len(DEFAULT_EVALUATORS)
    return place, evaluator


def _by_encoder(here: Sequence[Measured], plugins: Mapping[str, Plugin]) -> dict[str, list[Measured]]:
    """{encoder of a board: its measurements and the guests'}."""
    networks = [one for one in here if plugins[one.method].role != "floor"]
    hosts = sorted({one.encoder for one in networks if not one.own_encoder} or {one.encoder for one in networks})
    guests = [one for one in here if one.encoder not in hosts]
    return {host: [one for one in here if one.encoder == host] + guests for host in hosts}


def _read_by(evaluator: str, members: Sequence[Measured], plugins: Mapping[str, Plugin]) -> list[Measured]:
    """Those measured by `evaluator`; of a floor that has none, those by the first of FLOOR_EVALUATORS that it has, where
    the board is about clean test images."""
    out = [one for one in members if one.evaluator == evaluator]
    if any(one.metric == CORRUPTED for one in out):
        return out
    read = {one.method for one in out}
    floors = [one for one in members if plugins[one.method].role == "floor" and one.method not in read]
    for name in dict.fromkeys(one.method for one in floors):
        theirs = [one for one in floors if one.method == name]
        by = next((e for e in FLOOR_EVALUATORS if any(one.evaluator == e for one in theirs)), None)
        out += [one for one in theirs if one.evaluator == by]
    return out


def _board(
    place: Place,
    encoder: str,
    evaluator: str,
    members: Sequence[Measured],
    plugins: Mapping[str, Plugin],
    family: Family,
) -> Board:
    split = "test" if any("test" in one.tops for one in members) else "validation"
    arms = {arm.key: arm for arm in arms_of(members)}
    headlines = {key: arm.headlines(split) for key, arm in arms.items()}
    seeds = tuple(sorted({seed for found in headlines.values() for seed in found}))
    entries: dict[str, Entry] = {}
    for key, arm in arms.items():
        entry = entry_of(arm, plugins[arm.method], split, seeds, encoder)
        if entry is not None:
            entries[key] = replace(entry, flags=flags_of(entry, arm, evaluator))
    best_floor = _best(entry for entry in entries.values() if entry.role == "floor")
    entries = _Comparisons(arms, entries, split, best_floor, plugins, family, headlines).made()
    ordered = sorted(entries.values(), key=lambda e: (ORDER.index(e.role), -e.mean, e.key))
    names = {name for entry in ordered for name in entry.readouts}
    verified = all(one.data_verified for one in members)
    counts = [one.n_test for one in members if one.n_test is not None]
    title = f"{_title_of(place.dataset)}, {place.labels} labels: {evaluator} on {encoder}, unlabelled data {place.data}"
    return Board(
        key="", title=title + (" (a reconstruction)" if "RECONSTRUCTION" in ABOUT.get(encoder, "") else ""),
        dataset=place.dataset, pretrain_data=place.data, encoder=encoder, labels=place.labels, evaluator=evaluator,
        split=split, metric=CORRUPTED if members[0].metric == CORRUPTED else CLEAN[0],
        n_test=max(counts, default=None), numbers_version=place.numbers_version,
        data_sha256=place.data_sha256, data_verified=verified, baseline=family.baseline,
        best_floor=best_floor.key if best_floor else None,
        readouts=(*[n for n in NETWORK_READOUTS if n in names], *sorted(names - set(NETWORK_READOUTS))),
        seeds=seeds, facts=_facts(place, encoder, split, members, max(counts, default=None), verified),
        entries=tuple(ordered), warnings=(), published=published.of(place.dataset), dataset_title=_title_of(place.dataset),
    )  # fmt: skip


def _best(entries: Iterable[Entry]) -> Entry | None:
    return max(entries, key=lambda entry: entry.mean, default=None)


def _title_of(dataset: str) -> str:
    try:
        told, argument = declarations.of_dataset(dataset)
    except HarnessError:  # rows of a data set that is not installed here
        return dataset
    title: str = told["title"]
    return f"{title} {argument}" if argument else title


def _facts(
    place: Place, encoder: str, split: str, members: Sequence[Measured], n_test: int | None, verified: bool
) -> dict[str, str]:
    runs = {one.pretrain_id for one in members}
    facts = {
        "value": ", ".join(sorted({one.metric for one in members})),
        "split": f"{split}, {n_test:,} images" if n_test and split == "test" else split,
        "data": f"{'published files' if verified else 'NOT verified as the published files'}, {place.data_sha256[:12]}",
        "encoder": f"{encoder}: {ABOUT[encoder]}" if encoder in ABOUT else encoder,
        "precision": _each(str(one.settings.get("precision")) for one in members),
        "devices": _each(one.device for one in members),
        "engine": f"numbers version {place.numbers_version}",
        "runs": f"{len(runs):,}",
    }
    if caution := _caution(place.dataset):
        facts["reach"] = caution
    return facts


def _each(words: Iterable[str]) -> str:
    return ", ".join(sorted(set(words)))


def _caution(dataset: str) -> str:
    try:
        caution: str = declarations.of_dataset(dataset)[0]["caution"]
    except HarnessError:
        return ""
    return caution


# -------------------------------------------------------------------------------------------------------- comparisons


@dataclass(frozen=True)
class _Comparisons:
    """The paired differences between the entries of one board."""

    arms: Mapping[str, Arm]
    entries: Mapping[str, Entry]
    split: str
    best_floor: Entry | None
    plugins: Mapping[str, Plugin]
    family: Family
    headlines: Mapping[str, Headlines]

    def made(self) -> dict[str, Entry]:
        """The entries with their differences; those of the primary family with verdicts."""
        controls = {key: self._nearest(key, self.family.baseline) for key in self.entries}
        judged = {
            key: self._paired(key, other) for key, other in controls.items()
            if other and self.family.holds(self.entries[key]) and self._values(key, other)
        }  # fmt: skip
        p = {key: found.p for key, found in judged.items() if found.p is not None}
        adjusted = dict(zip(p, map(float, statistics.holm(list(p.values()))), strict=True))
        out = {}
        for key, entry in self.entries.items():
            control = self._difference(key, controls[key], key in judged, adjusted.get(key))
            floor = self._difference(key, self.best_floor.key if self.best_floor else None)
            out[key] = replace(
                entry, control=control, floor=floor, null=self._difference(key, self._null(entry)),
                best_other=self._difference(key, self._best_other(entry)),
                above_floor=None if floor is None else floor.mean > 0,
                works=None if floor is None or floor.low is None or floor.verdict == "invalid" else floor.low > 0,
                bold=control is not None and control.verdict == "gain",
            )  # fmt: skip
        return out

    def _nearest(self, key: str, method: str) -> str | None:
        """The entry of `method` whose configuration is most like that of `key`; None where there is no other entry."""
        mine = self.arms[key]

        def likeness(other: str) -> tuple[Any, ...]:
            arm = self.arms[other]
            shared = sum(arm.settings.get(name) == value for name, value in mine.settings.items())
            latest = max(one.finished_at for one in arm.all())
            return arm.encoder == mine.encoder, shared, len(self._values(key, other)), latest, other

        others = [k for k, entry in self.entries.items() if entry.method == method and k != key]
        return None if mine.method == method else max(others, key=likeness, default=None)

    def _null(self, entry: Entry) -> str | None:
        name = self.plugins[entry.method].null_control
        return self._nearest(entry.key, name) if name else None

    def _best_other(self, entry: Entry) -> str | None:
        if entry.role not in ("method", "outside"):
            return None
        best = _best(e for e in self.entries.values() if e.role == "method" and e.method != entry.method)
        return best.key if best else None

    def _difference(
        self, key: str, other: str | None, primary: bool = False, adjusted: float | None = None
    ) -> Difference | None:
        """The difference of `key` to `other`; None where there is nothing to pair."""
        if other is None or other == key or not (values := self._values(key, other)):
            return None
        found = self._paired(key, other, adjusted)
        verdict: str = found.verdict
        reason = found.reason
        if not primary and verdict not in ("invalid", "no interval"):
            verdict, reason = "exploratory", "not of the declared family: no verdict"
        return Difference(
            other=other, values=values, n=found.n, mean=found.mean, low=found.low, high=found.high, p=found.p,
            adjusted_p=adjusted, sign_flip_p=found.sign_flip_p, sign_flip_floor=found.sign_flip_floor,
            detectable=found.detectable, equivalence_p=found.equivalence_p, verdict=verdict, reason=reason, primary=primary,
        )  # fmt: skip

    def _values(self, key: str, other: str) -> dict[int, float]:
        return paired_values(self.headlines[key], self.headlines[other])

    def _paired(self, key: str, other: str, adjusted: float | None = None) -> statistics.Paired:
        values = self._values(key, other)
        bad = [self.arms[k].key for k in (key, other) if set(self.arms[k].unconverged(self.split)) & values.keys()]
        invalid = f"not converged: {', '.join(bad)}" if bad else ""
        return statistics.paired(list(values.values()), margin=MARGIN, adjusted_p=adjusted, invalid=invalid)


# ------------------------------------------------------------------------------------------------- boards among boards


def _told_apart(boards: Sequence[Board]) -> list[Board]:
    """Give every board its key; boards that differ only by data digest or engine version say so."""
    groups: dict[tuple[str, ...], list[Board]] = {}
    for board in boards:
        name = (board.dataset, board.pretrain_data, board.encoder, board.labels, board.evaluator)
        groups.setdefault(name, []).append(board)
    taken: dict[str, int] = {}
    out = []
    for board in boards:
        name = (board.dataset, board.pretrain_data, board.encoder, board.labels, board.evaluator)
        key = re.sub(r"[^a-z0-9]+", "-", " ".join(name).lower()).strip("-")
        taken[key] = taken.get(key, 0) + 1
        key += f"-{taken[key]}" if taken[key] > 1 else ""
        title, told = board.title, board.warnings
        if len(alike := groups[name]) > 1:
            title += f" (numbers version {board.numbers_version}, data {board.data_sha256[:8]})"
            what = " and ".join(
                word for word, values in (("engine versions", {b.numbers_version for b in alike}),
                                          ("data digests", {b.data_sha256 for b in alike})) if len(values) > 1
            )  # fmt: skip
            told = (*told, f"rows of {len(alike)} {what} were not averaged: each has a board of its own")
        out.append(replace(board, key=key, title=title, warnings=told))
    return out
