"""Workers of a search: processes of this machine that take trials until none is left.

A worker (harness/worker_process.py) is the hidden command `tune-worker`. It gets the searches and tells its parent what it
does; when stdin ends, it gives its trial back and stops. Which trial is whose is decided by the storage alone, so workers
of several commands, on several machines, may share a search.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import arms, journal, mirror, runner, tuning
from harness.contracts import HarnessError
from harness.grid import Planner
from harness.trials import Measured, Pruned, Search, measure
from harness.worker_process import WorkerProcess, become_worker, close_all

LOOK_SECONDS = 1.0  # between two looks at trials that others are at work on
DEATHS = 2  # of workers with the same trial, before the trial is held to be the cause; or before they had one


@dataclass(frozen=True)
class Began:
    """A worker has taken a trial. journals: identities to be mirrored, the trial's first"""

    method: str
    number: int
    journals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ended:
    """A trial is over. state: in Optuna's words; values: None where it failed; reason: why; note: one line of it"""

    method: str
    number: int
    state: str
    values: tuple[float, ...] | None
    reason: str | None = None


Message = Began | Ended
Tell = Callable[[Any], None]
Taken = tuple[str, int]  # a trial that a worker has: method and number


# --------------------------------------------------------------------------------------------------- the work itself


def work(searches: Sequence[Search], tell: Tell) -> None:
    """Take trials of these searches, the lowest numbers first, until all of them are finished.

    Raises HarnessError for what the caller has to mend; the trial it came up in waits again.
    """
    studies = [tuning.open_study(search) for search in searches]
    planner = Planner()
    while True:
        pairs = sorted(zip(searches, studies, strict=True), key=lambda pair: _next(*pair))
        taken = next(((s, study, trial) for s, study in pairs if (trial := tuning.claim(s, study)) is not None), None)
        if taken is not None:
            _carry_out(*taken, planner, tell)
        elif any(tuning.unfinished(search, study) for search, study in pairs):
            for search, study in pairs:
                tuning.revive(search, study)
            time.sleep(LOOK_SECONDS)
        else:
            return


def _next(search: Search, study: Any) -> int:
    return min(tuning.waiting(study), default=search.trials)


def _carry_out(search: Search, study: Any, trial: Any, planner: Planner, tell: Tell) -> None:
    """One trial from its claim to its end in the storage and in its journal."""
    workspace, identity = search.request.workspace, search.trial_journal(trial.number)
    with journal.hold(journal.lock_path(workspace, identity), wait_seconds=60.0), tuning.beating(study, trial):
        try:
            ended = _Trial(search, study, trial, planner, tell).run()
        except tuning.FINISHED_ELSEWHERE:  # it was held for lost, and another worker was quicker
            return
        except BaseException:
            tuning.release(study, trial._trial_id)
            raise
    tell(ended)


class _Trial:
    """A claimed trial on its way to its end."""

    def __init__(self, search: Search, study: Any, trial: Any, planner: Planner, tell: Tell) -> None:
        self.search, self.study, self.trial, self.planner, self.tell = search, study, trial, planner, tell
        self.identity = search.trial_journal(trial.number)
        self.began = time.monotonic()
        self.found: list[Measured] = []
        self.epochs = 0  # of a training that was ended before its time

    def run(self) -> Ended:
        """Measure every seed; what the settings are to blame for ends the trial, anything else the command."""
        search, trial = self.search, self.trial
        params = tuning.suggest(search, trial)
        tracker = mirror.Tracking(search.request.workspace, "none")
        log = tracker.open(
            self.identity, name=f"{search.study}-{search.method}-trial-{trial.number}",
            params={key: str(value) for key, value in params.items()},
            tags={"study": search.study, "method": search.method, "dataset": search.request.dataset, "role": "trial"},
            config=params, environment=arms.environment(), parent=search.journal,
        )  # fmt: skip
        runner.open_journals.append(log)
        status = "INTERRUPTED"
        try:
            self.tell(Began(search.method, trial.number, (self.identity,)))
            state, values, reason = self._measure(params)
            self._note(reason)
            named = {one.name: value for one, value in zip(search.objectives, values or (), strict=False)}
            log.metrics(0, {f"objective.{name}": value for name, value in named.items()})
            log.tags({"state": state, **({"reason": reason} if reason else {})})
            tuning.finish(self.study, trial, state, values if state == "COMPLETE" else None)
            status = "FAILED" if state == "FAIL" else "FINISHED"
        finally:
            runner.open_journals.remove(log)
            log.end(status)
        return Ended(search.method, trial.number, state, values, reason)

    def _measure(self, params: Mapping[str, Any]) -> tuple[str, tuple[float, ...] | None, str | None]:
        search = self.search
        for place, seed in enumerate(search.seeds):
            request = search.request_of(params, seed, parent=self.identity)
            try:
                plan = self.planner.plan(request)
            except HarnessError as error:
                return "FAIL", None, f"REFUSED: {error}"
            self.tell(Began(search.method, self.trial.number, tuple(arm.pretrain_id for arm in plan.arms)))
            rungs = tuning.rungs(search, plan.arms[0].config.epochs) if place == 0 else ()
            try:
                one = measure(search, request, self.planner, runner.Silent(), self._look if rungs else None, rungs)
            except Pruned:
                return "PRUNED", None, f"after {self.epochs} epochs"
            self.found.append(one)
            if one.values is None:
                return "FAIL", None, one.reason
            if search.pruner == "wilcoxon":
                self.trial.report(one.values[0], place)
                if self.trial.should_prune() and place + 1 < len(search.seeds):
                    return "COMPLETE", self._means(), f"stopped after {place + 1} of {len(search.seeds)} seeds"
        return "COMPLETE", self._means(), None

    def _look(self, epoch: int, value: float) -> None:
        self.epochs = epoch
        if not tuning.goes_on(self.trial, epoch, value):
            raise Pruned

    def _means(self) -> tuple[float, ...]:
        values = [one.values for one in self.found if one.values is not None]
        return tuple(sum(each) / len(each) for each in zip(*values, strict=True))

    def _note(self, reason: str | None) -> None:
        """What the storage keeps beside the values; before the trial ends, because then nothing can be added."""
        seconds = sum(one.seconds for one in self.found)
        if reason and reason.startswith("after "):
            seconds += time.monotonic() - self.began
        attrs = {
            "seconds": seconds, "epochs": self.epochs * (not self.found) + sum(one.epochs for one in self.found),
            "seeds": {str(one.seed): one.values for one in self.found},
            "pretrain_ids": [name for one in self.found for name in one.pretrain_ids],
            "eval_ids": [name for one in self.found for name in one.eval_ids],
        }  # fmt: skip
        for key, value in {**attrs, **({"reason": reason} if reason else {})}.items():
            self.trial.set_user_attr(key, value)


def serve() -> None:
    """The command `tune-worker`: work on what a parent sends, until that is done or the parent is gone."""
    tell = become_worker()
    searches: tuple[Search, ...] = pickle.load(sys.stdin.buffer)

    def listen() -> None:
        while os.read(0, 1):  # not sys.stdin: its lock, held by this thread, would turn a traceback into an abort
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=listen, daemon=True).start()
    try:
        work(searches, tell)
    except HarnessError as error:
        tell(error)


# -------------------------------------------------------------------------------------------------- the parent's side


class Workers:
    """Worker processes at work on searches. plugins: folders to register there"""

    def __init__(self, searches: Sequence[Search], count: int, plugins: Sequence[Path] = ()) -> None:
        self._searches, self._plugins = tuple(searches), plugins
        self._heard: queue.Queue[tuple[WorkerProcess[Taken], Any]] = queue.Queue()
        self._workers: list[WorkerProcess[Taken]] = []
        self._deaths: dict[Taken | None, int] = {}
        self._count = count

    def run(self, on_message: Callable[[Message], None]) -> None:
        """Work until every trial is finished; a worker that is lost is replaced, its trial begun again.

        Raises HarnessError where a worker met one, or cannot even start.
        """
        by_name = {search.method: search for search in self._searches}
        studies = {name: tuning.open_study(search) for name, search in by_name.items()}
        for name, search in by_name.items():
            tuning.revive(search, studies[name])
        open_trials = sum(tuning.unfinished(search, studies[name]) for name, search in by_name.items())
        for _ in range(min(self._count, open_trials)):
            self._start()
        while self._workers:
            worker, message = self._heard.get()
            if isinstance(message, HarnessError):
                raise message
            if isinstance(message, Began):
                worker.work = (message.method, message.number)
                on_message(message)
            elif isinstance(message, Ended):
                worker.work = None
                on_message(message)
            else:
                self._workers.remove(worker)
                if worker.process.wait() != 0:
                    self._lost(worker, by_name, studies, on_message)
                    self._start()

    def _start(self) -> None:
        worker = WorkerProcess("tune-worker", self._plugins, self._heard)
        self._workers.append(worker)
        worker.send(self._searches)

    def _lost(self, worker: WorkerProcess[Taken], by_name: Mapping[str, Search], studies: Mapping[str, Any],
              on_message: Callable[[Message], None]) -> None:  # fmt: skip
        """Give the trial of a lost worker back; one that several workers were lost with is ended as failed."""
        self._deaths[worker.work] = self._deaths.get(worker.work, 0) + 1
        if worker.work is None:
            if self._deaths[None] > DEATHS:
                raise HarnessError(f"a worker of the search {worker.last_words()}")
            return
        method, number = worker.work
        if self._deaths[worker.work] <= DEATHS:
            tuning.revive(by_name[method], studies[method])
            return
        reason = f"LOST: its worker {worker.last_words()}"
        if tuning.give_up(studies[method], number, reason):
            on_message(Ended(method, number, "FAIL", None, reason))

    def close(self) -> None:
        """End every worker as SIGTERM ends a command; their trials wait again."""
        close_all(self._workers)
        self._workers.clear()


__all__ = ["Began", "Ended", "Message", "Workers", "serve", "work"]
