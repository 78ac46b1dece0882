"""Rows as measurements: everything one evaluator found on one run, which is one row file, as one record."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from harness import declarations
from harness.errors import HarnessError
from harness.report.boards import Role

if TYPE_CHECKING:
    import pandas as pd

# what a board is about: top-1 (`_linear`: of a kernel machine that had too many labels for its kernel), or its mean over
# corruptions, which compares with its like alone
CLEAN, CORRUPTED = ("top1", "top1_linear"), "top1_corrupted"
ONE_SEVERITY = re.compile(r"top1_.+_[0-9]")
# what says how the work was done, or what differs by seed, and not what was done
TECHNICAL = {"seed", "stack_seeds", "stacked_seeds", "compile", "num_threads", "activation_checkpointing", "method_name",
             "dataset_name"}  # fmt: skip
TRAINING = ("epochs", "batch_size", "accumulate", "optim.", "schedule.")
COLUMNS = (
    "method", "dataset", "pretrain_data", "encoder", "labels", "evaluator", "seed", "label_seed", "fold", "pretrain_id",
    "eval_id", "code_sha256", "numbers_version", "data_sha256", "data_verified", "config", "steps", "readout", "split",
    "metric", "value", "n_test", "converged", "collapsed", "images_seen", "views_seen", "device_seconds",
    "images_per_second", "peak_memory_bytes", "device", "precision", "finished_at", "status",
)  # fmt: skip


Key = TypeVar("Key")


@dataclass(frozen=True)
class Plugin:
    """What a method's file says of it; a method that is not installed is known by its name alone."""

    title: str
    role: Role
    family: str
    tier: str
    year: int | None
    null_control: str | None


@dataclass(slots=True)
class Measured:
    """One evaluation of one run.

    tops: {split: {readout: top-1}}, in the rows' order; the readout is empty for an evaluator without readouts
    others: {readout: {metric: test value}}; unconverged: {(split, readout)}; rows: positions in the table of rows
    cell: (label_seed, fold); data: what the run saw unlabelled, in words
    own_encoder: the method brought its network, whatever was asked for
    settings: the configuration without `TECHNICAL`, and of what trained nothing without `TRAINING`; identity: its JSON
    """

    method: str
    dataset: str
    data: str
    encoder: str
    labels: str
    evaluator: str
    seed: int
    cell: tuple[int | None, int | None]
    pretrain_id: str
    eval_id: str
    code_sha256: str
    numbers_version: int
    data_sha256: str
    data_verified: bool
    own_encoder: bool
    settings: dict[str, Any]
    identity: str
    device: str
    finished_at: str
    images_seen: float
    views_seen: float
    images_per_second: float | None
    peak_memory_bytes: float | None
    evaluation_seconds: float | None
    pretrain_seconds: float | None = None
    metric: str = CLEAN[0]
    n_test: int | None = None
    collapsed: bool = False
    rows: list[int] = field(default_factory=list)
    unconverged: set[tuple[str, str]] = field(default_factory=set)
    tops: dict[str, dict[str, float]] = field(default_factory=dict)
    others: dict[str, dict[str, float]] = field(default_factory=dict)

    def chosen(self, split: str) -> str | None:
        """The readout with the best validation value among those measured on `split`; of equal ones the first."""
        found = self.tops.get(split, {})
        validation = self.tops.get("validation", {})
        return max(found, key=lambda name: validation.get(name, -math.inf), default=None)


def measured(rows: pd.DataFrame) -> list[Measured]:
    """Every labelled evaluation with a top-1 among `rows`, in their order; `Measured.rows` are positions in `rows`."""
    found: dict[tuple[Any, ...], Measured] = {}
    collapsed: set[str] = set()
    seconds: dict[str, float] = {}
    shared: dict[str, dict[str, Any]] = {}  # configurations are few, measurements many
    known: dict[tuple[int, bool, bool], tuple[dict[str, Any], str]] = {}
    for place, row in enumerate(_records(rows)):
        if row["collapsed"]:
            collapsed.add(row["pretrain_id"])
        if row["split"] == "pretrain" and row["evaluator"] == "pretext" and row["device_seconds"] is not None:
            seconds[row["pretrain_id"]] = row["device_seconds"]
        if row["labels"] is None or row["value"] is None or row["split"] not in ("test", "validation"):
            continue
        key = (row["pretrain_id"], row["eval_id"], row["method"], row["evaluator"], row["labels"], row["seed"],
               row["label_seed"], row["fold"])  # fmt: skip
        one = found.get(key)
        if one is None:
            one = found[key] = _start(row, shared, known)
        one.rows.append(place)
        _add(one, row)
    for one in found.values():
        one.collapsed = one.pretrain_id in collapsed
        one.pretrain_seconds = seconds.get(one.pretrain_id)
    # an evaluator that has other numbers on the test split, but no top-1 there, is about something else (calibration)
    return [one for one in found.values() if "test" in one.tops or (one.tops and not one.others)]


def label_free(rows: pd.DataFrame) -> dict[str, list[int]]:
    """{pretrain_id: positions in `rows` of its rows that no label went into}."""
    apart = rows.index[rows["split"] == "pretrain"]
    return _positions(apart, rows["pretrain_id"].loc[apart])


def lost(rows: pd.DataFrame) -> dict[tuple[str, str], list[int]]:
    """{(dataset, encoder): positions in `rows` of pretrainings and evaluations without a number}."""
    apart = rows.index[rows["value"].isna() & (rows["status"] != "FINISHED")]
    return _positions(apart, zip(rows["dataset"].loc[apart], rows["encoder"].loc[apart], strict=True))


def _positions(places: Iterable[int], keys: Iterable[Key]) -> dict[Key, list[int]]:
    out: dict[Key, list[int]] = {}
    for place, key in zip(places, keys, strict=True):
        out.setdefault(key, []).append(place)
    return out


def _records(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    columns = []
    for name in COLUMNS:
        column = rows[name].astype(object)
        columns.append(column.where(column.notna(), None).tolist())
    for values in zip(*columns, strict=True):
        yield dict(zip(COLUMNS, values, strict=True))


def _start(
    row: Mapping[str, Any],
    shared: dict[str, dict[str, Any]],
    known: dict[tuple[int, bool, bool], tuple[dict[str, Any], str]],
) -> Measured:
    """shared: {identity: settings}; known: (settings, identity) by what `_settings` is made from, the configuration by its
    place in memory, since rows that were read together share theirs."""
    made_from = (id(row["config"]), bool(row["steps"]), _own_encoder(row))
    if made_from not in known:
        settings = _settings(row)
        identity = sys.intern(json.dumps(settings, sort_keys=True, default=str))
        known[made_from] = shared.setdefault(identity, settings), identity
    settings, identity = known[made_from]
    return Measured(
        method=row["method"], dataset=row["dataset"], data=_data(row), encoder=row["encoder"], labels=row["labels"],
        evaluator=row["evaluator"], seed=int(row["seed"]), cell=(_whole(row["label_seed"]), _whole(row["fold"])),
        pretrain_id=row["pretrain_id"], eval_id=row["eval_id"], code_sha256=row["code_sha256"],
        numbers_version=int(row["numbers_version"]), data_sha256=row["data_sha256"],
        data_verified=bool(row["data_verified"]), own_encoder=_own_encoder(row), settings=settings,
        identity=identity, device=row["device"],
        finished_at=row["finished_at"], images_seen=float(row["images_seen"]), views_seen=float(row["views_seen"]),
        images_per_second=row["images_per_second"], peak_memory_bytes=row["peak_memory_bytes"],
        evaluation_seconds=row["device_seconds"],
    )  # fmt: skip


def _settings(row: Mapping[str, Any]) -> dict[str, Any]:
    drop = ("data.", *(() if row["steps"] else TRAINING), *(("encoder.",) if _own_encoder(row) else ()))
    return {key: value for key, value in row["config"].items() if key not in TECHNICAL and not key.startswith(drop)}


def _own_encoder(row: Mapping[str, Any]) -> bool:
    """Whether the method brought its network, whatever was asked for."""
    return bool(row["config"].get("encoder.name", row["encoder"]) != row["encoder"])


def _data(row: Mapping[str, Any]) -> str:
    """The unlabelled images in words: the splits, and how many and how large where that was asked for."""
    config = row["config"]
    count, side = config.get("data.num_pretrain_images"), config.get("data.image_size")
    return row["pretrain_data"] + (f", {count:,} images" if count else "") + (f", {side} px" if side else "")


def _add(one: Measured, row: Mapping[str, Any]) -> None:
    readout = row["readout"] or ""
    if row["split"] == "test":
        one.data_sha256, one.data_verified = row["data_sha256"], bool(row["data_verified"])
        one.n_test = _whole(row["n_test"]) or one.n_test
    if row["metric"] in (*CLEAN, CORRUPTED):
        one.metric = row["metric"] if row["split"] == "test" or "test" not in one.tops else one.metric
        one.tops.setdefault(row["split"], {})[readout] = row["value"]
        if row["converged"] is not None and not row["converged"]:
            one.unconverged.add((row["split"], readout))
    elif row["split"] == "test" and not ONE_SEVERITY.fullmatch(row["metric"]):
        one.others.setdefault(readout, {})[row["metric"]] = row["value"]


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def plugins_of(methods: Iterable[str]) -> dict[str, Plugin]:
    """What the installed plugins say of these methods."""
    known: dict[str, dict[str, Any] | None] = {}
    for name in dict.fromkeys(methods):
        try:
            known[name] = declarations.of_method(name)
        except (HarnessError, ImportError):
            known[name] = None
    nulls = {told["null_control"] for told in known.values() if told is not None}
    out = {}
    for name, told in known.items():
        if told is None:
            out[name] = Plugin(name, "null control" if name in nulls else "method", "", "", None, None)
            continue
        # a null control whose method is not among the rows is told by its family
        is_null = name in nulls or (told["role"] is None and told["family"] == "control")
        role: Role = "null control" if is_null else told["role"] or "method"
        out[name] = Plugin(told["title"], role, told["family"], told["tier"], told["year"], told["null_control"])
    return out
