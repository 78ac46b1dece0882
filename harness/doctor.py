"""Examine an installation and a workspace: what works, what is damaged, what was left behind, and what to do about it.

Nothing is written unless `repair` is asked for, and then only what needs no judgement: leftovers of killed writers are
swept, and runs whose process is gone are ended in journal and store. Damaged rows and checkpoints are named, never
deleted. Findings name things inside the workspace relative to it, so that they can be posted anywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import sqlite3
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import torch

from harness import __version__, arms, checkpoint, delivery, durable, journal, records, registry, tracking
from harness.config import Layers, dotted, resolve
from harness.published import PublishedDataset

LEFTOVER_SECONDS = 3600.0  # a temporary file this old belongs to no living writer
NAMED = 4  # of many files with the same fault
GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the examination. advice: what to do (empty when there is nothing to); repaired: it was done."""

    level: Literal["ok", "warn", "problem"]
    what: str
    advice: str = ""
    repaired: bool = False


@dataclass(frozen=True)
class _Place:
    """What is examined."""

    workspace: Path
    data_dir: Path
    repair: bool

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoint folders of all runs."""
        return sorted(p for p in (self.workspace / ".harness" / "checkpoints").glob("*") if p.is_dir())

    def alive(self, pretrain_id: str) -> bool:
        """Whether a process is at work on this run."""
        return journal.is_alive(journal.lock_path(self.workspace, pretrain_id))


def examine(workspace: Path, data_dir: Path | None = None, repair: bool = False) -> list[Finding]:
    """Look at everything and return one finding per fact. Never raises: what cannot be examined is a finding too.

    data_dir: None for `HARNESS_DATA` or ./data; repair: sweep leftovers and end dead runs
    """
    place = _Place(workspace, arms.data_root(data_dir), repair)
    findings: list[Finding] = []
    for check in _CHECKS:
        try:
            for finding in check(place):
                findings.append(finding)  # one by one: what was found before a failure is kept
        except Exception as error:
            subject = check.__name__.strip("_").replace("_", " ")
            reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            findings.append(
                Finding("problem", f"{subject}: cannot be examined ({reason})", "look at permissions there")
            )
    return findings


# ------------------------------------------------------------------------------------------------------ machine


def _versions(place: _Place) -> Iterator[Finding]:
    with contextlib.suppress(metadata.PackageNotFoundError):
        wanted = [line for line in metadata.requires("harness") or [] if "extra ==" not in line]
        found = []
        for line in wanted:
            name, _, least = line.partition(">=")
            try:
                version = metadata.version(name)
            except metadata.PackageNotFoundError:
                yield Finding("problem", f"{name} is not installed", f"install {line}")
                continue
            found.append(f"{name} {version}")
            if _numbers(version) < _numbers(least):
                yield Finding("problem", f"{name} {version} is too old", f"install {line}")
        yield Finding("ok", f"harness {__version__}, python {platform.python_version()}, {', '.join(found)}")
    try:
        import_module("torchvision")
    except Exception as error:  # a build for another torch fails while it registers its operators
        advice = "install torch and torchvision from the same place, in matching versions"
        yield Finding("problem", f"torchvision does not work beside this torch ({type(error).__name__})", advice)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", re.match(r"[\d.]*", version)[0]))  # type: ignore[index]


def _devices(place: _Place) -> Iterator[Finding]:
    flags: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.11
    bf16 = ", bf16 in hardware" if any("bf16" in name and value for name, value in flags.items()) else ""
    yield Finding("ok", f"cpu: {torch.get_num_threads()} threads of {os.cpu_count()} cores{bf16}")
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        bf16 = ", bf16" if torch.cuda.is_bf16_supported() else ""
        yield Finding("ok", f"cuda:{index}: {facts.name}, {facts.total_memory / GIB:.0f} GiB{bf16}")
    if torch.backends.mps.is_available():
        yield Finding("ok", "mps: Apple GPU")


def _disk(place: _Place) -> Iterator[Finding]:
    for name, folder, written in (("workspace", place.workspace, True), ("data folder", place.data_dir, False)):
        nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        free = shutil.disk_usage(nearest).free / GIB
        level: Literal["ok", "warn", "problem"] = "problem" if free < 1 else "warn" if free < 5 else "ok"
        there = "" if folder.is_dir() else " (not there yet)"
        advice = "" if level == "ok" else "make room; `harness clean` removes old checkpoints"
        yield Finding(level, f"{name}{there}: {free:,.1f} GiB free", advice)
        if written and not os.access(nearest, os.W_OK):
            yield Finding("problem", f"{name}: cannot be written to", "change its permissions or give --workspace")


def _data_sets(place: _Place) -> Iterator[Finding]:
    present: list[str] = []
    absent: list[str] = []
    for name in registry.names("dataset"):
        plugin = registry.load("dataset", name)
        if plugin.takes_argument:
            continue
        dataset = plugin(place.data_dir)
        if isinstance(dataset, PublishedDataset):
            files = {file for names in dataset.split_files.values() for file in names}
            missing = sorted(file for file in files if dataset.locate(file) is None)
        else:
            files = {file.name for file in plugin.published}
            missing = sorted(file for file in files if not (place.data_dir / file).exists())
        if missing and len(missing) < len(files):
            yield Finding("warn", f"data set {name}: lacks {_some(missing)}", f"run `harness data fetch {name}`")
        else:
            (absent if missing else present).append(name)
    yield Finding("ok", f"data sets here: {', '.join(present) or 'none'}", "`harness data verify NAME` reads them")
    if absent:
        yield Finding("ok", f"data sets not here: {', '.join(absent)}", "`harness data fetch NAME` downloads one")


# ---------------------------------------------------------------------------------------------------- workspace


def _rows(place: _Place) -> Iterator[Finding]:
    top = records.runs_folder(place.workspace)
    count, damaged = 0, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each damaged file is named below
        for path in sorted(top.glob("*/*.json")):
            rows = records.read(path)
            count += len(rows or [])
            if rows is None:
                damaged.append(path.relative_to(top).as_posix())
    for path in sorted(top.glob("*/*.predictions.npz")):
        try:
            with zipfile.ZipFile(path) as archive:
                whole = archive.testzip() is None
        except Exception:  # zipfile meets damage with many kinds of errors
            whole = False
        if not whole:
            damaged.append(path.relative_to(top).as_posix())
    if damaged:
        advice = "delete them (predictions with the .json beside them) and run their commands again"
        yield Finding("problem", f"{len(damaged)} damaged files in results/runs: {_some(damaged)}", advice)
    yield Finding("ok", f"rows: {count:,} whole")


def _checkpoints(place: _Place) -> Iterator[Finding]:
    whole = 0
    for folder in place.checkpoints:
        if place.alive(folder.name):  # its files change under our eyes
            yield Finding("ok", f"run {folder.name}: a process is at work on it")
            continue
        states = sorted(pointer.parent for pointer in folder.rglob(checkpoint.POINTER))
        for part, load in [(folder, checkpoint.load_encoder), *((state, checkpoint.load_state) for state in states)]:
            try:
                whole += load(part) is not None
            except Exception:  # whatever a damaged file makes its reader raise
                where = part.relative_to(place.workspace).as_posix()
                advice = f"delete {where} and run the command of run {folder.name} again"
                yield Finding("problem", f"damaged checkpoint in {where}", advice)
    yield Finding("ok", f"checkpoints: {whole:,} whole")


def _leftovers(place: _Place) -> Iterator[Finding]:
    own, now = place.workspace / ".harness", time.time()
    files = [*own.rglob(f"*{durable.TEMPORARY}"), *records.runs_folder(place.workspace).rglob(f"*{durable.TEMPORARY}")]
    files += [*own.rglob(".*.json.*"), *own.glob("mlflow-*")]  # what tracking writes, and a store half made
    left = sorted(path for path in files if now - path.lstat().st_mtime >= LEFTOVER_SECONDS)
    if not left:
        return
    for path in left if place.repair else ():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    names = _some(path.relative_to(place.workspace).as_posix() for path in left)
    what = f"{len(left)} leftovers of killed writers: {names}"
    yield Finding("warn", what, "harness doctor --repair", repaired=place.repair)


def _interrupted_runs(place: _Place) -> Iterator[Finding]:
    for folder in place.checkpoints:
        if place.alive(folder.name):
            continue
        for pointer in sorted(folder.rglob(checkpoint.POINTER)):
            state = durable.read_sealed(pointer)
            if state is None:
                continue
            finished = (folder / "encoder.json").exists()
            part = "an evaluation" if finished else "the pretraining"
            advice = f"the same command goes on from there{_command(place.workspace, folder.name)}"
            yield Finding("warn", f"run {folder.name}: {part} was interrupted after step {state.get('step')}", advice)


def _command(workspace: Path, pretrain_id: str) -> str:
    """The command behind an interrupted run as its record tells it (which is without labels and a folder's path)."""
    try:
        journals = journal.read(journal.journal_path(workspace, pretrain_id))
        start = next(record for record, _ in journals if record["kind"] == "start")
        folder = workspace / ".harness" / "artifacts" / (start.get("parent") or pretrain_id)
        config = json.loads((folder / "config.json").read_text())
        method, dataset, seed = config["method_name"], config["dataset_name"], config["seed"]
        name, _, argument = dataset.partition(":")
        plugin = registry.load("dataset", name)
        evaluators = {key.split(".")[1] for key in config if key.startswith("eval.")}
        usual = resolve(method, dataset, Layers(), default_encoder=plugin.default_encoder, evaluators=evaluators)
        known = dotted(usual) | {
            "seed": seed, "num_threads": torch.get_num_threads(),
            "precision": arms.resolve_precision(usual.precision, arms.resolve_device("auto")),
            "data.pretrain_split": config["data.pretrain_split"] if argument else plugin.pretrain_split,
        }  # fmt: skip
    except Exception:  # a record of another version, or none: the advice holds without the example
        return ""
    words = [
        "harness",
        "run",
        "--method",
        method,
        "--dataset",
        f"{name}:PATH" if argument else name,
        "--seed",
        str(seed),
    ]
    for key, value in sorted(config.items()):
        if key in known and known[key] != value:
            words += ["--set", f"{key}={'none' if value is None else json.dumps(value)}"]
    return f": {shlex.join(words)}"


# ----------------------------------------------------------------------------------------------------- tracking


def _mlflow_store(place: _Place) -> Iterator[Finding]:
    if not (place.workspace / "mlflow.db").exists():
        yield Finding("ok", "mlflow.db: not there yet")
        return
    advice = "move mlflow.db away and run `harness sync`: it is made anew from journals and rows"
    try:
        with contextlib.closing(_open_store(place.workspace)) as store:
            whole = store.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"
            store.execute("SELECT version_num FROM alembic_version").fetchone()
            runs = store.execute("SELECT count(*) FROM runs WHERE lifecycle_stage = 'active'").fetchone()[0]
    except sqlite3.Error as error:
        if "locked" in str(error):
            yield Finding("warn", "mlflow.db is locked by another process", "wait, or stop what holds it")
        else:
            yield Finding("problem", f"mlflow.db cannot be used ({error})", advice)
        return
    yield Finding("ok", f"mlflow.db: {runs:,} runs") if whole else Finding("problem", "mlflow.db is damaged", advice)


def _open_store(workspace: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(workspace / 'mlflow.db'))}?mode=ro", uri=True, timeout=5)


def _dead_runs(place: _Place) -> Iterator[Finding]:
    """Runs that say they are at work while no process holds their lock."""
    paths = journal.journals_folder(place.workspace).glob("*.jsonl")
    open_runs = {path.stem for path in paths if not journal.finished(path)} | _running(place.workspace)
    dead = sorted(pretrain_id for pretrain_id in open_runs if not place.alive(pretrain_id))
    if not dead:
        return
    ended: list[str] = []
    if place.repair:
        with contextlib.suppress(Exception):  # a store that cannot be used is a finding of its own
            ended = delivery.reap_dead(place.workspace)
    for pretrain_id in dead:
        what = f"run {pretrain_id} was killed and still counts as running"
        yield Finding("problem", what, "harness doctor --repair", repaired=pretrain_id in ended)


def _running(workspace: Path) -> set[str]:
    """pretrain_ids that the workspace's own store shows as RUNNING."""
    query = (
        "SELECT tags.value FROM runs JOIN tags ON tags.run_uuid = runs.run_uuid AND tags.key = 'harness.pretrain_id' "
        "WHERE runs.status = 'RUNNING' AND runs.lifecycle_stage = 'active'"
    )
    try:
        with contextlib.closing(_open_store(workspace)) as store:
            return {str(value) for (value,) in store.execute(query)}
    except sqlite3.Error:  # no store, or a damaged one: that is another finding
        return set()


def _undelivered(place: _Place) -> Iterator[Finding]:
    mirror = delivery.Delivery(tracking.Store(place.workspace, tracking.default_uri(place.workspace)))
    paths = journal.journals_folder(place.workspace).glob("*.jsonl")
    counts = [mirror.owed(path) for path in paths if not place.alive(path.stem)]
    if sum(counts):
        what = f"mlflow.db has not got {sum(counts):,} records of {sum(map(bool, counts)):,} runs"
        yield Finding("warn", what, "harness sync (unless another --tracking is meant to have them)")


def _some(names: Iterable[str]) -> str:
    """The first few of many names."""
    names = list(names)
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


_CHECKS: tuple[Callable[[_Place], Iterator[Finding]], ...] = (
    _versions, _devices, _disk, _data_sets, _rows, _checkpoints, _leftovers, _interrupted_runs, _dead_runs,
    _mlflow_store, _undelivered,
)  # fmt: skip
__all__ = ["Finding", "examine"]
