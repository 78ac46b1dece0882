"""The one verified downloader: https only, resumable, and never a wrong or partial file under its final name.

A file is written to a `.part` sibling, its size and published digest are checked, and only then does it take its name
(fsync, rename, fsync of the folder). A cut continues with a Range request; what a server sends is believed only as far
as it agrees with the published size and digest. Redirects onto http are refused. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import http.client
import os
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, NoReturn

from harness.contracts import HarnessError, PublishedFile

Progress = Callable[[str, int, int | None], None]  # file name, bytes so far, total if known
CHUNK_BYTES = 256 * 1024
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


@dataclass(frozen=True)
class Transfer:
    """How patiently files are fetched.

    attempts: tries in a row that bring nothing new before giving up; a try that got further starts the count again
    max_requests: requests for one file altogether
    stall_seconds: a connection that brings less than `stall_bytes` in this time is cut and resumed
    backoff_seconds: pause after the first failure, doubled up to 30 s
    allow_http_loopback: also take plain http from this machine itself (for tests)
    """

    attempts: int = 5
    max_requests: int = 100
    stall_seconds: float = 30.0
    stall_bytes: int = 1024
    backoff_seconds: float = 0.5
    allow_http_loopback: bool = False


class _Retry(Exception):
    """This try failed in a way that another may not."""


class _GiveUp(Exception):
    """No further try can help; the text says why."""


class _NoRoom(Exception):
    """The disk has not the bytes that are still needed."""

    def __init__(self, needed: int) -> None:
        self.needed = needed


# ------------------------------------------------------------------------------------------------------- digests


def digest_file(path: Path, algorithm: str) -> str:
    """Return the hex digest (`sha256` or `md5`) of a file, read in pieces."""
    with open(path, "rb") as file:
        return digest_stream(file, algorithm)


def digest_stream(stream: IO[bytes], algorithm: str) -> str:
    """Return the hex digest of everything left in `stream`."""
    digest = hashlib.new(algorithm, usedforsecurity=False)  # md5 is what publishers give; FIPS builds refuse it else
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def strongest(file: PublishedFile) -> tuple[str, str] | None:
    """Return (algorithm, hex) of the best digest published for `file`, None if there is none."""
    for algorithm in ("sha256", "md5"):
        if algorithm in file.digests:
            return algorithm, file.digests[algorithm].lower()
    return None


def is_published(path: Path, file: PublishedFile) -> bool:
    """Whether the file at `path` is byte for byte the published one; False where no digest is published."""
    known = strongest(file)
    if known is None or (file.size is not None and path.stat().st_size != file.size):
        return False
    return digest_file(path, known[0]) == known[1]


# ---------------------------------------------------------------------------------------------------------- https


def _check_address(url: str, transfer: Transfer) -> None:
    parts = urllib.parse.urlsplit(url)
    loopback = transfer.allow_http_loopback and parts.scheme == "http" and parts.hostname in LOOPBACK
    if parts.scheme != "https" and not loopback:
        raise _GiveUp(f"refused to fetch from {url[:200]!r}: only https is used")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to https only; once on https, never back to http."""

    def __init__(self, transfer: Transfer) -> None:
        self.transfer = transfer

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        _check_address(newurl, self.transfer)
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise _GiveUp(f"refused a redirect from https to {newurl[:200]!r}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _opener(transfer: Transfer) -> urllib.request.OpenerDirector:
    # Assembled by hand: urllib's default opener would also read file:, ftp: and data: addresses.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor(), _Redirects(transfer),
    ):  # fmt: skip
        opener.add_handler(handler)
    return opener


def _request(url: str, start: int, transfer: Transfer) -> http.client.HTTPResponse:
    """Open `url` from byte `start`. Raises _Retry or _GiveUp; a 416 is a _Retry after which to start again."""
    _check_address(url, transfer)
    # identity: a proxy that unpacks or packs on the way would change the bytes under the digest
    headers = {"User-Agent": "harness", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        response: http.client.HTTPResponse = _opener(transfer).open(request, timeout=transfer.stall_seconds)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (408, 416, 425, 429) or error.code >= 500:
            raise _Retry(f"the server answered {error.code}") from error
        raise _GiveUp(f"the server answered {error.code}") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise _GiveUp(f"its certificate is not trusted: {error.reason.verify_message}") from error
        raise _Retry(f"unreachable: {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Retry(f"unreachable: {error or type(error).__name__}") from error
    return response


# ------------------------------------------------------------------------------------------------------- one file


def download(
    file: PublishedFile, target: Path, transfer: Transfer | None = None, progress: Progress | None = None
) -> Path:
    """Fetch `file` from its address to `target`, or leave nothing under that name.

    A good file that is already there is kept. Raises HarnessError, one line saying what failed and which file to put
    where instead; for a full disk, path, needed and free bytes.
    """
    transfer = transfer or Transfer()
    if file.url is None or strongest(file) is None:
        raise HarnessError(f"{file.name} has no published address and digest: put it at {target}")
    if target.is_file() and is_published(target, file):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _part_file(file, target) as part:
        try:
            _fill(part, file, transfer, progress)
            os.replace(part, target)
            _sync_folder(target.parent)
        except _GiveUp as error:
            raise HarnessError(f"cannot fetch {file.url}: {error}; put that file at {target}") from error
        except _NoRoom as error:
            part.unlink()
            disk_full(target, error.needed)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise HarnessError(f"cannot write {target}: {error.strerror or error}") from error
            got = part.stat().st_size
            part.unlink()
            disk_full(target, file.size or got, error)
    return target


def disk_full(target: Path, needed: int, cause: OSError | None = None) -> NoReturn:
    """Raise the one line for a full disk: path, needed and free bytes."""
    free = shutil.disk_usage(target.parent).free
    raise HarnessError(f"disk full: {target} needs {needed:,} bytes and {free:,} are free; make room or choose another "
                       "--data-dir") from cause  # fmt: skip


@contextlib.contextmanager
def _part_file(file: PublishedFile, target: Path) -> Iterator[Path]:
    """Lend this process the partial file of `target`: found again after a crash, and used by one process at a time.

    Its name holds the published digest, so the partial of another version is never continued. A process that finds it
    in use works on a private one instead of waiting or of mixing its bytes in.
    """
    known = strongest(file)
    assert known is not None
    part = target.with_name(f".{target.name}.{known[1][:16]}.part")
    if part.is_symlink() or (part.exists() and not part.is_file()):
        raise HarnessError(f"{part} is in the way: remove it")
    handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    private = False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        private = not os.path.samestat(os.fstat(handle), os.stat(part))  # it was finished and renamed just now
    except OSError:  # busy, or gone, or a file system without locks
        private = True
    if private:
        os.close(handle)
        part = part.with_suffix(f".{os.getpid()}.{time.time_ns()}.part")
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        yield part
    finally:
        with contextlib.suppress(OSError):
            if private or part.stat().st_size == 0:  # never found again, or nothing worth resuming
                part.unlink()
        os.close(handle)


def _fill(part: Path, file: PublishedFile, transfer: Transfer, progress: Progress | None) -> None:
    """Bring `part` to the published bytes, over as many requests as it takes. Raises _GiveUp or OSError (disk)."""
    failures = wrong = 0
    best = part.stat().st_size
    for _ in range(transfer.max_requests):
        try:
            if not (file.size is not None and part.stat().st_size == file.size):
                _receive(part, file, transfer, progress)
            if is_published(part, file):
                return
            os.truncate(part, 0)
            wrong += 1
            if wrong == 2:  # once may be a resume across two versions; twice from the start is what the server has
                raise _GiveUp("its content is not the published file (digest differs)")
            raise _Retry("its content is not the published file")
        except _Retry as error:
            size = part.stat().st_size
            failures = 1 if size > best else failures + 1
            best = max(best, size)
            if failures >= transfer.attempts:
                raise _GiveUp(str(error)) from error
            time.sleep(min(30.0, transfer.backoff_seconds * 2 ** (failures - 1)))
    raise _GiveUp(f"incomplete after {transfer.max_requests} requests")


def _receive(part: Path, file: PublishedFile, transfer: Transfer, progress: Progress | None) -> None:
    """Append one response to `part`, from where it ends. Raises _Retry unless the response ended as it announced."""
    assert file.url is not None
    start = part.stat().st_size
    if file.size is not None and start > file.size:
        os.truncate(part, 0)
        start = 0
    try:
        response = _request(file.url, start, transfer)
    except _Retry as error:
        if "416" in str(error):  # the server has no such range: what we hold is not a beginning of what it has
            os.truncate(part, 0)
        raise
    with response:
        start = _agreed_start(response, start, file)
        total = _announced_total(response, start, file)
        needed = (total or file.size or 0) - start
        if needed > shutil.disk_usage(part.parent).free:
            raise _NoRoom(needed)
        with open(part, "rb+") as out:
            out.truncate(start)
            out.seek(start)
            _copy(response, out, total, transfer, lambda size: progress and progress(file.name, size, total))
            out.flush()
            os.fsync(out.fileno())


def _agreed_start(response: http.client.HTTPResponse, start: int, file: PublishedFile) -> int:
    """Where this response begins in the file: `start` if the server honoured the Range, else 0."""
    if response.status != 206:
        return 0
    unit, _, span = response.headers.get("Content-Range", "").partition(" ")
    first, _, size = span.partition("/")
    if unit != "bytes" or not first.startswith(f"{start}-"):
        raise _Retry("the server answered with another range than asked for")
    if file.size is not None and size not in ("*", str(file.size)):
        raise _Retry(f"the server's file has {size} bytes, the published one {file.size}")
    return start


def _announced_total(response: http.client.HTTPResponse, start: int, file: PublishedFile) -> int | None:
    """Length of the whole file by this response, None if it does not say. Raises _Retry if it is not the published."""
    length = response.headers.get("Content-Length", "")
    total = start + int(length) if length.isascii() and length.isdigit() else file.size
    if file.size is not None and total != file.size:
        raise _Retry(f"the server offers {total} bytes, the published file has {file.size}")
    return total


def _copy(
    response: http.client.HTTPResponse,
    out: IO[bytes],
    total: int | None,
    transfer: Transfer,
    report: Callable[[int], object],
) -> None:
    """Write the response's body to `out`. Raises _Retry when it ends early, is too long, or stalls."""
    size = out.tell()
    window_start, window_size = time.monotonic(), size
    while True:
        try:
            chunk = response.read1(CHUNK_BYTES)  # what has arrived: `read` would wait through a trickle
        except (OSError, http.client.HTTPException) as error:
            raise _Retry(f"the connection broke after {size:,} bytes ({error or type(error).__name__})") from error
        if not chunk:
            break
        size += len(chunk)
        if total is not None and size > total:
            raise _Retry(f"the server sent more than the {total} bytes it announced")
        out.write(chunk)
        report(size)
        now = time.monotonic()
        if now - window_start > transfer.stall_seconds:
            if size - window_size < transfer.stall_bytes:
                raise _Retry(f"the connection stalled after {size:,} bytes")
            window_start, window_size = now, size
    if total is not None and size < total:
        raise _Retry(f"the connection was cut after {size:,} of {total:,} bytes")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
