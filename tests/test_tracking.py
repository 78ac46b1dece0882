"""The MLflow mirror against real faults: a server refused, frozen, failing, late; stores emptied; runs killed.

The server is MLflow's own application behind a gate that can fail or freeze, in a thread of the test process (MLflow's
server command takes about ten seconds to start; the `slow` test at the end uses it). The mirror is the real process;
what only asks how records become MLflow's runs is tested through `sync`, which delivers in this process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import socketserver
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import pytest

from harness import delivery, mirror, tracking
from harness import journal as journals
from harness.contracts import HarnessError
from harness.journal import Journal


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One workspace with a store of its own for all tests that do not destroy it (60 migrations are made once)."""
    folder = tmp_path_factory.mktemp("work space")
    tracking.Store(folder, tracking.default_uri(folder)).connect()
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_mirror_outlives_the_module() -> Iterator[None]:
    yield
    for process in mirror._processes.values():
        process.stop()


def process_of(tracker: mirror.Tracking) -> mirror._Process:
    assert tracker._process is not None and tracker._process.exit_code is None
    return tracker._process


def hurry(process: mirror._Process) -> None:
    """Let it claim its full share of a busy machine, as it does while its parent waits for it."""
    process._send(modest=False)


def wait_until(condition: Callable[[], object], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run(tracker: mirror.Tracking, pretrain_id: str, **changes: Any) -> Journal:
    settings: dict[str, Any] = {
        "name": "sc-digits-s0",
        "params": {"optim.lr": "0.1", "method.patch": "3"},
        "tags": {"method": "sc", "seed": "0"},
        "config": {"optim": {"lr": 0.1}},
        "environment": {"torch": "2"},
        "datasets": [{"name": "digits", "digest": "ab" * 32, "context": "pretrain"}],
    }
    return tracker.open(pretrain_id, **(settings | changes))


def row(**changes: Any) -> dict[str, Any]:
    base = {
        "method": "sc", "dataset": "digits", "encoder": "convnet_small", "seed": 0, "weights_sha256": "00",
        "config": {"epochs": 2, "optim": {"lr": 0.1}}, "evaluator": "linear_probe", "readout": "gap", "split": "test",
        "metric": "top1", "value": 0.75, "labels": "1000", "fold": None, "label_seed": 0, "steps": 40,
        "started_at": "2026-01-02T03:04:00+00:00", "finished_at": "2026-01-02T03:04:05+00:00", "status": "FINISHED",
    }  # fmt: skip
    return base | changes


def train(journal: Journal, steps: int = 30) -> None:
    for step in range(steps):
        journal.metrics(step, {"loss": 1 / (1 + step), "alignment": float(step)})
    journal.steps("pretrain", steps)
    journal.rows([row(), row(readout="spatial", value=0.875)])


def runs_in(workspace: Path, uri: str | None, pretrain_id: str) -> list[Any]:
    resolved = tracking.resolve_uri(workspace, uri)
    assert resolved is not None
    return tracking.Store(workspace, resolved).find_runs(f"tags.`harness.pretrain_id` = '{pretrain_id}'")


def points_in(workspace: Path, uri: str | None, run_id: str) -> Counter[tuple[str, int, float]]:
    """How often each point is stored."""
    resolved = tracking.resolve_uri(workspace, uri)
    assert resolved is not None
    client = tracking.Store(workspace, resolved).connect()
    keys = client.get_run(run_id).data.metrics
    return Counter((key, m.step, m.value) for key in keys for m in client.get_metric_history(run_id, key))


def assert_whole(workspace: Path, uri: str | None, pretrain_id: str, steps: int = 30, status: str = "FINISHED") -> Any:
    """Exactly one run, each point once, in its final state; returns it."""
    runs = runs_in(workspace, uri, pretrain_id)
    assert len(runs) == 1
    points = points_in(workspace, uri, runs[0].info.run_id)
    expected = {("loss", s, 1 / (1 + s)) for s in range(steps)} | {("alignment", s, float(s)) for s in range(steps)}
    expected |= {(f"linear_probe.{r}.test.top1 labels:1000", 40, v) for r, v in (("gap", 0.75), ("spatial", 0.875))}
    assert points == Counter(expected)
    assert runs[0].info.status == status
    return runs[0]


# ---------------------------------------------------------------------------------------- the workspace's own store


def test_a_run_arrives_whole(workspace: Path) -> None:
    tracker = mirror.Tracking(workspace)
    tracker.start()
    journal = run(tracker, "whole", params={f"p{i}": "x" * 7000 for i in range(130)})
    figure = workspace / ".harness" / "artifacts" / "whole" / "loss curve.png"
    figure.write_bytes(b"picture")
    journal.artifact("figures/loss.png", figure)
    train(journal)
    journal.tags({"weights_sha256": "0" * 64})
    journal.end("FINISHED")
    assert not tracker.close()
    found = assert_whole(workspace, None, "whole")
    assert found.info.run_name == "sc-digits-s0"
    assert found.data.tags["harness.method"] == "sc" and found.data.tags["harness.status"] == "FINISHED"
    assert found.data.tags["harness.weights_sha256"] == "0" * 64
    assert set(map(len, found.data.params.values())) == {6000} and len(found.data.params) == 130
    [lineage] = found.inputs.dataset_inputs
    assert (lineage.dataset.name, lineage.dataset.digest, lineage.tags[0].value) == ("digits", "ab" * 18, "pretrain")
    folder = workspace / "mlartifacts" / found.info.run_id / "artifacts"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"config.json", "environment.json", "figures/loss.png"}
    assert (workspace / "mlflow.db").is_file()


def test_replaying_stores_each_point_once(workspace: Path) -> None:
    journal = run(mirror.Tracking(workspace), "replayed")
    train(journal)
    journal.end("FINISHED")
    assert not delivery.sync(workspace).owed
    for cursor in journals.journals_folder(workspace).glob("replayed.*.cursor.json"):
        cursor.unlink()
    report = delivery.sync(workspace)
    assert report.delivered == len(journal.records()) and not report.owed and not report.owed.refused
    assert_whole(workspace, None, "replayed")
    assert delivery.sync(workspace).delivered == 0


def test_a_resumed_attempt_continues_its_run(workspace: Path) -> None:
    for attempt, status in (("first", "INTERRUPTED"), ("second", "FINISHED")):
        tracker = mirror.Tracking(workspace)
        tracker.start()
        journal = run(tracker, "resumed", environment={"attempt": attempt})
        train(journal, 20 if attempt == "first" else 30)
        journal.end(status)
        assert not tracker.close()
        if attempt == "first":
            assert_whole(workspace, None, "resumed", 20, "KILLED")
    assert_whole(workspace, None, "resumed")
    assert journal.steps_executed("pretrain") == 50


@pytest.mark.parametrize("status", ["FAILED", "NONFINITE", "OUT_OF_MEMORY"])
def test_a_failure_is_failed_and_what_is_not_finite_is_a_tag(workspace: Path, status: str) -> None:
    tracker = mirror.Tracking(workspace)
    tracker.start()
    journal = run(tracker, f"failed-{status.lower()}")
    journal.metrics(0, {"loss": 1.0})
    journal.metrics(1, {"loss": float("inf"), "other": float("nan")})
    journal.end(status)
    assert not tracker.close()
    [found] = runs_in(workspace, None, f"failed-{status.lower()}")
    assert found.info.status == "FAILED" and found.data.metrics == {"loss": 1.0}
    assert found.data.tags["harness.nonfinite.loss"] == "inf at step 1"


def test_what_mlflow_refuses_does_not_hold_up_the_rest(workspace: Path) -> None:
    journal = run(mirror.Tracking(workspace), "refused")
    delivery.sync(workspace)
    journal.append("params", values={"optim.lr": "0.2"})  # a changed parameter: MLflow never takes it
    train(journal)
    journal.end("FINISHED")
    report = delivery.sync(workspace)
    assert len(report.owed.refused) == 1 and "params" in report.owed.refused[0]
    assert_whole(workspace, None, "refused")


def test_controls_lie_under_the_run_that_asked_for_them(workspace: Path) -> None:
    tracker = mirror.Tracking(workspace)
    tracker.start()
    run(tracker, "asked").end("FINISHED")
    run(tracker, "control", parent="asked").end("FINISHED")
    assert not tracker.close()
    [parent], [child] = runs_in(workspace, None, "asked"), runs_in(workspace, None, "control")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id


def test_dead_runs_are_closed_and_living_ones_left(workspace: Path) -> None:
    tracker = mirror.Tracking(workspace)
    with journals.hold(journals.lock_path(workspace, "living")) as mine:
        assert mine
        run(tracker, "living")
        run(tracker, "dead")
        carrier = delivery.Delivery(tracking.Store(workspace, tracking.default_uri(workspace)))
        for name in ("living", "dead"):
            carrier.deliver(journals.journal_path(workspace, name))
        assert runs_in(workspace, None, "dead")[0].info.status == "RUNNING"
        assert delivery.reap_dead(workspace) == ["dead"]
        assert runs_in(workspace, None, "dead")[0].info.status == "KILLED"
        assert runs_in(workspace, None, "living")[0].info.status == "RUNNING"
        assert delivery.reap_dead(workspace) == []
    assert delivery.reap_dead(workspace) == ["living"]


def test_a_removed_store_is_rebuilt_from_journals_and_rows(workspace: Path) -> None:
    journal = run(mirror.Tracking(workspace), "rebuilt")
    train(journal)
    journal.end("FINISHED")
    assert not delivery.sync(workspace).owed
    tracker = mirror.Tracking(workspace)
    tracker.start()
    living = run(tracker, "living on")
    train(living, 10)
    hurry(process_of(tracker))
    wait_until(lambda: list(journals.journals_folder(workspace).glob("living on.*.cursor.json")))
    folder = workspace / "results" / "runs" / "rowsonly"
    folder.mkdir(parents=True)
    (folder / "e1.json").write_text(json.dumps({"rows": [row(), row(readout="spatial", value=0.875)], "sha256": ""}))
    (workspace / "mlflow.db").unlink()
    report = delivery.sync(workspace)
    assert not report.owed and report.delivered > len(journal.records())
    train(living, 30)  # its mirror holds connections into the removed file
    living.end("FINISHED")
    assert not tracker.close()
    assert_whole(workspace, None, "living on", status="FINISHED")
    for _ in range(2):
        assert_whole(workspace, None, "rebuilt")
        found = assert_whole(workspace, None, "rowsonly", steps=0)
        assert found.data.params == {"epochs": "2", "optim.lr": "0.1"}
        delivery.sync(workspace)
    (folder / "e2.json").write_text("cut off")
    assert delivery.sync(workspace).owed.runs == {"rowsonly": 2}
    (folder / "e2.json").unlink()


def test_no_tracking_writes_a_journal_and_nothing_else(tmp_path: Path) -> None:
    tracker = mirror.Tracking(tmp_path, "none")
    tracker.start()
    run(tracker, "quiet").end("FINISHED")
    assert not tracker.close()
    assert [path.name for path in tmp_path.iterdir()] == [".harness"]
    assert not (tmp_path / ".harness" / "mirror.log").exists()


def test_a_command_that_opens_no_run_starts_no_process(tmp_path: Path) -> None:
    known = dict(mirror._processes)
    tracker = mirror.Tracking(tmp_path)
    tracker.start()
    assert not tracker.close()
    assert mirror._processes == known and list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------- the process


def test_a_killed_mirror_loses_nothing_and_the_next_command_pays_all_debts(workspace: Path) -> None:
    tracker = mirror.Tracking(workspace)
    tracker.start()
    journal = run(tracker, "killed")
    train(journal, 3000)
    hurry(process_of(tracker))
    wait_until(lambda: list(journals.journals_folder(workspace).glob("killed.*.cursor.json")))
    os.kill(process_of(tracker)._child.pid, signal.SIGKILL)
    journal.end("FINISHED")
    started = time.monotonic()
    owed = tracker.close(timeout=20)
    assert 0 < owed.runs["killed"] < len(journal.records()) and "signal 9" in owed.reason
    assert time.monotonic() - started < 5  # nobody waits for the dead

    train(run(mirror.Tracking(workspace), "indebted"))  # by a command that died before it mirrored or ended anything
    tracker = mirror.Tracking(workspace)
    tracker.start()
    run(tracker, "after").end("FINISHED")
    assert not tracker.close()
    assert_whole(workspace, None, "killed", 3000)
    assert_whole(workspace, None, "indebted", status="KILLED")


def test_the_next_journal_replaces_a_killed_mirror(workspace: Path) -> None:
    tracker = mirror.Tracking(workspace)
    tracker.start()
    first = run(tracker, "first")
    os.kill(process_of(tracker)._child.pid, signal.SIGSTOP)  # and a stopped one disturbs nobody
    train(first)
    os.kill(process_of(tracker)._child.pid, signal.SIGKILL)
    wait_until(lambda: tracker._process and tracker._process.exit_code)
    second = run(tracker, "second", parent="first")
    train(second)
    for journal in (first, second):
        journal.end("FINISHED")
    assert not tracker.close()
    for name in ("first", "second"):
        assert_whole(workspace, None, name)


def test_the_mirror_stands_back_and_keeps_to_itself(workspace: Path) -> None:
    tracker = mirror.Tracking(workspace)
    tracker.start()
    journal = run(tracker, "polite")
    process = process_of(tracker)
    pid = process._child.pid
    assert os.getsid(pid) == pid  # Ctrl-C in our terminal is not for it
    modest = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
    wait_until(lambda: os.getpriority(os.PRIO_PROCESS, pid) == modest)
    if (autogroup := Path(f"/proc/{pid}/autogroup")).exists():
        wait_until(lambda: autogroup.read_text().endswith("nice 10\n"))
    journal.end("FINISHED")
    assert not tracker.close()
    os.kill(pid, signal.SIGTERM)  # everybody gets one at shutdown; its parent says when to end
    again = mirror.Tracking(workspace)
    again.start()
    run(again, "polite too").end("FINISHED")
    assert not again.close()
    assert process_of(again) is process  # the trials of a search import MLflow once
    process.stop()
    assert process.exit_code == 130


ORPHAN = """
import os, signal, sys
from pathlib import Path
from harness import mirror
tracker = mirror.Tracking(Path(sys.argv[1]))
tracker.start()
journal = tracker.open("orphan", name="n", params={"optim.lr": "0.1"}, tags={}, config={}, environment={})
for step in range(30):
    journal.metrics(step, {"loss": 1 / (1 + step), "alignment": float(step)})
assert not {"mlflow", "torch"} & set(sys.modules)
print(tracker._process._child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_mirror_of_a_killed_parent_delivers_and_goes(workspace: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN, str(workspace)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
    wait_until(lambda: not is_running(pid))
    [found] = runs_in(workspace, None, "orphan")
    points = points_in(workspace, None, found.info.run_id)
    assert len(points) == 60 and set(points.values()) == {1} and found.info.status == "RUNNING"
    assert "orphan" in delivery.reap_dead(workspace)
    assert runs_in(workspace, None, "orphan")[0].info.status == "KILLED"


def is_running(pid: int) -> bool:
    """Whether the process lives; one that ended and waits for a parent to ask counts as ended."""
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(status) and not status.startswith("Z")


# ------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize("uri", ["mlruns", "/tmp/mlruns", "file:///tmp/mlruns", "localhost:5000", "ftp://a:secret@b/c"])
def test_what_is_no_store_is_refused_at_once(tmp_path: Path, uri: str) -> None:
    with pytest.raises(HarnessError) as refused:
        mirror.Tracking(tmp_path, uri)
    assert "not a tracking store" in str(refused.value) and "\n" not in str(refused.value)
    assert "secret" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "password", ["secret", "se/cr?et", "secr@et", "secr%40et"], ids=["plain", "told", "at", "coded"]
)
def test_a_password_is_never_shown_or_kept(tmp_path: Path, password: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    uri = f"http://me:{password}@127.0.0.1:{port}"
    assert tracking.redact(uri) == f"http://me:***@127.0.0.1:{port}"
    tracker = mirror.Tracking(tmp_path, uri)
    if password == "se/cr?et":  # one of them through a process
        tracker.start()
    run(tracker, "private").end("FINISHED")
    report = delivery.sync(tmp_path, uri)
    owed = report.owed
    if password == "se/cr?et":
        process = process_of(tracker)
        hurry(process)
        wait_until(lambda: process.status["reason"])
        if Path("/proc/self").exists():
            seen = [Path(f"/proc/{process._child.pid}/{name}").read_bytes() for name in ("cmdline", "environ")]
            assert password.encode() not in b"".join(seen)
        owed = tracker.close(timeout=0.5)
    assert "127.0.0.1" in owed.reason
    said = f"{owed.line} {owed} {report}"
    kept = b"".join(path.read_bytes() for path in (tmp_path / ".harness").rglob("*") if path.is_file())
    assert password not in said and password.encode() not in kept
    assert "harness sync" in owed.line and "\n" not in owed.line


def test_the_ui_is_for_this_machine_only(tmp_path: Path) -> None:
    command = tracking.ui_command(tmp_path, "127.0.0.1", 5055)
    assert tracking.default_uri(tmp_path) in command and command[command.index("--host") + 1] == "127.0.0.1"
    with pytest.raises(HarnessError, match="no login"):
        tracking.ui_command(tmp_path, "0.0.0.0", 5055)


# ------------------------------------------------------------------------------------------------------------ faults


class Gate:
    """MLflow's own server application behind a gate: open, failing (500) or frozen (accepts, answers much later)."""

    def __init__(self, application: Callable[..., Any]) -> None:
        self.application = application
        self.state = "open"
        self.opened = threading.Event()
        self.calls: Counter[str] = Counter()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        self.calls[self.state] += 1
        if self.state == "failing":
            start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
            return [b"no"]
        if self.state == "frozen" or (
            self.state == "frozen at create" and environ["PATH_INFO"].endswith("runs/create")
        ):
            self.opened.wait(60)  # and then carries out what the client has long given up
        return self.application(environ, start_response)


class Quiet(WSGIRequestHandler):
    def log_message(self, *_: object) -> None: ...

    def handle(self) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            super().handle()


class Threaded(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory, workspace: Path) -> Iterator[Callable[..., Any]]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copyfile(workspace / "mlflow.db", folder / "server.db")  # spares the migrations
    with contextlib.closing(sqlite3.connect(folder / "server.db")) as copy, copy:
        copy.execute("UPDATE experiments SET name = 'other' WHERE name = 'harness'")
    settings = {
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/server.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in settings.items():
            patch.setenv(key, value)
        from mlflow.server import app

        yield app


def serve(gate: Gate, port: int = 0) -> WSGIServer:
    server = make_server("127.0.0.1", port, gate, server_class=Threaded, handler_class=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.mark.parametrize("fault", ["refused", "frozen", "frozen at create", "failing"])
def test_a_store_that_is_away_delays_nothing_and_gets_everything_once(
    tmp_path: Path, application: Callable[..., Any], fault: str
) -> None:
    gate = Gate(application)
    server = serve(gate)
    port = server.server_port
    if fault == "refused":
        server.shutdown()
        server.server_close()
    gate.state = fault
    uri = f"http://127.0.0.1:{port}"
    tracker = mirror.Tracking(tmp_path, uri)
    if fault != "frozen at create":
        tracker.start()
    pretrain_id = fault.replace(" ", "-")
    journal = run(tracker, pretrain_id)
    train(journal)
    journal.end("FINISHED")
    # All of it was written while the server was away: nothing in the run waits for an answer.
    assert sum(gate.calls.values()) == 0 and len(journal.records()) > 30
    if fault == "frozen at create":
        owed = delivery.sync(tmp_path, uri).owed
    else:
        process = process_of(tracker)
        hurry(process)
        wait_until(lambda: process.status["reason"])
        started = time.monotonic()
        owed = tracker.close(timeout=1.0)
        assert time.monotonic() - started < 3 and process.exit_code is not None
    assert owed.runs == {pretrain_id: len(journal.records())} and owed.reason.startswith("API request")
    assert fault == "refused" or gate.calls[fault] > 0

    gate.state = "open"
    gate.opened.set()
    if fault == "refused":
        server = serve(gate, port)
    # What the frozen server was asked before is carried out now, and must not be there twice.
    wait_until(lambda: not delivery.sync(tmp_path, uri).owed)
    found = assert_whole(tmp_path, uri, pretrain_id)
    assert found.data.params["optim.lr"] == "0.1" and found.info.artifact_uri.startswith("mlflow-artifacts:")
    server.shutdown()
    server.server_close()


def test_a_store_that_freezes_in_the_middle_gets_everything_once(
    tmp_path: Path, application: Callable[..., Any]
) -> None:
    gate = Gate(application)
    server = serve(gate)
    uri = f"http://127.0.0.1:{server.server_port}"
    tracker = mirror.Tracking(tmp_path, uri)
    tracker.start()
    journal = run(tracker, "middle")
    hurry(process_of(tracker))
    wait_until(lambda: journals_delivered(tmp_path))
    gate.state = "frozen"
    answered = gate.calls["open"]
    train(journal)
    journal.end("FINISHED")
    time.sleep(1.5)
    assert gate.calls["open"] == answered and gate.calls["frozen"] > 0
    gate.state = "open"
    gate.opened.set()
    assert not tracker.close(timeout=20)
    assert_whole(tmp_path, uri, "middle")
    server.shutdown()
    server.server_close()


def journals_delivered(workspace: Path) -> bool:
    return any(journals.journals_folder(workspace).glob("*.cursor.json"))


@pytest.mark.parametrize("served", [False, True], ids=["file", "server"])
@pytest.mark.parametrize("table", ["datasets", "params"])
def test_a_row_that_another_writer_inserts_first_holds_up_nothing(
    tmp_path: Path, workspace: Path, application: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
    table: str, served: bool,
) -> None:  # fmt: skip
    """MLflow looks whether a row is there and then inserts it; here a rival inserts it between the two.

    For `datasets` the rival mirrors another run on the same data; for `params` it is our own call of before, given up
    and carried out late by a server that was frozen.
    """
    from sqlalchemy.orm import Session

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")  # our call lasts as long as the rival's and some more
    server = serve(Gate(application)) if served else None
    folder = tmp_path if server else workspace
    uri = f"http://127.0.0.1:{server.server_port}" if server else tracking.default_uri(folder)
    name = f"raced {table} {served}"
    digest = hashlib.sha256(name.encode()).hexdigest()  # a data set that the store has never seen
    journal = run(
        mirror.Tracking(folder, uri), name, datasets=[{"name": "raced", "digest": digest, "context": "train"}]
    )
    journal.end("FINISHED")
    records = journal.records()
    store, rival = tracking.Store(folder, uri), tracking.Store(folder, uri)
    ours = store.run_of(records[0], name)
    theirs = ours if table == "params" else rival.run_of(records[0], f"{name} rival")
    inserts, add_all = 0, Session.add_all

    def overtaken(session: Any, instances: Any) -> None:
        nonlocal inserts
        rows = list(instances)
        if any(each.__tablename__ == table for each in rows):
            inserts += 1
            if inserts == 1:
                assert rival.send(theirs, records) == []
        add_all(session, rows)

    monkeypatch.setattr(Session, "add_all", overtaken)
    carrier = delivery.Delivery(store)
    assert carrier.deliver(journal.path)
    assert inserts == 2  # ours, and the rival's inside it: the second attempt found the row and inserted none
    assert not carrier.refused and not carrier.owed(journal.path)
    for run_id in (ours, theirs):
        found = store.connect().get_run(run_id)
        assert [each.dataset.digest for each in found.inputs.dataset_inputs] == [digest[:36]]
        assert found.data.params == {"optim.lr": "0.1", "method.patch": "3"} and found.info.status == "FINISHED"
    if server:
        server.shutdown()
        server.server_close()


# ------------------------------------------------------------------------------------------- slow: the real commands


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@pytest.mark.slow
def test_a_real_server_back_after_twenty_seconds(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{tmp_path}/server.db",
               "--artifacts-destination", str(tmp_path / "artifacts")]  # fmt: skip
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    tracker = mirror.Tracking(tmp_path / "w", f"http://127.0.0.1:{port}")
    tracker.start()
    journal = run(tracker, "late")
    train(journal, 10)
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        while not answers(port):
            assert server.poll() is None
            time.sleep(0.2)
        os.killpg(server.pid, signal.SIGSTOP)
        train(journal, 30)
        time.sleep(20)
        os.killpg(server.pid, signal.SIGCONT)
        journal.end("FINISHED")
        assert not tracker.close()
        assert_whole(tmp_path / "w", f"http://127.0.0.1:{port}", "late")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


MIRROR = """
import sys
from pathlib import Path
from harness import mirror
tracker = mirror.Tracking(Path(sys.argv[1]))
tracker.start()
for index in range(5):
    journal = tracker.open(f"{sys.argv[2]}{index}", name="n", params={"a": "1"}, tags={}, config={}, environment={})
    for step in range(200):
        journal.metrics(step, {"loss": 1.0 / (1 + step)})
    journal.end("FINISHED")
sys.exit(bool(tracker.close(timeout=120)))
"""


@pytest.mark.slow
def test_processes_mirror_into_one_new_store_at_once(tmp_path: Path) -> None:
    children = [subprocess.Popen([sys.executable, "-c", MIRROR, str(tmp_path), name]) for name in "abc"]
    assert [child.wait(240) for child in children] == [0, 0, 0]
    store = tracking.Store(tmp_path, tracking.default_uri(tmp_path))
    found = store.find_runs()
    assert sorted(run.data.tags["harness.pretrain_id"] for run in found) == sorted(
        f"{n}{i}" for n in "abc" for i in range(5)
    )
    assert {run.info.status for run in found} == {"FINISHED"}
    for each in found:
        assert len(store.connect().get_metric_history(each.info.run_id, "loss")) == 200
