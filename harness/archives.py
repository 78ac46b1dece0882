"""Unpacking: exactly the published members of a tar or zip, each checked before it takes its name.

Nothing in an archive chooses a path: members are looked up by the names we publish, copied as plain bytes, and links,
devices, `../` and whatever else an archive may hold are never acted on. So no tar filter is needed, and Pythons without
one are as safe.
"""

from __future__ import annotations

import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from harness import durable
from harness.contracts import HarnessError, PublishedFile
from harness.download import disk_full, is_published, strongest
from harness.images import shown

CHUNK_BYTES = 1 << 20
BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error)


def extract(archive: Path, members: Mapping[str, tuple[PublishedFile, Path]]) -> list[Path]:
    """Unpack the named members of a .tar, .tar.gz or .zip; everything else in it is ignored.

    members: {name inside the archive: (what is published about it, where to put it)}. A member must be a regular file
    and match its published size and digest; it appears under its final name whole and checked, or not at all. Raises
    HarnessError, one line, naming what is missing, wrong or broken.
    """
    done: list[Path] = []
    waiting = dict(members)
    try:
        for name, size, stream in _entries(archive, frozenset(members)):
            if name not in waiting:  # a second member of the same name
                continue
            file, target = waiting.pop(name)
            _place(archive, name, size, stream, file, target)
            done.append(target)
            if not waiting:
                break
    except (*BROKEN, EOFError, OSError, ValueError, NotImplementedError) as error:
        reason = shown(error or type(error).__name__)
        raise HarnessError(f"{shown(archive)} is broken ({reason}): delete it and fetch it again") from error
    if waiting:
        names = ", ".join(sorted(waiting))
        raise HarnessError(f"{shown(archive)} does not hold {names}: delete it and fetch it again")
    return done


def _entries(archive: Path, wanted: frozenset[str]) -> Iterator[tuple[str, int, IO[bytes]]]:
    """(name, size, stream) of the regular files among `wanted`, in the archive's order."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as bundle:
            for entry in bundle.infolist():
                kind = entry.external_attr >> 16 & 0o170000
                if entry.filename in wanted and kind in (0, 0o100000):
                    with bundle.open(entry) as stream:
                        yield entry.filename, entry.file_size, stream
        return
    with tarfile.open(archive, "r:*") as tape:
        for member in tape:
            name = member.name.removeprefix("./")
            if name in wanted and member.isreg():
                content = tape.extractfile(member)
                if content is not None:
                    yield name, member.size, content


def _place(archive: Path, name: str, size: int, stream: IO[bytes], file: PublishedFile, target: Path) -> None:
    """Copy one member to `target` through a checked temporary file."""
    if file.size is not None and size != file.size:
        raise HarnessError(f"{shown(archive)}: {name} has {size:,} bytes, the published file {file.size:,}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if size > shutil.disk_usage(target.parent).free:
        disk_full(target, size)

    def fill(temporary: Path) -> None:
        left = size
        with open(temporary, "xb") as out:
            while left:
                chunk = stream.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise EOFError(f"{name} ends early")
                out.write(chunk)
                left -= len(chunk)
        if strongest(file) is not None and not is_published(temporary, file):
            raise HarnessError(f"{shown(archive)}: {name} is not the published file (digest differs)")

    durable.write(target, fill)
