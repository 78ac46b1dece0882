"""Files that survive a kill at any moment: written under a unique temporary name, synced, renamed, folder synced."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness.errors import HarnessError

TEMPORARY = ".tmp"


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Make `path` by letting `fill` write a temporary sibling; a kill leaves the old file or the new one, never a part.

    Raises HarnessError naming path, needed and free bytes when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        fill(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException as error:
        written = temporary.stat().st_size if temporary.exists() else 0
        temporary.unlink(missing_ok=True)
        # torch's writer does not name the cause when the disk is full, so the free space is asked for as well
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        free = shutil.disk_usage(path.parent).free
        if full or (isinstance(error, RuntimeError) and free < 1 << 20):
            raise HarnessError(
                f"disk full while writing {path}: {written:,} bytes were written, {free:,} are free; make room and rerun"
            ) from error
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` durably."""
    write(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as canonical JSON durably."""
    write_bytes(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n")


def seal(value: dict[str, Any]) -> str:
    """SHA-256 of a JSON object without its seal, in canonical form."""
    text = json.dumps({key: value[key] for key in value if key != "seal"}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object that ends with its own SHA-256 (`seal`)."""
    write_json(path, {**value, "seal": seal(json.loads(json.dumps(value)))})


def read_sealed(path: Path) -> dict[str, Any] | None:
    """The object `write_sealed` wrote, without its seal; None when a byte of it was changed or lost."""
    try:
        value = json.loads(path.read_bytes())
        if isinstance(value, dict) and value.pop("seal", None) == seal(value):
            return value
    except ValueError:  # UnicodeDecodeError included
        pass
    return None


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep(folder: Path, older_than_seconds: float, now: float) -> list[Path]:
    """Remove temporary files that a killed process left under `folder`; returns what was removed."""
    gone = []
    for file in folder.rglob(f"*{TEMPORARY}"):
        with contextlib.suppress(FileNotFoundError):
            if now - file.stat().st_mtime >= older_than_seconds:
                file.unlink()
                gone.append(file)
    return gone


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold an advisory lock on `path`; the kernel frees it when the process dies. `on_wait` is called if it is taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        for attempt in range(20):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)  # whoever only looks whether the owner lives holds it for a moment
                if attempt == 19:
                    if on_wait:
                        on_wait()
                    fcntl.flock(file, fcntl.LOCK_EX)
        yield
