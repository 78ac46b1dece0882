"""Worker processes: each way to end is heard once and put into one line."""

from __future__ import annotations

import queue
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from harness import worker_process
from harness.worker_process import WorkerProcess, close_all

Heard = queue.Queue[tuple[WorkerProcess[str], Any]]
WAIT_SECONDS = 120.0


@pytest.fixture
def heard() -> Heard:
    return queue.Queue()


@pytest.fixture
def worker(heard: Heard) -> Iterator[WorkerProcess[str]]:
    worker: WorkerProcess[str] = WorkerProcess("bench-worker", (), heard)
    yield worker
    worker.process.kill()
    worker.process.wait()


def test_a_worker_whose_stdin_ends_ends_well(worker: WorkerProcess[str], heard: Heard) -> None:
    worker.end_stdin()
    assert heard.get(timeout=WAIT_SECONDS) == (worker, None)
    assert worker.last_words("; unsaid") == "ended with code 0"


@pytest.mark.parametrize(("command", "message"), [("tune-worker", ["no search"]), ("bench-worker", ("no cell", None))])
def test_a_worker_that_fails_leaves_its_last_line(command: str, message: Any, heard: Heard) -> None:
    worker: WorkerProcess[str] = WorkerProcess(command, (), heard)
    worker.send(message)
    assert heard.get(timeout=WAIT_SECONDS) == (worker, None)
    assert worker.last_words("; unsaid").startswith("ended with code 1: AttributeError: ")
    worker.send("after its end")  # no BrokenPipeError, nor from what is next
    worker.end_stdin()


def test_a_killed_worker_is_heard(worker: WorkerProcess[str], heard: Heard) -> None:
    worker.process.kill()
    assert heard.get(timeout=WAIT_SECONDS) == (worker, None)
    assert worker.last_words("; advice") == "was killed by signal 9 (SIGKILL); advice"
    assert heard.empty()


def test_what_does_not_end_by_itself_is_killed(
    worker: WorkerProcess[str], heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "PATIENCE_SECONDS", 0.2)
    worker.process.send_signal(signal.SIGSTOP)
    close_all([worker])
    assert worker.process.returncode == -signal.SIGKILL
    assert heard.get(timeout=WAIT_SECONDS) == (worker, None)
