"""Mirror run journals into MLflow, in the background: the only module that imports mlflow, and only when it must.

Training writes to its journal (harness.journal) and to nothing else. A daemon thread reads the journals by offset and
delivers them; a cursor file per (run, store) says how far it came. Delivering twice stores each point once, so the
cursor may lag: MLflow keeps one point per (key, step, time, value), and the times come from the journal. A store that
is away, frozen or emptied is met by trying again, now or with `harness sync`, and never reaches the training loop.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from harness import journal as journals
from harness.contracts import HarnessError
from harness.journal import Journal, Record

EXPERIMENT = "harness"
_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql")
_ENDINGS = {"FINISHED": "FINISHED", "INTERRUPTED": "KILLED"}  # every other status of a run is FAILED in MLflow
# Not BAD_REQUEST: MLflow gives it for any trouble of its database as well, and what is refused is not sent again.
_PERMANENT = {"INVALID_PARAMETER_VALUE", "INVALID_STATE"}
_CHUNK = 500  # records per delivery: bounds the memory of the thread and what is repeated after a kill
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # a call to a dead server blocks 246 s with MLflow's own settings
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}


# ------------------------------------------------------------------------------------------------------- the store


def default_uri(workspace: Path) -> str:
    """The workspace's own store, `sqlite:///<workspace>/mlflow.db`: a bare `mlflow ui` started there finds it."""
    return "sqlite:///" + quote(f"{workspace.resolve()}/mlflow.db", safe="/ :@+,;=&!$'()*~#[]")


def resolve_uri(workspace: Path, uri: str | None) -> str | None:
    """What `--tracking` means: None is the workspace's own store, "none" is no tracking (None). Writes nothing.

    Raises HarnessError for anything that is not an address of a database or a server, a plain folder above all.
    """
    if uri is None:
        return default_uri(workspace)
    if uri == "none":
        return None
    scheme = uri.split("://")[0].split("+")[0] if "://" in uri else ""
    if scheme not in _SCHEMES:
        raise HarnessError(
            f"--tracking {redact(uri)}: not a tracking store; give sqlite:///FILE.db, http(s)://HOST:PORT, "
            "postgresql://USER@HOST/DATABASE or none (MLflow no longer writes to plain folders)"
        )
    if scheme == "sqlite":
        return "sqlite:///" + os.path.abspath(uri.removeprefix("sqlite:///"))
    return uri


def redact(uri: str) -> str:
    """The address without its password and query, fit to be printed."""
    if uri.startswith("sqlite:"):
        return uri
    scheme, divider, rest = uri.rpartition("://")
    credentials, at, place = rest.rpartition("@")  # the last @: a password may hold one, and / or ? as well
    user = f"{credentials.partition(':')[0]}:***" if at else ""
    return f"{scheme}{divider}{user}{at}{place.partition('?')[0]}"


def _secrets(uri: str) -> list[str]:
    """What must never be printed of an address: its password, as written and as decoded."""
    password = uri.rpartition("://")[2].rpartition("@")[0].partition(":")[2]
    queries = [pair.partition("=")[2] for pair in uri.partition("?")[2].split("&") if "pass" in pair.lower()]
    return [text for secret in (password, *queries) if secret for text in {secret, unquote(secret)}]


class _Store:
    """One MLflow store: where runs are found or made, and how records become calls. Errors of MLflow pass through."""

    def __init__(self, workspace: Path, uri: str) -> None:
        self.workspace = workspace.resolve()
        self.uri = uri
        self.local = uri == default_uri(workspace)
        name = "workspace" if self.local else redact(uri)
        self.key = hashlib.sha256(name.encode()).hexdigest()[:12]
        self._client: Any = None
        self._experiment = ""

    def scrub(self, error: BaseException) -> str:
        """The first line of an error, without the password."""
        text = (str(error).strip() or type(error).__name__).splitlines()[0].replace(self.uri, redact(self.uri))
        for secret in _secrets(self.uri):
            text = text.replace(secret, "***")
        return text[:300]

    @property
    def emptied(self) -> bool:
        """Whether this is the workspace's own database and somebody removed the file."""
        return self.local and not (self.workspace / "mlflow.db").exists()

    def connect(self) -> Any:
        """The MLflow client; the first call imports mlflow and makes the store. Raises while the store is away."""
        fresh = self.emptied
        if self._client is not None and not fresh:
            return self._client
        for key, value in _ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        import mlflow.tracking

        for name in ("mlflow", "alembic", "urllib3"):  # progress notes do not belong between our own lines
            logging.getLogger(name).setLevel(logging.ERROR)
        if fresh:
            self._create_database()
        client = mlflow.tracking.MlflowClient(tracking_uri=self.uri)
        if fresh:  # MLflow keeps its connections for the life of the process: they may lead into a removed file
            client._tracking_client.store.engine.dispose()
        self._experiment = self._find_experiment(client)
        self._client = client
        return client

    def _create_database(self) -> None:
        """Run the migrations on a private file and move it into place whole.

        A process killed inside the 60 migrations would leave a database that MLflow can neither use nor mend.
        """
        import mlflow.tracking

        target = self.workspace / "mlflow.db"
        folder = self.workspace / ".harness"
        folder.mkdir(parents=True, exist_ok=True)
        with (
            journals.hold(folder / "locks" / "mlflow.db.lock", wait_seconds=60),
            tempfile.TemporaryDirectory(dir=folder, prefix="mlflow-") as scratch,
        ):
            if target.exists():
                return
            made, moved = Path(scratch) / "made.db", Path(scratch) / "moved.db"
            client = mlflow.tracking.MlflowClient(tracking_uri="sqlite:///" + quote(str(made), safe="/ "))
            self._find_experiment(client)
            # A copy, so that no connection which MLflow keeps open to the first file points into the store.
            with (
                contextlib.closing(sqlite3.connect(made)) as source,
                contextlib.closing(sqlite3.connect(moved)) as copy,
            ):
                source.backup(copy)
            os.replace(moved, target)

    def _find_experiment(self, client: Any) -> str:
        artifacts = self.workspace / "mlartifacts"
        location = None if self.uri.startswith("http") else artifacts.as_uri()
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            try:
                return str(client.create_experiment(EXPERIMENT, artifact_location=location))
            except Exception:  # another process was faster, or the store is really away: then this raises again
                experiment = client.get_experiment_by_name(EXPERIMENT)
                if experiment is None:
                    raise
        if self.local and experiment.artifact_location != location:
            raise HarnessError(
                "the workspace was moved and mlflow.db points to its old place: remove mlflow.db and run `harness sync`"
            )
        return str(experiment.experiment_id)

    # ------------------------------------------------------------------------------------------------------- runs

    def find_runs(self, *conditions: str) -> list[Any]:
        """Live MLflow runs of our experiment that meet all conditions, in the order of (start, id)."""
        client = self.connect()
        found: list[Any] = []
        token = None
        while True:
            page = client.search_runs([self._experiment], " and ".join(conditions), max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))

    def run_of(self, start: Record, pretrain_id: str) -> str:
        """The MLflow run that mirrors this journal, made when there is none."""
        conditions = (_is("harness.pretrain_id", pretrain_id), _is("harness.journal", start["journal"]))
        if not self.find_runs(*conditions):
            tags = {"harness.pretrain_id": pretrain_id, "harness.journal": start["journal"]}
            if start.get("parent"):
                tags["harness.parent"] = start["parent"]
                parents = self.find_runs(_is("harness.pretrain_id", start["parent"]))
                if parents:
                    tags["mlflow.parentRunId"] = parents[0].info.run_id
            self.connect().create_run(self._experiment, start_time=start["time"], tags=tags, run_name=start["name"])
        return str(self.find_runs(*conditions)[0].info.run_id)

    def run_exists(self, run_id: str) -> bool:
        """False when the store does not know the run (it was emptied or rebuilt); other errors pass."""
        from mlflow.exceptions import MlflowException

        try:
            self.connect().get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return True

    def drop_doubles(self, run_id: str, start: Record, pretrain_id: str) -> None:
        """Remove empty twins: a frozen server may carry out a `create_run` that we gave up and asked for again."""
        conditions = (_is("harness.pretrain_id", pretrain_id), _is("harness.journal", start["journal"]))
        for run in self.find_runs(*conditions):
            if run.info.run_id != run_id and not run.data.params and not run.data.metrics:
                self.connect().delete_run(run.info.run_id)

    # ---------------------------------------------------------------------------------------------------- sending

    def send(self, run_id: str, records: Sequence[Record]) -> list[str]:
        """Deliver records; returns one line for each that MLflow will never take. Raises while the store is away."""
        from mlflow.exceptions import MlflowException

        try:
            self._send(run_id, records)
        except MlflowException as error:
            if error.error_code not in _PERMANENT:
                raise
            if len(records) == 1:
                return [f"{records[0]['kind']}: {self.scrub(error)}"]
            return [line for record in records for line in self.send(run_id, [record])]
        return []

    def _send(self, run_id: str, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        client = self.connect()
        points = [point for record in records for point in _points(record)]
        params = {_name(k): v for record in records if record["kind"] == "params" for k, v in record["values"].items()}
        tags = _tags(records)
        metrics = [Metric(_name(key), value, moment, step) for key, value, step, moment in points]
        for batch in _batches(metrics, 1000):
            client.log_batch(run_id, metrics=batch, synchronous=True)
        for batch in _batches([Param(key, value[:6000]) for key, value in params.items()], 100):
            client.log_batch(run_id, params=batch, synchronous=True)
        for batch in _batches([RunTag(_name(key), value[:5000]) for key, value in tags.items()], 100):
            client.log_batch(run_id, tags=batch, synchronous=True)
        self._send_datasets(run_id, [record["dataset"] for record in records if record["kind"] == "dataset"])
        for name, path in {r["name"]: r["path"] for r in records if r["kind"] == "artifact"}.items():
            self._send_artifact(run_id, name, self.workspace / path)
        states = [record for record in records if record["kind"] in ("start", "end")]
        if states and states[-1]["kind"] == "start":
            client.update_run(run_id, status="RUNNING")
        elif states:
            status = _ENDINGS.get(states[-1]["status"], "FAILED")
            client.set_terminated(run_id, status=status, end_time=states[-1]["time"])

    def _send_datasets(self, run_id: str, datasets: Sequence[Mapping[str, str]]) -> None:
        """Lineage without the data: a data set of zero rows under our own digest (MLflow keeps 36 characters of it)."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(data["name"], data["digest"][:36], "code", json.dumps({"sha256": data["digest"]}),
                        schema="{}", profile='{"num_rows": 0}'),
                [InputTag("mlflow.data.context", data["context"])],
            )
            for data in datasets
        ]  # fmt: skip
        if inputs:
            self.connect().log_inputs(run_id, datasets=inputs)

    def _send_artifact(self, run_id: str, name: str, path: Path) -> None:
        if not path.is_file():  # removed by hand since: nothing will ever bring it back
            return
        folder, _, base = name.rpartition("/")
        with tempfile.TemporaryDirectory() as scratch:
            if base != path.name:
                path = Path(shutil.copyfile(path, Path(scratch) / base))
            self.connect().log_artifact(run_id, str(path), folder or None)


def _is(tag: str, value: str) -> str:
    escaped = value.replace("'", "")
    return f"tags.`{tag}` = '{escaped}'"


def _name(key: str) -> str:
    """A key in the characters that MLflow takes for parameters and metrics."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in key)[:250]


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _points(record: Record) -> Iterable[tuple[str, float, int, int]]:
    """(key, value, step, milliseconds) of what is finite: MLflow stores inf as 1.8e308 without a word."""
    if record["kind"] == "rows":
        return [tuple(point) for point in record["points"]]
    if record["kind"] == "metrics":
        values = record["values"].items()
        return [(key, value, record["step"], record["time"]) for key, value in values if not isinstance(value, str)]
    return []


def _tags(records: Iterable[Record]) -> dict[str, str]:
    tags: dict[str, str] = {}
    for record in records:
        if record["kind"] == "tags":
            tags |= {f"harness.{key}": value for key, value in record["values"].items()}
        elif record["kind"] == "start":
            tags |= {"harness.attempts": str(record["attempt"]), "harness.status": "RUNNING"}
        elif record["kind"] == "end":
            tags["harness.status"] = record["status"]
        elif record["kind"] == "metrics":
            wild = [(_name(key), value) for key, value in record["values"].items() if isinstance(value, str)]
            tags |= {f"harness.nonfinite.{key}": f"{value} at step {record['step']}" for key, value in wild}
    return tags


# ------------------------------------------------------------------------------------------------------ delivering


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


class _Delivery:
    """Carry journals to one store, each from where its cursor stands; one process at a time per journal."""

    def __init__(self, store: _Store) -> None:
        self.store = store
        self.delivered = 0
        self.refused: list[str] = []
        self._verified: set[str] = set()

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
            if run_id is not None and run_id not in self._verified and not self.store.run_exists(run_id):
                run_id = None
            if run_id is None:
                run_id, offset = self.store.run_of(start, path.stem), 0
            self._verified.add(run_id)
            while chunk := list(journals.read(path, offset, limit=_CHUNK)):
                records = [record for record, _ in chunk]
                self.refused += self.store.send(run_id, records)
                offset = chunk[-1][1]
                _write_whole(self._side_file(path, "cursor.json"), json.dumps({"run_id": run_id, "offset": offset}))
                self.delivered += len(chunk)
                if records[-1]["kind"] == "end":
                    self.store.drop_doubles(run_id, start, path.stem)
        return True

    def deliver_rows(self, folder: Path) -> None:
        """Make (or complete) the run of a pretrain_id that left row files but no journal."""
        rows = [row for file in sorted(folder.glob("*.json")) for row in json.loads(file.read_text())["rows"]]
        if not rows:
            return
        known = self.store.find_runs(_is("harness.pretrain_id", folder.name))
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


def _write_whole(path: Path, text: str) -> None:
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


# -------------------------------------------------------------------------------------------------- the background


class Tracking:
    """The tracking of one command: journals for the runner, and the thread that mirrors them.

    workspace: the folder that holds results/, .harness/ and mlflow.db
    uri: None for the workspace's own store, "none" for journals only, else an address (see resolve_uri)
    Raises HarnessError for an address that is no tracking store; writes nothing before `open`.
    """

    def __init__(self, workspace: Path, uri: str | None = None) -> None:
        self.workspace = workspace.resolve()
        resolved = resolve_uri(self.workspace, uri)
        self._delivery = _Delivery(_Store(self.workspace, resolved)) if resolved else None
        self._paths: list[Path] = []
        self._stopping = threading.Event()
        self._reason = ""
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start mirroring in the background. MLflow is imported there, and only once there is something to deliver."""
        if self._delivery is not None and self._thread is None:
            self._thread = threading.Thread(target=self._mirror, name="mlflow-mirror", daemon=True)
            self._thread.start()

    def open(
        self,
        pretrain_id: str,
        *,
        name: str,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        datasets: Iterable[Mapping[str, str]] = (),
        parent: str | None = None,
    ) -> Journal:
        """Open an attempt of a run and return its journal. Hold the run's flock (journal.lock_path) before.

        name: `<method>-<dataset>-s<seed>`; params: dotted keys as in the configuration; tags: MLflow shows them as
        `harness.<key>`; config, environment: kept as the artifacts config.json and environment.json
        datasets: {"name", "digest" (sha256), "context" ("pretrain", "train", ...)} each; parent: another pretrain_id
        """
        journal = Journal(journals.journal_path(self.workspace, pretrain_id))
        if journal.path not in self._paths:
            self._paths.append(journal.path)  # before the file is there: the thread must not take it for a dead run's
        journal.begin(name, params, tags, datasets, parent)
        folder = self.workspace / ".harness" / "artifacts" / pretrain_id
        for file, content in (("config.json", config), ("environment.json", environment)):
            _write_whole(folder / file, json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")
            journal.artifact(file, folder / file)
        return journal

    def close(self, timeout: float = 30.0) -> Owed:
        """Flush for at most `timeout` seconds and return what is still owed. Never raises for a store that is away."""
        if self._delivery is None:
            return Owed()
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout)
        return _owed(self._delivery, self._paths, self._reason)

    def _mirror(self) -> None:
        """Deliver until told to stop and nothing is owed; a daemon thread keeps no process up when that takes long."""
        assert self._delivery is not None
        pause, debts = 0.0, None
        while True:
            last_pass = self._stopping.is_set()  # read before looking: what is written later is not in this pass
            try:
                debts = self._old_debts() if debts is None else debts
                done = True
                for path in [*self._paths, *debts]:
                    if self._delivery.pending(path) and not self._delivery.deliver(path):
                        done = False  # another process delivers this one
                self._reason, pause = "", 0.5
            except Exception as error:  # whatever MLflow, SQLAlchemy or the network raise: training must not see it
                self._reason, done = self._delivery.store.scrub(error), False
                pause = min(max(2 * pause, 0.5), 5.0)
            if last_pass and done:
                return
            if self._stopping.is_set():
                time.sleep(min(pause, 1.0))
            else:
                self._stopping.wait(pause)

    def _old_debts(self) -> list[Path]:
        """Journals that earlier commands of this workspace left undelivered, the dead among them closed first."""
        assert self._delivery is not None
        _end_dead(self.workspace, spare=self._paths)
        paths = sorted(journals.journals_folder(self.workspace).glob("*.jsonl"))
        return [path for path in paths if path not in self._paths and not _alive(self.workspace, path)
                and self._delivery.pending(path)]  # fmt: skip


def _owed(delivery: _Delivery, paths: Iterable[Path], reason: str) -> Owed:
    counts = {path.stem: count for path in paths if (count := delivery.owed(path))}
    return Owed(counts, reason if counts else "", tuple(delivery.refused))


def _alive(workspace: Path, path: Path) -> bool:
    return journals.is_alive(journals.lock_path(workspace, path.stem))


# ------------------------------------------------------------------------------------------------- repair and look


def _end_dead(workspace: Path, spare: Sequence[Path] = ()) -> list[str]:
    """Write the end that killed runs could not write themselves; returns their pretrain_ids."""
    dead = []
    for path in sorted(journals.journals_folder(workspace).glob("*.jsonl")):
        if path in spare or journals.finished(path) or _alive(workspace, path):
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
    dead = _end_dead(workspace)
    resolved = resolve_uri(workspace, uri)
    if resolved is None:
        return dead
    delivery = _Delivery(_Store(workspace, resolved))
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
        raise HarnessError("--tracking none: there is no store to deliver to")
    delivery = _Delivery(_Store(workspace, resolved))
    _end_dead(workspace)
    paths = sorted(journals.journals_folder(workspace).glob("*.jsonl"))
    folders = [folder for folder in sorted((workspace / "results" / "runs").glob("*")) if folder.is_dir()
               and not journals.journal_path(workspace, folder.name).exists()]  # fmt: skip
    reason = ""
    try:
        for path in paths:
            delivery.deliver(path)
        while folders:
            delivery.deliver_rows(folders[0])
            del folders[0]
    except Exception as error:  # the store is away, or a row file is not one: say so and keep the rest owed
        reason = delivery.store.scrub(error)
    left = _owed(delivery, paths, reason)
    from_rows = {folder.name: len(list(folder.glob("*.json"))) for folder in folders}
    return SyncReport(delivery.delivered, Owed({**left.runs, **from_rows}, reason, left.refused))


def ui_command(workspace: Path, host: str = "127.0.0.1", port: int = 5000) -> list[str]:
    """The command line of the MLflow UI on this workspace's own store; HarnessError for a host beyond loopback."""
    if host not in ("127.0.0.1", "localhost", "::1"):
        raise HarnessError(f"--host {host}: MLflow has no login, so its UI is shown on 127.0.0.1 only")
    return [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", default_uri(workspace), "--host", host,
            "--port", str(port), "--workers", "1"]  # fmt: skip


def serve_ui(workspace: Path, host: str = "127.0.0.1", port: int = 5000) -> int:
    """Run the MLflow UI until it is stopped; returns its exit status. Ctrl-C ends it."""
    command = ui_command(workspace, host, port)
    _Store(workspace, default_uri(workspace)).connect()
    environment = {**os.environ, **_ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with contextlib.suppress(KeyboardInterrupt):
        return subprocess.call(command, env=environment, cwd=workspace)
    return 0
