"""The MLflow store: addresses, runs and the calls that records become. The only module that imports mlflow.

The import happens with the first `Store.connect`, in the mirror process (harness.mirror) or in a command that was
asked to speak to MLflow (`harness sync`, `ui`, `doctor --repair`); a training process never gets there. Delivering
twice stores each point once: MLflow keeps one point per (key, step, time, value), and the times come from the journal.
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from harness import journal as journals
from harness.journal import Record, mistake

EXPERIMENT = "harness"
_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql")
_ENDINGS = {"FINISHED": "FINISHED", "INTERRUPTED": "KILLED"}  # every other status of a run is FAILED in MLflow
# Not BAD_REQUEST: MLflow gives it for any trouble of its database as well, and what is refused is not sent again.
_PERMANENT = {"INVALID_PARAMETER_VALUE", "INVALID_STATE"}
_DATABASE_TROUBLE = "BAD_REQUEST"  # a row that is there already among it: a server tells no more than this code
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
        raise mistake(
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


class Store:
    """One MLflow store: where runs are found or made, and how records become calls. Errors of MLflow pass through."""

    def __init__(self, workspace: Path, uri: str) -> None:
        self.workspace = workspace.resolve()
        self.uri = uri
        self.local = uri == default_uri(workspace)
        name = "workspace" if self.local else redact(uri)
        self.key = hashlib.sha256(name.encode()).hexdigest()[:12]
        self.generation = 0  # counts connections: what was seen in one store says nothing about the next
        self._client: Any = None
        self._file: tuple[int, int] | None = None
        self._experiment = ""

    def without_secrets(self, text: str) -> str:
        """`text` with the password of the store's address struck out."""
        text = text.replace(self.uri, redact(self.uri))
        for secret in _secrets(self.uri):
            text = text.replace(secret, "***")
        return text

    def scrub(self, error: BaseException) -> str:
        """The first line of an error, without the password."""
        return self.without_secrets((str(error).strip() or type(error).__name__).splitlines()[0])[:300]

    @property
    def emptied(self) -> bool:
        """Whether this is the workspace's own database and somebody removed the file."""
        return self.local and not (self.workspace / "mlflow.db").exists()

    def connect(self) -> Any:
        """The MLflow client; the first call imports mlflow and makes the store. Raises while the store is away."""
        fresh = self.emptied
        if self._client is not None and not fresh and self._file == self._place():
            return self._client
        for key, value in _ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        import mlflow.tracking

        for name in ("mlflow", "alembic", "urllib3"):  # progress notes do not belong between our own lines
            logging.getLogger(name).setLevel(logging.ERROR)
        if fresh:
            self._create_database()
        client = mlflow.tracking.MlflowClient(tracking_uri=self.uri)
        if self.local:  # MLflow keeps its connections for the life of the process: they may lead into a removed file
            client._tracking_client.store.engine.dispose()
        self._file = self._place()
        self._experiment = self._find_experiment(client)
        self._client = client
        self.generation += 1
        return client

    def _place(self) -> tuple[int, int] | None:
        """Which file the workspace's own database is: `harness sync` may have put a new one there."""
        if not self.local or self.emptied:
            return None
        found = os.stat(self.workspace / "mlflow.db")
        return found.st_dev, found.st_ino

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
            raise mistake(
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
        conditions = (has_tag("harness.pretrain_id", pretrain_id), has_tag("harness.journal", start["journal"]))
        if not self.find_runs(*conditions):
            tags = {"harness.pretrain_id": pretrain_id, "harness.journal": start["journal"]}
            if start.get("parent"):
                tags["harness.parent"] = start["parent"]
                parents = self.find_runs(has_tag("harness.pretrain_id", start["parent"]))
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
        conditions = (has_tag("harness.pretrain_id", pretrain_id), has_tag("harness.journal", start["journal"]))
        for run in self.find_runs(*conditions):
            if run.info.run_id != run_id and not run.data.params and not run.data.metrics:
                self.connect().delete_run(run.info.run_id)

    # ---------------------------------------------------------------------------------------------------- sending

    def send(self, run_id: str, records: Sequence[Record]) -> list[str]:
        """Deliver records; returns one line for each that MLflow will never take. Raises while the store is away."""
        from mlflow.exceptions import MlflowException

        try:
            try:
                self._send(run_id, records)
            except MlflowException as error:
                if error.error_code != _DATABASE_TROUBLE:
                    raise
                # MLflow looks for a row (a data set, a parameter) and then inserts it: another writer may have come
                # between, and the second time its row is found.
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


def has_tag(tag: str, value: str) -> str:
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


# ---------------------------------------------------------------------------------------------------------- the UI


def ui_command(workspace: Path, host: str = "127.0.0.1", port: int = 5000) -> list[str]:
    """The command line of the MLflow UI on this workspace's own store; HarnessError for a host beyond loopback."""
    if host not in ("127.0.0.1", "localhost", "::1"):
        raise mistake(f"--host {host}: MLflow has no login, so its UI is shown on 127.0.0.1 only")
    return [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", default_uri(workspace), "--host", host,
            "--port", str(port), "--workers", "1"]  # fmt: skip


def serve_ui(workspace: Path, host: str = "127.0.0.1", port: int = 5000) -> int:
    """Run the MLflow UI until it is stopped; returns its exit status. Ctrl-C ends it."""
    command = ui_command(workspace, host, port)
    Store(workspace, default_uri(workspace)).connect()
    environment = {**os.environ, **_ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with contextlib.suppress(KeyboardInterrupt):
        return subprocess.call(command, env=environment, cwd=workspace)
    return 0
