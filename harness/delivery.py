"""Carry journals to a tracking store: cursors, what is owed, `harness sync`, and the end of runs that were killed.

A cursor file per (run, store) says how far a journal was delivered. It may lag behind, because delivering twice stores
each point once: so a delivery that is killed at any moment loses nothing. Asking what is owed asks no server.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import journal as journals
from harness.journal import Journal, Record, mistake
from harness.tracking import Store, has_tag, resolve_uri

PATIENCE_SECONDS = 40.0  # a mirror whose command is gone ends within 35
_CHUNK = 500  # records per call: bounds the memory of a delivery and what is repeated after a kill


@dataclass(frozen=True)
class Owed:
    """What a store has not got yet: number of journal records per pretrain_id, and why (empty when nothing is owed).

    refused: one line for each record that MLflow will never take (it stays in the journal)
    """

    runs: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""
    refused: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.runs)

    @property
    def line(self) -> str:
        """One line for the user."""
        if not self:
            extra = f", but {len(self.refused)} records it refused: {self.refused[0]}" if self.refused else ""
            return f"tracking: everything is in MLflow{extra}"
        why = f" ({self.reason})" if self.reason else ""
        owed = f"{sum(self.runs.values())} records of {len(self.runs)} run{'s' if len(self.runs) > 1 else ''}"
        return f"tracking: MLflow is owed {owed}{why}; deliver them with `harness sync`"


@dataclass(frozen=True)
class SyncReport:
    """What `sync` did. delivered: number of journal records and rows sent; owed: what is left, and what was refused."""

    delivered: int
    owed: Owed


class Delivery:
    """Carry journals to one store, each from where its cursor stands; one process at a time per journal."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.delivered = 0
        self.refused: list[str] = []
        self._verified: set[tuple[int, str]] = set()

    def _side_file(self, path: Path, ending: str) -> Path:
        return path.with_name(f"{path.stem}.{self.store.key}.{ending}")

    def _cursor(self, path: Path) -> tuple[str | None, int]:
        """(MLflow run, byte offset delivered); a damaged cursor counts as none, and everything is sent again."""
        try:
            cursor = json.loads(self._side_file(path, "cursor.json").read_text())
            return cursor["run_id"], int(cursor["offset"])
        except (OSError, ValueError, KeyError, TypeError):
            return None, 0

    def owed(self, path: Path) -> int:
        """Records behind the cursor; asks no server."""
        offset = 0 if self.store.emptied else self._cursor(path)[1]
        return sum(1 for _ in journals.read(path, offset))

    def all_owed(self, paths: Iterable[Path]) -> dict[str, int]:
        """Number of owed records per pretrain_id, without those that are owed nothing."""
        return {path.stem: count for path in paths if (count := self.owed(path))}

    def pending(self, path: Path) -> bool:
        """Whether there is anything to deliver; asks no server."""
        offset = 0 if self.store.emptied else self._cursor(path)[1]
        return next(journals.read(path, offset, limit=1), None) is not None

    def deliver(self, path: Path) -> bool:
        """Send what is owed of one journal; False when another process is at it. Raises while the store is away."""
        with journals.hold(self._side_file(path, "lock"), wait_seconds=0) as mine:
            if not mine:
                return False
            start = next((record for record, _ in journals.read(path) if record["kind"] == "start"), None)
            if start is None:
                return True
            self.store.connect()
            run_id, offset = self._cursor(path)
            known = (self.store.generation, run_id or "") in self._verified
            if run_id is not None and not known and not self.store.run_exists(run_id):
                run_id = None
            if run_id is None:
                above = path.with_name(f"{start.get('parent')}.jsonl")
                if above.exists() and self._cursor(above)[0] is None:  # a run can only be put below one that is there
                    self.deliver(above)
                run_id, offset = self.store.run_of(start, path.stem), 0
            self._verified.add((self.store.generation, run_id))
            while chunk := list(journals.read(path, offset, limit=_CHUNK)):
                records = [record for record, _ in chunk]
                self.refused += self.store.send(run_id, records)
                offset = chunk[-1][1]
                write_whole(self._side_file(path, "cursor.json"), json.dumps({"run_id": run_id, "offset": offset}))
                self.delivered += len(chunk)
                if records[-1]["kind"] == "end":
                    self.store.drop_doubles(run_id, start, path.stem)
        return True

    def deliver_rows(self, folder: Path) -> None:
        """Make (or complete) the run of a pretrain_id that left row files but no journal."""
        rows = [row for file in sorted(folder.glob("*.json")) for row in json.loads(file.read_text())["rows"]]
        if not rows:
            return
        known = self.store.find_runs(has_tag("harness.pretrain_id", folder.name))
        if any(run.data.tags.get("harness.journal") != "rows" for run in known):
            return
        records = _records_of_rows(rows)
        self.refused += self.store.send(self.store.run_of(records[0], folder.name), records)
        self.delivered += len(rows)


def _records_of_rows(rows: Sequence[Mapping[str, Any]]) -> list[Record]:
    """The journal that rows alone allow: settings, identity, numbers and the last status."""
    first, last = min(rows, key=lambda row: row["started_at"]), max(rows, key=lambda row: row["finished_at"])
    points = [point for row in rows if (point := journals.row_point(row)) is not None]
    tags = {key: str(first[key]) for key in ("method", "dataset", "encoder", "seed", "weights_sha256")}
    return [
        {"kind": "start", "time": journals.milliseconds(first["started_at"]), "journal": "rows", "attempt": 1,
         "name": f"{first['method']}-{first['dataset']}-s{first['seed']}"},
        {"kind": "params", "values": dict(_dotted(first["config"]))},
        {"kind": "tags", "values": tags},
        {"kind": "rows", "points": [[p.key, p.value, p.step, p.time] for p in points]},
        {"kind": "end", "time": journals.milliseconds(last["finished_at"]), "status": last["status"]},
    ]  # fmt: skip


def _dotted(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def journals_of(workspace: Path) -> list[Path]:
    """The journals of a workspace, in the order of their pretrain_ids."""
    return sorted(journals.journals_folder(workspace).glob("*.jsonl"))


def is_alive(workspace: Path, path: Path) -> bool:
    """Whether a process is at work on the run of this journal."""
    return journals.is_alive(journals.lock_path(workspace, path.stem))


# ------------------------------------------------------------------------------------------------- repair and look


def end_dead(workspace: Path, paths: Iterable[Path]) -> list[str]:
    """Write the end that killed runs could not write themselves into their journals; returns their pretrain_ids."""
    dead = []
    for path in paths:
        if journals.finished(path) or is_alive(workspace, path):
            continue
        with journals.hold(journals.lock_path(workspace, path.stem)) as mine:
            if mine and not journals.finished(path):
                Journal(path).end("INTERRUPTED")
                dead.append(path.stem)
    return dead


def reap_dead(workspace: Path, uri: str | None = None) -> list[str]:
    """Close the MLflow runs whose process is gone (SIGKILL, power cut): RUNNING becomes KILLED. Returns pretrain_ids.

    A run is ours to close when its journal lies in this workspace, or the store is the workspace's own.
    Raises what MLflow raises while the store is away.
    """
    workspace = workspace.resolve()
    dead = end_dead(workspace, journals_of(workspace))
    resolved = resolve_uri(workspace, uri)
    if resolved is None:
        return dead
    delivery = Delivery(Store(workspace, resolved))
    if delivery.store.emptied:
        return dead
    for run in delivery.store.find_runs("attributes.status = 'RUNNING'"):
        pretrain_id, run_id = run.data.tags.get("harness.pretrain_id", ""), run.info.run_id
        if not pretrain_id or journals.is_alive(journals.lock_path(workspace, pretrain_id)):
            continue
        journal = Journal(journals.journal_path(workspace, pretrain_id))
        if not delivery.store.local and journal.identity != run.data.tags.get("harness.journal"):
            continue
        if delivery.pending(journal.path):  # its end is in the journal, and may be a happy one
            delivery.deliver(journal.path)
        if delivery.store.connect().get_run(run_id).info.status == "RUNNING":
            delivery.store.connect().set_terminated(run_id, status="KILLED")
        dead.append(pretrain_id)
    return sorted(set(dead))


def sync(workspace: Path, uri: str | None = None) -> SyncReport:
    """Deliver everything the store lacks, from the journals and, for runs without one, from the row files.

    A store that was emptied or removed is filled again, each point once.
    """
    workspace = workspace.resolve()
    resolved = resolve_uri(workspace, uri)
    if resolved is None:
        raise mistake("--tracking none: there is no store to deliver to")
    delivery = Delivery(Store(workspace, resolved))
    paths = journals_of(workspace)
    end_dead(workspace, paths)
    folders = [folder for folder in sorted((workspace / "results" / "runs").glob("*")) if folder.is_dir()
               and not journals.journal_path(workspace, folder.name).exists()]  # fmt: skip
    reason = ""
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        for path in paths:
            while not delivery.deliver(path) and time.monotonic() < deadline:
                time.sleep(0.2)  # the mirror of a command that has just ended is still at it
        while folders:
            delivery.deliver_rows(folders[0])
            del folders[0]
    except Exception as error:  # the store is away, or a row file is not one: say so and keep the rest owed
        reason = delivery.store.scrub(error)
    from_rows = {folder.name: len(list(folder.glob("*.json"))) for folder in folders}
    left = {**delivery.all_owed(paths), **from_rows}
    return SyncReport(delivery.delivered, Owed(left, reason, tuple(delivery.refused)))
