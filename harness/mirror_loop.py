"""What the mirror process does (harness.mirror starts it): deliver a parent's journals until the parent is gone.

stdin of the process: JSON lines, {"uri": ...} first, then {"open": [path, ...]} and, with "flush": n, the wish to hear
when nothing is owed any more; its end means that the parent is gone. stdout: a file that holds the latest status, one
checksummed line (journal.encode). stderr: .harness/mirror.log.
"""

from __future__ import annotations

import io
import json
import os
import select
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from harness import journal as journals
from harness.delivery import Delivery, end_dead, is_alive, journals_of
from harness.tracking import Store

ORPHAN_SECONDS = 30.0  # how long the process goes on delivering when its parent is gone
IDLE_SECONDS = 20.0  # how long it waits, with nothing left to do, for the next command of the same parent


class Mirror:
    """Deliver the journals of a parent until it is gone, or has no more work for it."""

    def __init__(self, workspace: Path, log: TextIO, requests: int = 0, status: int = 1) -> None:
        self.workspace = workspace.resolve()
        self._log, self._requests, self._status = log, requests, status
        self._delivery: Delivery | None = None
        self._parent = os.getppid()
        self._unread = b""
        self._paths: list[Path] = []
        self._debts: list[Path] | None = None
        self._asked = self._flushed = 0
        self._reason = self._said = ""
        self._deadline: float | None = None  # set when the parent is gone

    def run(self) -> None:
        """Deliver in passes, half a second apart, or up to five while the store is away."""
        pause, idle_since = 0.0, time.monotonic()
        while True:
            self._listen(pause)
            asked = self._asked  # heard before the pass: what is written later may not be in it
            done = self._delivery is not None and self._deliver(self._delivery)
            if done and asked > self._flushed:
                self._flushed, self._paths = asked, []
            self._say()
            now = time.monotonic()
            if self._deadline is not None and (done or self._delivery is None or now > self._deadline):
                return
            if self._paths or self._debts or self._flushed < self._asked:
                idle_since = now
            elif now - idle_since > IDLE_SECONDS:
                return
            pause = self._pause(pause)

    def _pause(self, last: float) -> float:
        if self._debts and not self._reason:
            return 0.0
        longest = 1.0 if self._asked > self._flushed or self._deadline is not None else 5.0
        return min(max(2 * last, 0.5), longest) if self._reason else 0.5

    def _listen(self, seconds: float) -> None:
        """Take in what the parent wrote; wait for it at most `seconds`."""
        if os.getppid() != self._parent:  # a fork of the parent's may keep our pipe open beyond its death
            self._orphaned()
        if self._deadline is not None:
            time.sleep(seconds)
            return
        while select.select([self._requests], [], [], seconds)[0]:
            if not (data := os.read(self._requests, 1 << 16)):
                self._orphaned()
                return
            *lines, self._unread = (self._unread + data).split(b"\n")
            for line in lines:
                self._hear(json.loads(line))
            seconds = 0.0

    def _hear(self, message: Mapping[str, Any]) -> None:
        if "uri" in message:
            store = Store(self.workspace, message["uri"])
            self._delivery, sys.stderr = Delivery(store), _Scrubbed(self._log, store)
        self._paths += [path for name in message.get("open", ()) if (path := Path(name)) not in self._paths]
        self._asked = max(self._asked, message.get("flush", 0))

    def _orphaned(self) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + ORPHAN_SECONDS
            signal.alarm(int(ORPHAN_SECONDS) + 5)  # a call that hangs may not keep an orphan alive
            set_autogroup(os.getpid(), 0)  # nobody trains any more

    def _deliver(self, delivery: Delivery) -> bool:
        """One pass: the parent's journals, and one of those that earlier commands left. True: nothing is owed now."""
        try:
            if self._debts is None:
                self._debts = self._old_debts(delivery)
            busy = [path for path in self._paths if delivery.pending(path) and not delivery.deliver(path)]
            self._reason = "another process is delivering them" if busy else ""
            if self._debts:
                delivery.deliver(self._debts[0])  # False: another process is at it, and has taken the debt over
                del self._debts[0]
            return not busy and not self._debts
        except Exception as error:  # whatever MLflow, SQLAlchemy or the network raise: try again
            self._reason = delivery.store.scrub(error)
            return False

    def _old_debts(self, delivery: Delivery) -> list[Path]:
        """Journals that earlier commands of this workspace left undelivered, the dead among them closed first."""
        found = journals_of(self.workspace)
        self._listen(0.0)  # after looking: the parent names a journal before it makes the file
        others = [path for path in found if path not in self._paths and not is_alive(self.workspace, path)]
        end_dead(self.workspace, others)
        return [path for path in others if delivery.pending(path)]

    def _say(self) -> None:
        refused = self._delivery.refused if self._delivery else []
        status = {"flushed": self._flushed, "reason": self._reason, "refused": refused}
        if (said := json.dumps(status)) != self._said:
            os.pwrite(self._status, journals.encode(status), 0)  # what is left behind the line is never read
            self._said = said


class _Scrubbed(io.TextIOBase):
    """The log without the password of the store: libraries print addresses in their warnings and tracebacks."""

    def __init__(self, file: TextIO, store: Store) -> None:
        self._file, self._store = file, store

    def write(self, text: str) -> int:
        self._file.write(self._store.without_secrets(text))
        self._file.flush()
        return len(text)


def set_autogroup(pid: int, nice: int) -> bool:
    """Set the nice value of a session; False where the kernel wants to be asked later (it takes one change in 0.1 s).

    Linux shares the processor out between sessions first and heeds the nice value of a process inside its own only:
    beside training on the same core a mirror of nice 10 took 50%, and 10% when its session's was 10 as well.
    """
    try:
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))
    except BlockingIOError:
        return False
    except OSError:  # a system without them
        pass
    return True
