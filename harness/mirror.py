"""Mirror run journals into MLflow from a process of its own: training neither waits for MLflow nor slows down for it.

Training writes to its journal (harness.journal) and to nothing else. `Tracking`, the runner's side, starts
`python -m harness.mirror` with the first journal it opens and tells it the paths; that process reads the journals by
offset and delivers them (harness.delivery). It is a process and not a thread because importing MLflow (3 CPU s) and
making its first store (2.5 CPU s) hold Python's interpreter lock: beside a thread, of steps of 15 ms one in ten took
over 46 ms in the first 10 s, the worst 350 ms; beside a process 20 and 30 ms (2 busy cores, benchmarks/tracking.py). A
store that is away, frozen or emptied is met by trying again, now or with `harness sync`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from harness import journal as journals
from harness.delivery import Delivery, Owed, write_whole
from harness.journal import Journal
from harness.mirror_loop import Mirror, set_autogroup
from harness.tracking import Store, resolve_uri

_LOG_BYTES = 1 << 20  # a longer log is begun anew


# ---------------------------------------------------------------------------------------------- the runner's side


class Tracking:
    """The tracking of one command: journals for the runner, and the process that mirrors them.

    workspace: the folder that holds results/, .harness/ and mlflow.db
    uri: None for the workspace's own store, "none" for journals only, else an address (see tracking.resolve_uri)
    Raises HarnessError for an address that is no tracking store; writes nothing before `open`.
    """

    def __init__(self, workspace: Path, uri: str | None = None) -> None:
        self.workspace = workspace.resolve()
        resolved = resolve_uri(self.workspace, uri)
        self._delivery = Delivery(Store(self.workspace, resolved)) if resolved else None  # counts, never delivers
        self._paths: list[Path] = []
        self._started = False
        self._process: _Process | None = None
        self._refused_before = 0
        self._reason = ""

    def start(self) -> None:
        """Mirror from now on. The process starts with the first journal: a command that opens none needs none."""
        self._started = True
        if self._paths:
            self._tell(self._paths)

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
        self.follow(pretrain_id)  # before the file is there: the mirror must not take it for a dead run's
        journal.begin(name, params, tags, datasets, parent)
        folder = self.workspace / ".harness" / "artifacts" / pretrain_id
        for file, content in (("config.json", config), ("environment.json", environment)):
            write_whole(folder / file, json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")
            journal.artifact(file, folder / file)
        return journal

    def follow(self, pretrain_id: str) -> None:
        """Mirror the journal of a run, whichever process of this machine writes it."""
        path = journals.journal_path(self.workspace, pretrain_id)
        if path not in self._paths:
            self._paths.append(path)
        if self._started:
            self._tell([path])

    def close(self, timeout: float = 30.0, leave: bool = False) -> Owed:
        """Flush for at most `timeout` seconds and return what is still owed. Never raises for a store that is away.

        A mirror that has not finished by then is ended: what it did not deliver stays in the journals. `leave` lets it
        go on by itself for up to 30 s after this process is gone, so that an interrupted run is not left RUNNING.
        """
        if self._delivery is None:
            return Owed()
        if self._process is not None:
            self._flush(self._process, timeout, leave)
        counts = self._delivery.all_owed(self._paths)
        refused = self._process.status["refused"][self._refused_before :] if self._process else ()
        return Owed(counts, self._reason if counts else "", tuple(refused))

    def _tell(self, paths: list[Path]) -> None:
        """Make sure that a mirror process lives and knows these journals; one that died is replaced."""
        if self._delivery is None:
            return
        uri = self._delivery.store.uri
        key = (os.getpid(), self.workspace, uri)
        process = _processes.get(key)
        if process is None or process.exit_code is not None:
            try:
                process = _processes[key] = _Process(self.workspace, uri)
            except OSError as error:  # no memory, no more processes: training goes on without a mirror
                self._reason = f"the mirror process could not be started: {error.strerror}"
                return
        if process is not self._process:
            self._process, self._refused_before = process, len(process.status["refused"])
            paths = self._paths
        process.tell({"open": [str(path) for path in paths]})

    def _flush(self, process: _Process, timeout: float, leave: bool) -> None:
        deadline = time.monotonic() + timeout
        done = process.flush(self._paths, deadline)
        if not done and process.exit_code == 0:  # it left for want of work in the moment our journal came
            self._tell(self._paths)
            process = self._process or process
            done = process.flush(self._paths, deadline)
        if not done:
            self._reason = process.complaint or f"MLflow took longer than {timeout:g} s"
            if not leave:
                process.stop()


class _Process:
    """The mirror process as its parent sees it. Only `flush` and `stop` wait, and both for a bounded time.

    Raises OSError where no process can be started.
    """

    def __init__(self, workspace: Path, uri: str) -> None:
        folder = workspace / ".harness"
        folder.mkdir(parents=True, exist_ok=True)
        log_path = folder / "mirror.log"
        mode = "ab" if log_path.exists() and log_path.stat().st_size < _LOG_BYTES else "wb"
        # The same code as here: "" is the current folder; names that are no paths are put there by installers' hooks.
        search = [place for entry in sys.path if os.path.exists(place := os.path.abspath(entry))]
        settings = {"PYTHONPATH": os.pathsep.join(search), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._status = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        with log_path.open(mode) as log:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "harness.mirror", str(workspace)], env=os.environ | settings,
                stdin=subprocess.PIPE, stdout=self._status, stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal is for training; the mirror is to flush after it
            )  # fmt: skip
        assert self._child.stdin is not None
        self._stdin = self._child.stdin.fileno()
        os.set_blocking(self._stdin, False)
        self._unsent = b""
        self._flushes = 0
        self._usual_nice = os.nice(0)
        self._modest: bool | None = None
        self.tell({"uri": uri})  # not as an argument or a variable: other users of the machine may read those

    @property
    def exit_code(self) -> int | None:
        """None while it lives; negative where a signal ended it."""
        return self._child.poll()

    @property
    def status(self) -> dict[str, Any]:
        """What it last said: flushed (number of the last flush it finished), reason, refused (lines)."""
        descriptor = self._status.fileno()
        line = os.pread(descriptor, os.fstat(descriptor).st_size, 0).partition(b"\n")[0]
        return journals.decode(line) or {"flushed": 0, "reason": "", "refused": []}

    @property
    def complaint(self) -> str:
        """Why something is still owed, as far as it is known."""
        code = self.exit_code
        if code is None:
            return str(self.status["reason"])
        how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
        return f"the mirror process {how}; its log is .harness/mirror.log"

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send one message; what the pipe does not take now is sent with the next one."""
        self._unsent += json.dumps(message).encode() + b"\n"
        self._send(modest="flush" not in message)

    def _send(self, modest: bool) -> None:
        self._stand_back(modest)
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._unsent:
                self._unsent = self._unsent[os.write(self._stdin, self._unsent) :]

    def _stand_back(self, modest: bool) -> None:
        """Leave it little of the processor while we train (modest), its full share while we wait for it.

        The parent does this, because the process may be in the middle of an import. Without privileges a process gets
        the nice value of its start back nowhere, but that of its autogroup everywhere.
        """
        if modest != self._modest and self.exit_code is None:
            nice = min(self._usual_nice + 10, 19) if modest else self._usual_nice
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self._child.pid, nice)
            if set_autogroup(self._child.pid, 10 if modest else 0):
                self._modest = modest

    def flush(self, paths: Iterable[Path], deadline: float) -> bool:
        """Wait until nothing of these journals is owed; False when it is `deadline` (of time.monotonic) or it died."""
        self._flushes += 1
        self.tell({"open": [str(path) for path in paths], "flush": self._flushes})
        while True:
            ended = self.exit_code is not None  # asked before the status, which may be its last word
            if self.status["flushed"] >= self._flushes:
                return True
            if ended or time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
            self._send(modest=False)

    def stop(self) -> None:
        """End it: politely, so that it removes a store half made, and after half a second by force."""
        for signum, patience in ((signal.SIGINT, 0.5), (signal.SIGKILL, 5.0)):
            self._child.send_signal(signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(patience)
                return


# One per parent, workspace and store: the trials of a search, each a command of its own, share one import of MLflow.
_processes: dict[tuple[int, Path, str], _Process] = {}


# --------------------------------------------------------------------------------------------- the process itself


def main() -> None:
    """`python -m harness.mirror WORKSPACE`: serve the parent at the other end of stdin (see the module)."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all at once at shutdown: the parent says when to end
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    code = 0
    try:
        Mirror(Path(sys.argv[1]), sys.stderr).run()
    except KeyboardInterrupt:
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    os._exit(code)  # MLflow's threads must not hold it up


if __name__ == "__main__":
    main()
