"""Cells in worker processes of this machine.

A worker (harness/worker_process.py) is the hidden command `bench-worker`. It takes one cell at a time; when stdin ends,
it stops in the middle of its cell.

Workers share the cores by what the cells ask for: a cell's number of threads is part of its identity and is not changed
for the number of jobs (docs/decisions/007); instead no cell is started while those at work use all cores.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.arms import Arm
from harness.arms import Cell as ArmCell
from harness.engines import CellOutcome, Watcher, run_cell
from harness.grid import Cell, Planner
from harness.worker_process import WorkerProcess, become_worker, close_all

TELL_SECONDS = 0.5  # between two words of progress

Given = tuple[Cell, str | None]  # a cell, and how an earlier worker that was lost with it ended: that is to be recorded


# -------------------------------------------------------------------------------------------------- the parent's side


class LocalEngine:
    """Implements harness.engines.Engine. jobs: cells at work at the same time; plugins: folders to register there."""

    def __init__(self, jobs: int = 1, plugins: Sequence[Path] = ()) -> None:
        self.jobs, self._plugins = jobs, plugins
        self._workers: list[WorkerProcess[Given]] = []
        self._heard: queue.Queue[tuple[WorkerProcess[Given], Any]] = queue.Queue()
        self._cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def outcomes(self, cells: Sequence[Cell], watcher: Watcher) -> Iterator[CellOutcome]:
        """Run the cells, as many at a time as jobs and cores allow, and yield each one's outcome as it comes."""
        waiting: deque[Given] = deque((cell, None) for cell in cells)
        while waiting or any(worker.work for worker in self._workers):
            while waiting and (worker := self._free(waiting[0][0])) is not None:
                worker.work = given = waiting.popleft()
                worker.send(given)
                watcher.started(given[0])
            worker, message = self._heard.get()
            cell, lost = worker.work or (None, None)
            if message is None:
                self._workers.remove(worker)
                if cell is None:
                    continue
                how = f"the worker process {worker.last_words('; too little memory is the usual cause')}"
                if lost is None:
                    waiting.append((cell, how))  # another worker is to record it
                else:
                    yield CellOutcome(cell.pretrain_id, "FAILED", how)
            elif isinstance(message, CellOutcome):
                worker.work = None
                yield message
            elif cell is not None:
                watcher.progress(cell, str(message))

    def _free(self, cell: Cell) -> WorkerProcess[Given] | None:
        """A worker that may take this cell now, started if need be."""
        busy = [worker.work[0] for worker in self._workers if worker.work is not None]
        threads = sum(other.num_threads for other in busy if other.device == "cpu")
        if len(busy) >= self.jobs or (busy and cell.device == "cpu" and threads + cell.num_threads > self._cores):
            return None
        idle = next((worker for worker in self._workers if worker.work is None), None)
        if idle is None:
            idle = WorkerProcess("bench-worker", self._plugins, self._heard)
            self._workers.append(idle)
        return idle

    def close(self) -> None:
        """End every worker: at once where it is idle, else as SIGTERM ends a command."""
        for worker in self._workers:
            if worker.work is not None:
                worker.process.terminate()
        close_all(self._workers)
        self._workers.clear()


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
    tell = become_worker()
    given: queue.Queue[Given | None] = queue.Queue()

    def listen() -> None:
        stdin = open(0, "rb", closefd=False)  # noqa: SIM115 - sys.stdin's lock, held here, would turn a traceback into an abort
        try:
            while True:
                given.put(pickle.load(stdin))
        except Exception:  # the parent has closed it, or is gone
            given.put(None)
            if working.is_set():
                os.kill(os.getpid(), signal.SIGTERM)

    working, planner = threading.Event(), Planner()
    threading.Thread(target=listen, daemon=True).start()
    while (item := given.get()) is not None:
        working.set()
        cell, lost = item
        outcome = run_cell(cell, planner, _Telling(tell), lost)
        working.clear()
        tell(outcome)


__all__ = ["LocalEngine", "serve"]
