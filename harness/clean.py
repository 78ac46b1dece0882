"""Give disk space back: remove checkpoints by age.

Everything under `.harness/checkpoints/<pretrain_id>` goes together: finished encoder, training states, figures. Rows,
predictions, journals and MLflow's store are never touched, so every number stays, and running the command of a removed
run again trains it anew only when something new is asked of it.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from harness import checkpoint, journal
from harness.contracts import HarnessError

DEFAULT_DAYS = 30.0
_SECONDS_PER_DAY = 86_400
ENCODER_POINTER = "encoder.json"


@dataclass(frozen=True)
class Removed:
    """One folder of checkpoints that went, or would go: its size in bytes and days since its last file was written."""

    pretrain_id: str
    num_bytes: int
    age_days: float


@dataclass(frozen=True)
class CleanReport:
    """What `clean` did. live: runs at work, left alone; failed: one line per folder that could not be removed."""

    removed: tuple[Removed, ...]
    live: tuple[str, ...]
    failed: tuple[str, ...]
    dry_run: bool

    @property
    def freed_bytes(self) -> int:
        """Bytes given back, or in a dry run those that would be."""
        return sum(item.num_bytes for item in self.removed)

    def lines(self) -> list[str]:
        """The report for a terminal."""
        verb = "would remove" if self.dry_run else "removed"
        out = [f"{verb} {r.pretrain_id}: {r.num_bytes / 1e6:,.1f} MB, {r.age_days:.1f} days old" for r in self.removed]
        out += [f"kept {pretrain_id}: a process is at work on it" for pretrain_id in self.live]
        out += self.failed
        out.append(f"{verb} {len(self.removed)} checkpoints, {self.freed_bytes / 1e6:,.1f} MB; rows are kept")
        return out


def clean(workspace: Path, older_than_days: float = DEFAULT_DAYS, dry_run: bool = False) -> CleanReport:
    """Remove the checkpoints of every run whose newest file is at least `older_than_days` old.

    A run whose lock is held is left alone, whatever its age. Raises HarnessError for an age that is no number of days.
    """
    if not (math.isfinite(older_than_days) and older_than_days >= 0):
        raise HarnessError(f"--older-than-days {older_than_days:g}: give a number of days, 0 or more")
    removed, live, failed = [], [], []
    now = time.time()
    for folder in _folders(workspace):
        num_bytes, newest = _measure(folder)
        age_days = (now - newest) / _SECONDS_PER_DAY
        lock = journal.lock_path(workspace, folder.name)
        if age_days < older_than_days:
            continue
        if journal.is_alive(lock):
            live.append(folder.name)
            continue
        if not dry_run:
            with journal.hold(lock) as mine:  # nobody may start on it while it goes
                if not mine:
                    live.append(folder.name)
                    continue
                try:
                    _remove(folder)
                except OSError as error:
                    failed.append(f"could not remove all of {folder.name}: {error.strerror}")
                    continue
        removed.append(Removed(folder.name, num_bytes, max(age_days, 0.0)))
    return CleanReport(tuple(removed), tuple(live), tuple(failed), dry_run)


def _folders(workspace: Path) -> list[Path]:
    """The checkpoint folders of a workspace; links are left out, what they lead to is not ours."""
    top = workspace / ".harness" / "checkpoints"
    if not top.is_dir():
        return []
    return sorted(path for path in top.iterdir() if path.is_dir() and not path.is_symlink())


def _measure(folder: Path) -> tuple[int, float]:
    """(bytes of all files below, modification time of the newest); an empty folder counts with its own time."""
    num_bytes, times = 0, []
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                facts = os.lstat(os.path.join(parent, name))
            except FileNotFoundError:  # a live run replaces its states
                continue
            num_bytes += facts.st_size
            times.append(facts.st_mtime)
    return num_bytes, max(times, default=folder.stat().st_mtime)


def _remove(folder: Path) -> None:
    """Delete a folder, pointers first: a kill in between leaves files that nothing takes for a checkpoint."""
    for name in (ENCODER_POINTER, checkpoint.POINTER):
        for pointer in folder.rglob(name):
            pointer.unlink()
    shutil.rmtree(folder)
