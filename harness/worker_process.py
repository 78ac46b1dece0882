"""A worker: a process of `harness` itself that does what its parent sends and tells it what it did.

A worker is a hidden command, so that signals end it as they end any other command: journals closed, states saved,
everything resumable. Both sides speak in pickles, through its stdin and stdout. When stdin ends, the parent is gone or
wants no more; when stdout ends, the worker is gone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

PATIENCE_SECONDS = 12.0  # after SIGTERM, before a worker is killed: a command takes up to 8 s to end itself

Work = TypeVar("Work")


class WorkerProcess(Generic[Work]):
    """One worker as its parent sees it.

    command: the hidden command; plugins: folders to register there; heard: gets (this, message), with None for its end
    work: what it is at work on, None while it is idle; for whoever started it to set
    """

    def __init__(
        self, command: str, plugins: Sequence[Path], heard: queue.Queue[tuple[WorkerProcess[Work], Any]]
    ) -> None:
        self.work: Work | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        # the same code as here, wherever the working folder is
        code = f"import sys; sys.path[:] = {sys.path!r}; from harness.cli import main; main()"
        words = [sys.executable, "-P", "-c", code, command, *(f"--plugins={folder}" for folder in plugins)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)
        assert self.process.stdin is not None and self.process.stdout is not None
        self._stdin: Any = self.process.stdin
        threading.Thread(target=self._listen, args=(self.process.stdout, heard), daemon=True).start()

    def _listen(self, stream: Any, heard: queue.Queue[tuple[WorkerProcess[Work], Any]]) -> None:
        try:
            while True:
                heard.put((self, pickle.load(stream)))
        except Exception:  # its end, or a message that a kill cut short
            heard.put((self, None))

    def send(self, message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # its end is heard by the listening thread
            pickle.dump(message, self._stdin)
            self._stdin.flush()

    def last_words(self, if_killed: str = "") -> str:
        """How the process ended, in one line. if_killed: said where SIGKILL ended it"""
        code = self.process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        how = f"ended with code {code}" if code >= 0 else f"was killed by signal {-code} ({signal.Signals(-code).name})"
        advice = if_killed if code == -signal.SIGKILL else ""
        return how + advice + (f": {lines[-1][:200]}" if lines else "")

    def end_stdin(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()

    def wait(self, seconds: float) -> None:
        """Wait for its end, which comes by SIGKILL when the seconds are over."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def close_all(workers: Iterable[WorkerProcess[Any]]) -> None:
    """End workers by the end of their stdin, and by SIGKILL those that are still there after PATIENCE_SECONDS."""
    workers = list(workers)
    for worker in workers:
        worker.end_stdin()
    deadline = time.monotonic() + PATIENCE_SECONDS
    for worker in workers:
        worker.wait(max(0.0, deadline - time.monotonic()))


def become_worker() -> Callable[[Any], None]:
    """Make this process a worker whose prints go to stderr; what is returned tells its parent a message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches everyone in the terminal: the parent says what to do
    out: BinaryIO = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else prints must not stand between the messages

    def tell(message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the end of stdin says the same
            pickle.dump(message, out)
            out.flush()

    return tell


__all__ = ["WorkerProcess", "become_worker", "close_all"]
