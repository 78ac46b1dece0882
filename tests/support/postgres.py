"""A PostgreSQL server of its own for tests, on loopback; through the fixture of this name.

`HARNESS_POSTGRES` names the folder of the server's programs; else they are looked for where Debian puts them. The server
refuses to run as root, so there it runs as the user `postgres` (or `nobody`).
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest


def programs() -> Path | None:
    """Where initdb and pg_ctl are, or None."""
    asked = os.environ.get("HARNESS_POSTGRES")
    on_path = shutil.which("pg_ctl")
    places = [Path(asked)] if asked else [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    places += [Path(on_path).parent] if on_path and not asked else []
    return next((place for place in places if (place / "pg_ctl").exists() and (place / "initdb").exists()), None)


class Server:
    """One running server with a database `postgres` and a user `harness`, whose password is `secret`."""

    def __init__(self, place: Path) -> None:
        self._place, self._user = place, None if os.getuid() else _user()
        self.folder = Path(tempfile.mkdtemp(prefix="harness-postgres-"))
        if self._user:
            os.chown(self.folder, self._user.pw_uid, self._user.pw_gid)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (self.folder / "password").write_text("secret\n")
        (self.folder / "password").chmod(0o644)
        self._run("initdb", "-D", "data", "-U", "harness", "-A", "scram-sha-256", "--pwfile", "password", "-E", "UTF8")
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql://harness:secret@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='{self.folder}'"
        self._run("pg_ctl", "-D", "data", "-w", "-l", "log", "-o", options, "start")

    def stop(self, how: str = "immediate") -> None:
        self._run("pg_ctl", "-D", "data", "-m", how, "-w", "stop")

    def restart(self) -> None:
        """As after a crash: no client is told."""
        self.stop("immediate")
        self.start()

    def close(self) -> None:
        self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *words: str) -> None:
        who = {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []} if self._user else {}
        done = subprocess.run([str(self._place / program), *words], cwd=self.folder, text=True, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, **who)  # type: ignore[call-overload]  # fmt: skip
        assert done.returncode == 0, f"{program}: {done.stderr}"


def _user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")


def serve() -> Server:
    """Start a server; skips the test where there is none to start, or no driver for it."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'harness[postgres]'")
    place = programs()
    if place is None:
        pytest.skip("PostgreSQL is not installed (initdb and pg_ctl; HARNESS_POSTGRES names their folder)")
    return Server(place)
