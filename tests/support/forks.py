"""`python -c CODE WORDS` as a process of its own that does not pay for its imports: they take 4 to 8 CPU seconds.

A server, one per test process, has imported what the commands need and forks for each of them; nothing is called before
the fork, so a command finds what a fresh interpreter would, imported sooner. What start-up itself loads is no matter for
these processes. Other systems than Linux do not take well to forks of large libraries: there the process is a fresh one.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

COMMAND = "from harness.cli import main; main()"
PLAIN = f"from harness import run_figures; run_figures._add = lambda *_, **__: None\n{COMMAND}"  # it draws no pictures
IMPORTED = (
    "torch", "torch._dynamo", "pandas", "rich.table", "sklearn.datasets", "sklearn.linear_model", "sklearn.svm", "scipy.stats",
    "harness.cli", "harness.console", "harness.grid", "harness.listing", "harness.reproduction", "harness.runner",
    "harness.report.assembly", "harness.report.summary",
)  # fmt: skip


class Forked:
    """A started process with as much of subprocess.Popen as the tests use; its output is complete when it has ended."""

    def __init__(self, status: int, streams: tuple[Any, ...] = ()) -> None:
        self._status, self._streams = open(status), streams  # noqa: SIM115 - as long as this object
        self.pid = int(self._status.readline())
        self.returncode: int | None = None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; returns the exit code, raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            self.returncode = int(self._status.readline())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; returns what it wrote to stdout and stderr, raises subprocess.TimeoutExpired."""
        self.wait(timeout)
        texts = []
        for stream in self._streams:
            stream.seek(0)
            texts.append(stream.read().decode())
        return texts[0], texts[1]


class Forks:
    """The server as the tests see it; it starts with the first process that is asked for."""

    command = COMMAND

    def __init__(self) -> None:
        self._control: socket.socket | None = None
        self._server: subprocess.Popen[bytes] | None = None

    def start(self, *words: str, cwd: Path, code: str = PLAIN, **environment: str) -> Forked | subprocess.Popen[str]:
        """Begin `python -c CODE WORDS` (the `harness` command, without its pictures) in the folder `cwd`, with one
        thread, which Ctrl-C ends."""
        settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        if sys.platform != "linux":
            return subprocess.Popen(
                [sys.executable, "-c", code, *words], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env=settings, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
        streams = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - Forked reads them
        with open(os.devnull) as nothing:
            return Forked(self._begun(code, words, cwd, settings, (nothing, *streams)), streams)

    def run(self, *words: str, cwd: Path, code: str = PLAIN, **environment: str) -> subprocess.CompletedProcess[str]:
        """Like subprocess.run with captured text; nothing it waits for takes longer than 280 s."""
        process = self.start(*words, cwd=cwd, code=code, **environment)
        try:
            out, err = process.communicate(timeout=280)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert process.returncode is not None
        return subprocess.CompletedProcess([code, *words], process.returncode, out, err)

    def _begun(
        self, code: str, words: Sequence[str], cwd: Path, environment: Mapping[str, str], streams: Sequence[Any]
    ) -> int:
        """Send the request; returns the pipe that tells the process's id and, later, its exit code."""
        asked = {"code": code, "words": words, "cwd": str(cwd), "environment": dict(environment)}
        request = json.dumps(asked).encode()
        reader, writer = os.pipe()
        control = self._connected()
        socket.send_fds(control, [len(request).to_bytes(8, "big")], [*(s.fileno() for s in streams), writer])
        control.sendall(request)
        os.close(writer)
        return reader

    def close(self) -> None:
        if self._control is not None and self._server is not None:
            self._control.close()
            self._server.wait()

    def _connected(self) -> socket.socket:
        if self._control is None:
            self._control, theirs = socket.socketpair()
            code = "import runpy, sys; runpy.run_path(sys.argv[1])['serve'](int(sys.argv[2]))"
            self._server = subprocess.Popen(
                [sys.executable, "-c", code, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd="/",
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            theirs.close()
        return self._control


# ------------------------------------------------------------------------------------------------------ the server


def serve(descriptor: int) -> None:
    """Fork for every request until the tests are over."""
    control = socket.socket(fileno=descriptor)
    for name in IMPORTED:
        importlib.import_module(name)
    while True:
        size, descriptors, _, _ = socket.recv_fds(control, 8, 4)
        if not size:
            break
        with control.makefile("rb", buffering=0) as stream:
            request = _read(stream, int.from_bytes(size, "big"))
        if os.fork() == 0:
            control.close()
            _keep(json.loads(request), *descriptors)
        for each in descriptors:
            os.close(each)
        _reap()
    _reap()


def _read(stream: Any, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += stream.read(size - len(data))
    return data


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _keep(request: dict[str, Any], *descriptors: int) -> NoReturn:
    """Fork once more; tell `status` the child's id and, when it has ended, its exit code."""
    *streams, status = descriptors
    if (child := os.fork()) == 0:
        os.close(status)
        _become(request, streams)
    for stream in streams:
        os.close(stream)
    os.write(status, b"%d\n" % child)
    os.write(status, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)


def _become(request: dict[str, Any], streams: Sequence[int]) -> NoReturn:
    """What the interpreter does with `-c`, after its imports."""
    code = 1
    try:
        for target, number in enumerate(streams):
            os.dup2(number, target)
            os.close(number)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["-c", *request["words"]]
        exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
