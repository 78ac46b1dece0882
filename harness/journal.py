"""The local, append-only journal of one run: the truth that MLflow mirrors and can be rebuilt from.

One JSONL file per run, `<workspace>/.harness/journals/<pretrain_id>.jsonl`. Each line is one JSON object that ends with
a CRC-32 of the rest, and is written by a single `os.write` on a descriptor opened for appending: a reader, or a process
killed at any moment, sees whole lines or one torn last line, which is left out by every reader and closed off by the
next writer. A repeated attempt logs the same steps again; a point that the journal holds already is not written twice.

Nothing here imports MLflow, and nothing waits for anything but the local disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.contracts import HarnessError

Record = dict[str, Any]
_CRC = ',"crc":"'
_CRC_LENGTH = len(_CRC) + 8 + 2


def mistake(text: str) -> HarnessError:
    """A HarnessError to raise. Its module brings torch (3 CPU s, 150 MB), which the mirror process does without."""
    from harness.contracts import HarnessError

    return HarnessError(text)


def journals_folder(workspace: Path) -> Path:
    """The folder that holds the journals of `workspace`."""
    return workspace / ".harness" / "journals"


def journal_path(workspace: Path, pretrain_id: str) -> Path:
    """The journal of one run; refuses an identity that is not a plain file name."""
    if not pretrain_id or pretrain_id != os.path.basename(pretrain_id) or pretrain_id.startswith("."):
        raise mistake(f"'{pretrain_id}' is no run identity: it must be a plain name")
    return journals_folder(workspace) / f"{pretrain_id}.jsonl"


def lock_path(workspace: Path, pretrain_id: str) -> Path:
    """The file whose flock the owner of a run holds while it lives."""
    return workspace / ".harness" / "locks" / f"{pretrain_id}.lock"


# ------------------------------------------------------------------------------------------------------------ locks


@contextlib.contextmanager
def hold(path: Path, wait_seconds: float = 0.2) -> Iterator[bool]:
    """Hold an exclusive flock on `path` inside the block; yields False where another process keeps it.

    The kernel frees it when the process dies. The short wait lets the passing probe of `is_alive` go by.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + wait_seconds
        while not (held := _try_flock(descriptor, fcntl.LOCK_EX)) and time.monotonic() < deadline:
            time.sleep(0.01)
        yield held
    finally:
        os.close(descriptor)


def is_alive(path: Path) -> bool:
    """Whether some process (this one included) holds the exclusive flock on `path`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not _try_flock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _try_flock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------- reading


def encode(record: Mapping[str, Any]) -> bytes:
    """One line of a journal: compact JSON whose last field is the CRC-32 of all that stands before it."""
    body = json.dumps(record, separators=(",", ":"), allow_nan=False)[:-1]
    return f'{body}{_CRC}{zlib.crc32(body.encode()):08x}"}}\n'.encode()


def decode(line: bytes) -> Record | None:
    """The record in one line, or None where the line is torn, altered or empty."""
    text = line.rstrip(b"\n")
    body, check = text[:-_CRC_LENGTH], text[-_CRC_LENGTH:]
    if check != f'{_CRC}{zlib.crc32(body):08x}"}}'.encode():
        return None
    record: Record = json.loads(text)
    del record["crc"]
    return record


def read(path: Path, offset: int = 0, limit: int | None = None) -> Iterator[tuple[Record, int]]:
    """Yield (record, byte offset behind it) of the whole lines from `offset` on, at most `limit`; damage is skipped."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        count = 0
        while (limit is None or count < limit) and (line := file.readline()).endswith(b"\n"):
            offset += len(line)
            if (record := decode(line)) is not None:
                count += 1
                yield record, offset


def finished(path: Path) -> bool:
    """Whether the last attempt in the journal said how it ended (or the journal holds no attempt at all)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 4096))
        tail = file.read().splitlines()
    last = decode(tail[-1]) if tail else None
    if last is not None and last["kind"] == "end":
        return True
    kinds = [record["kind"] for record, _ in read(path) if record["kind"] in ("start", "end")]
    return not kinds or kinds[-1] == "end"


# ------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Point:
    """One value as MLflow stores it: time is milliseconds since 1970."""

    key: str
    value: float
    step: int
    time: int


def row_point(row: Mapping[str, Any]) -> Point | None:
    """A row as one metric `<evaluator>.<readout>.<split>.<metric> labels:<budget>`; None for a row without a number.

    A row of a transfer (harness.transfer) has ` on:<data set>` at the end. The time is the row's own `finished_at`, so
    that the same row told twice is the same point.
    """
    if row["value"] is None or not math.isfinite(row["value"]):
        return None
    key = ".".join(str(row[part]) for part in ("evaluator", "readout", "split", "metric") if row.get(part))
    if row.get("labels") is not None:
        key += f" labels:{row['labels']}"
    if row.get("fold") is not None:
        key += f" fold:{row['fold']}"
    if row.get("label_seed") not in (None, row.get("seed")):
        key += f" label_seed:{row['label_seed']}"
    if ":" in (row.get("pretrain_data") or ""):
        key += f" on:{row['dataset']}"
    return Point(key, float(row["value"]), int(row.get("steps") or 0), milliseconds(row["finished_at"]))


def milliseconds(moment: str) -> int:
    """An ISO 8601 moment as milliseconds since 1970."""
    return int(datetime.fromisoformat(moment).timestamp() * 1000)


# ---------------------------------------------------------------------------------------------------------- writing


class Journal:
    """Write (and read back) the journal of one run. The file is made by the first append, not before.

    path: `<workspace>/.harness/journals/<pretrain_id>.jsonl`
    Every writing call raises HarnessError when the disk takes no more; none waits for a tracking server.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.workspace = path.resolve().parents[2]
        self._descriptor: int | None = None
        self._known_points: set[tuple[str, int, Any]] = set()
        self._known_values: dict[str, dict[str, Any]] = {"params": {}, "tags": {}}
        self._known_datasets: list[dict[str, str]] = []
        self.identity = ""
        self.attempts = 0
        for record in self.records():
            self._remember(record)

    @property
    def pretrain_id(self) -> str:
        """The run this journal belongs to."""
        return self.path.stem

    def records(self) -> list[Record]:
        """Every readable record, oldest first."""
        return [record for record, _ in read(self.path)]

    def steps_executed(self, phase: str | None = None) -> int:
        """Steps really run over all attempts (of one phase, or of all): more than `steps` means repeated work."""
        steps = (r for r in self.records() if r["kind"] == "steps")
        return sum(int(r["executed"]) for r in steps if phase is None or r["phase"] == phase)

    def append(self, kind: str, **fields: Any) -> None:
        """Write one record as one line; `time` (milliseconds since 1970) is added."""
        self._write({"kind": kind, "time": int(time.time() * 1000), **fields})

    def begin(
        self,
        name: str,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        datasets: Iterable[Mapping[str, str]] = (),
        parent: str | None = None,
    ) -> None:
        """Open an attempt: its start, and of the rest whatever the journal does not hold yet.

        A parameter keeps the value of the first attempt, as MLflow demands; what may change belongs into the tags.
        """
        self.append("start", name=name, attempt=self.attempts + 1, journal=self.identity or uuid.uuid4().hex,
                    parent=parent)  # fmt: skip
        new = {key: str(value) for key, value in params.items() if key not in self._known_values["params"]}
        if new:
            self.append("params", values=new)
        self.tags(tags)
        for dataset in datasets:
            if dict(dataset) not in self._known_datasets:
                self.append("dataset", dataset=dict(dataset))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log values at one step. A point told before is dropped; a number that is not finite is kept as its name."""
        told = {key: value if math.isfinite(value) else str(value) for key, value in _floats(values)}
        new = {key: value for key, value in told.items() if (key, step, value) not in self._known_points}
        if new:
            self.append("metrics", step=int(step), values=new)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags (MLflow shows them as `harness.<key>`); the last value wins."""
        known = self._known_values["tags"]
        new = {key: str(value) for key, value in values.items() if known.get(key) != str(value)}
        if new:
            self.append("tags", values=new)

    def artifact(self, name: str, path: Path) -> None:
        """Name a finished file inside the workspace that belongs to the run; `name` may hold folders."""
        inside = path.resolve().relative_to(self.workspace)
        self.append("artifact", name=name, path=inside.as_posix())

    def steps(self, phase: str, executed: int, step: int | None = None) -> None:
        """Count optimisation steps this process ran since it last said so; `step` is where it stands now."""
        if executed:
            self.append("steps", phase=phase, executed=int(executed), step=step)

    def rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Record finished rows (field names of contracts.Row) as points."""
        points = [point for row in rows if (point := row_point(row)) is not None]
        new = [p for p in points if (p.key, p.step, (p.value, p.time)) not in self._known_points]
        if new:
            self.append("rows", points=[[p.key, p.value, p.step, p.time] for p in new])

    def end(self, status: str) -> None:
        """Close the attempt with a status of contracts.Status and make the whole journal durable."""
        self.append("end", status=status)
        assert self._descriptor is not None
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None

    def _write(self, record: Record) -> None:
        line = encode(record)
        if self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(self.path, flags, 0o644)
            line = self._after_torn_line(line)
        try:
            written, reason = os.write(self._descriptor, line), "the disk is full"
        except OSError as error:
            written, reason = 0, str(error.strerror)
        if written < len(line):
            os.close(self._descriptor)  # the next append opens the file again and closes a torn line off
            self._descriptor = None
            raise mistake(f"cannot write the journal {self.path}: {reason}")
        self._remember(record)

    def _after_torn_line(self, line: bytes) -> bytes:
        """Close off what a killed writer left without an end of line.

        A line break is put before the next line instead of cutting the file: two processes may write one journal (the
        lock is advisory), and a cut could take a line that the other one wrote in between.
        """
        assert self._descriptor is not None
        size = os.fstat(self._descriptor).st_size
        torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"
        return b"\n" + line if torn else line

    def _remember(self, record: Record) -> None:
        kind = record["kind"]
        if kind == "start":
            self.identity = self.identity or record["journal"]
            self.attempts = max(self.attempts, record["attempt"])
        elif kind == "metrics":
            self._known_points.update((key, record["step"], value) for key, value in record["values"].items())
        elif kind == "rows":
            self._known_points.update((key, step, (value, moment)) for key, value, step, moment in record["points"])
        elif kind in ("params", "tags"):
            self._known_values[kind].update(record["values"])
        elif kind == "dataset":
            self._known_datasets.append(record["dataset"])


def _floats(values: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    return ((key, float(value)) for key, value in values.items())
