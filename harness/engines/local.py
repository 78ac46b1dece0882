"""Cells in worker processes of this machine.

A worker is a process of `harness` itself (the hidden command `bench-worker`), so that signals end it as they end any
other command: journals closed, states saved, everything resumable. It takes one cell at a time from its stdin and writes
what it has to say to its stdout, both as pickles between parent and child. When stdin ends, the parent is gone, and the
worker stops in the middle of its cell.

Workers share the cores by what the cells ask for: a cell's number of threads is part of its identity and is not changed
for the number of jobs (docs/decisions/007); instead no cell is started while those at work use all cores.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from harness.arms import Arm
from harness.arms import Cell as ArmCell
from harness.engines import CellOutcome, Watcher, run_cell
from harness.grid import Cell, Planner

PATIENCE_SECONDS = 12.0  # after SIGTERM, before a worker is killed: a command takes up to 8 s to end itself
TELL_SECONDS = 0.5  # between two words of progress


# -------------------------------------------------------------------------------------------------- the parent's side


class LocalEngine:
    """Implements harness.engines.Engine. jobs: cells at work at the same time; plugins: folders to register there."""

    def __init__(self, jobs: int = 1, plugins: Sequence[Path] = ()) -> None:
        self.jobs, self._plugins = jobs, plugins
        self._workers: list[_Worker] = []
        self._heard: queue.Queue[tuple[_Worker, Any]] = queue.Queue()
        self._cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def outcomes(self, cells: Sequence[Cell], watcher: Watcher) -> Iterator[CellOutcome]:
        """Run the cells, as many at a time as jobs and cores allow, and yield each one's outcome as it comes."""
        waiting: deque[tuple[Cell, str | None]] = deque((cell, None) for cell in cells)
        while waiting or any(worker.cell for worker in self._workers):
            while waiting and (worker := self._free(waiting[0][0])) is not None:
                cell, lost = waiting.popleft()
                worker.give(cell, lost)
                watcher.started(cell)
            worker, message = self._heard.get()
            held = worker.cell
            if message is None:
                self._workers.remove(worker)
                if held is not None and worker.lost is None:
                    waiting.append((held, worker.last_words()))  # another worker is to record it
                elif held is not None:
                    yield CellOutcome(held.pretrain_id, "FAILED", worker.last_words())
            elif isinstance(message, CellOutcome):
                worker.cell = None
                yield message
            elif held is not None:
                watcher.progress(held, str(message))

    def _free(self, cell: Cell) -> _Worker | None:
        """A worker that may take this cell now, started if need be."""
        busy = [worker.cell for worker in self._workers if worker.cell is not None]
        threads = sum(other.num_threads for other in busy if other.device == "cpu")
        if len(busy) >= self.jobs or (busy and cell.device == "cpu" and threads + cell.num_threads > self._cores):
            return None
        idle = next((worker for worker in self._workers if worker.cell is None), None)
        if idle is None:
            idle = _Worker(self._plugins, self._heard)
            self._workers.append(idle)
        return idle

    def close(self) -> None:
        """End every worker: at once where it is idle, else as SIGTERM ends a command."""
        for worker in self._workers:
            worker.end()
        deadline = time.monotonic() + PATIENCE_SECONDS
        for worker in self._workers:
            worker.wait(max(0.0, deadline - time.monotonic()))
        self._workers.clear()


class _Worker:
    """One worker process as its parent sees it."""

    def __init__(self, plugins: Sequence[Path], heard: queue.Queue[tuple[_Worker, Any]]) -> None:
        self.cell: Cell | None = None
        self.lost: str | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        # the same code as here, wherever the working folder is
        code = f"import sys; sys.path[:] = {sys.path!r}; from harness.cli import main; main()"
        words = [sys.executable, "-P", "-c", code, "bench-worker", *(f"--plugins={folder}" for folder in plugins)]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=False
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin: Any = self._process.stdin
        threading.Thread(target=self._listen, args=(self._process.stdout, heard), daemon=True).start()

    def _listen(self, stream: Any, heard: queue.Queue[tuple[_Worker, Any]]) -> None:
        try:
            while True:
                heard.put((self, pickle.load(stream)))
        except Exception:  # its end, or a message that a kill cut short
            heard.put((self, None))

    def give(self, cell: Cell, lost: str | None) -> None:
        self.cell, self.lost = cell, lost
        try:
            pickle.dump((cell, lost), self._stdin)
            self._stdin.flush()
        except BrokenPipeError:
            return  # its end is heard by the listening thread

    def last_words(self) -> str:
        """How the process ended, in one line."""
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        how = f"ended with code {code}" if code >= 0 else f"was killed by signal {-code} ({signal.Signals(-code).name})"
        advice = "; too little memory is the usual cause" if code == -signal.SIGKILL else ""
        return f"the worker process {how}{advice}" + (f": {lines[-1][:200]}" if lines else "")

    def end(self) -> None:
        if self.cell is not None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._stdin.close()
        except BrokenPipeError:
            return

    def wait(self, seconds: float) -> None:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


# -------------------------------------------------------------------------------------------------- the worker itself


class _Telling:
    """Implements runner.Reporter: one line of what is going on, now and then."""

    def __init__(self, tell: Callable[[Any], None]) -> None:
        self._tell, self._last = tell, 0.0

    def arm_started(self, arm: Arm, number: int, total: int) -> None:
        return

    def training(self, label: str, step: int, steps: int, means: Mapping[str, float], images_per_second: float) -> None:
        if time.monotonic() - self._last > TELL_SECONDS:
            self._last = time.monotonic()
            self._tell(f"{label} {step:,}/{steps:,}, {images_per_second:,.0f} images/s")

    def evaluating(self, arm: Arm, cell: ArmCell) -> None:
        self._tell(cell.evaluator + ("" if cell.budget is None else f", labels {cell.budget.spec}"))

    def note(self, text: str) -> None:
        return


def serve() -> None:
    """Run the cells that a parent sends until it sends no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches everyone in the terminal: the parent says what to do
    out: BinaryIO = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else prints must not stand between the messages
    given: queue.Queue[tuple[Cell, str | None] | None] = queue.Queue()

    def listen() -> None:
        try:
            while True:
                given.put(pickle.load(sys.stdin.buffer))
        except Exception:  # the parent has closed it, or is gone
            given.put(None)
            if working.is_set():
                os.kill(os.getpid(), signal.SIGTERM)

    def tell(message: Any) -> None:
        try:
            pickle.dump(message, out)
            out.flush()
        except BrokenPipeError:
            return  # the end of stdin says the same

    working, planner = threading.Event(), Planner()
    threading.Thread(target=listen, daemon=True).start()
    while (item := given.get()) is not None:
        working.set()
        cell, lost = item
        outcome = run_cell(cell, planner, _Telling(tell), lost)
        working.clear()
        tell(outcome)


__all__ = ["LocalEngine", "serve"]
