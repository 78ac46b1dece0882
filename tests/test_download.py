"""The downloader against a server that cuts, stalls, lies and redirects: right bytes under the final name, or none."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import shutil
import socket
import tarfile
import threading
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from harness import archives, download
from harness.contracts import HarnessError, PublishedFile

CONTENT = random.Random(0).randbytes(700_000)
FAST = download.Transfer(attempts=4, stall_seconds=0.4, backoff_seconds=0.01, allow_http_loopback=True)
ONCE = replace(FAST, attempts=1, max_requests=1)


def published(url: str | None, content: bytes = CONTENT, size: int | None = -1) -> PublishedFile:
    digests = {"sha256": hashlib.sha256(content).hexdigest()}
    return PublishedFile("set/file.bin", digests, len(content) if size == -1 else size, url)


def fetch(server: object, target: Path, transfer: download.Transfer = FAST, **options: object) -> Path:
    return download.download(published(server.url, **options), target, transfer)  # type: ignore[attr-defined]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "data" / "set" / "file.bin"


def nothing_left(target: Path) -> bool:
    return not target.parent.exists() or not any(target.parent.iterdir())


def test_arrives_whole_and_reports_progress(file_server: ModuleType, target: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    with file_server.serving(CONTENT) as server:
        file = published(server.url)
        assert download.download(file, target, FAST, lambda *step: seen.append(step)) == target
        assert target.read_bytes() == CONTENT
        assert [path.name for path in target.parent.iterdir()] == ["file.bin"]
        assert seen[-1] == ("set/file.bin", len(CONTENT), len(CONTENT))
        assert [size for _, size, _ in seen] == sorted(size for _, size, _ in seen)
        download.download(file, target, FAST)  # there already: nothing is asked of the server
        assert len(server.requests) == 1


@pytest.mark.parametrize("seed", range(6))
def test_cuts_at_random_bytes_are_resumed(file_server: ModuleType, target: Path, seed: int) -> None:
    chance = random.Random(seed)
    cuts = [file_server.Answer(cut=chance.randrange(1, 150_000)) for _ in range(6)]
    with file_server.serving(CONTENT, *cuts, file_server.Answer()) as server:
        fetch(server, target)
    assert target.read_bytes() == CONTENT
    expected, at = [None], 0
    for answer in cuts:
        at += answer.cut
        expected.append(f"bytes={at}-")
    assert server.requests == expected[: len(server.requests)], "each request starts where the last one was cut"


def test_a_cut_is_resumed_by_the_next_process(file_server: ModuleType, target: Path) -> None:
    with file_server.serving(CONTENT, file_server.Answer(cut=300_000), file_server.Answer()) as server:
        with pytest.raises(HarnessError, match=r"incomplete|cut after"):
            fetch(server, target, ONCE)
        assert not target.exists()
        fetch(server, target, ONCE)
        assert target.read_bytes() == CONTENT
        assert server.requests == [None, "bytes=300000-"]


def test_a_damaged_partial_file_is_found_out(file_server: ModuleType, target: Path) -> None:
    with file_server.serving(CONTENT, file_server.Answer(cut=300_000), file_server.Answer()) as server:
        with pytest.raises(HarnessError):
            fetch(server, target, ONCE)
        (part,) = target.parent.iterdir()
        part.write_bytes(b"x" * 1000 + part.read_bytes()[1000:])
        fetch(server, target)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("length", [700_000, 900_000])
def test_a_partial_file_of_full_length_or_longer_is_replaced(
    file_server: ModuleType, target: Path, length: int
) -> None:
    with file_server.serving(CONTENT, file_server.Answer(cut=10)) as server, pytest.raises(HarnessError):
        fetch(server, target, ONCE)
    (part,) = target.parent.iterdir()
    part.write_bytes(bytes(length))
    with file_server.serving(CONTENT) as server:
        fetch(server, target)
    assert target.read_bytes() == CONTENT


def test_a_server_that_ignores_range_starts_again(file_server: ModuleType, target: Path) -> None:
    answers = [file_server.Answer(cut=400_000), file_server.Answer(ranges=False)]
    with file_server.serving(CONTENT, *answers) as server:
        fetch(server, target)
        assert server.requests == [None, "bytes=400000-"]
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("fault", [
    {"status": 500}, {"status": 503}, {"status": 429}, {"announce": 800_000}, {"announce": 10}, {"stall": 1.0},
    {"content": bytes(700_000)}, {"content": CONTENT + b"more"}, {"content": b""}, {"cut": 0},
    {"content": CONTENT[:-1] + b"?"}, {"length": False, "cut": 5},
])  # fmt: skip
def test_one_fault_is_survived_and_a_lasting_one_leaves_nothing(
    file_server: ModuleType, target: Path, fault: dict[str, object]
) -> None:
    answer = file_server.Answer(**fault)
    with file_server.serving(CONTENT, answer, file_server.Answer()) as server:
        fetch(server, target)
        assert target.read_bytes() == CONTENT
    shutil.rmtree(target.parent)
    with file_server.serving(CONTENT, answer) as server, pytest.raises(HarnessError) as caught:
        fetch(server, target, replace(FAST, attempts=2, max_requests=5, stall_seconds=0.2))
    assert not target.exists()
    assert "\n" not in str(caught.value) and str(target) in str(caught.value) and server.url in str(caught.value)


@pytest.mark.parametrize("fault", [{"range_start": 0}, {"status": 416}])
def test_faults_in_ranges(file_server: ModuleType, target: Path, fault: dict[str, object]) -> None:
    answers = [file_server.Answer(cut=400_000), file_server.Answer(**fault), file_server.Answer()]
    with file_server.serving(CONTENT, *answers) as server:
        fetch(server, target)
        assert target.read_bytes() == CONTENT
        assert server.requests[2] == (None if fault == {"status": 416} else "bytes=400000-")


def test_another_range_than_asked_for_is_not_appended(file_server: ModuleType, target: Path) -> None:
    answers = [file_server.Answer(cut=400_000), file_server.Answer(range_start=0), file_server.Answer()]
    with file_server.serving(CONTENT, *answers) as server:
        fetch(server, target, size=None)  # no size to give the mistake away
        assert server.requests == [None, "bytes=400000-", "bytes=400000-"]
    assert target.read_bytes() == CONTENT


def test_a_file_that_changed_between_cut_and_resume(file_server: ModuleType, target: Path) -> None:
    other = bytes(len(CONTENT))
    answers = [file_server.Answer(cut=400_000, content=other), file_server.Answer(), file_server.Answer()]
    with file_server.serving(CONTENT, *answers) as server:
        fetch(server, target)
        assert server.requests == [None, "bytes=400000-", None]
    assert target.read_bytes() == CONTENT


def test_a_trickle_counts_as_a_stall(file_server: ModuleType, target: Path) -> None:
    answers = [file_server.Answer(trickle=0.05), file_server.Answer()]
    with file_server.serving(CONTENT, *answers) as server:
        fetch(server, target)
        assert len(server.requests) == 2
    assert target.read_bytes() == CONTENT


def test_without_a_published_size_the_digest_still_decides(file_server: ModuleType, target: Path) -> None:
    answers = [file_server.Answer(length=False, cut=1000), file_server.Answer(length=False)]
    with file_server.serving(CONTENT, *answers) as server:
        fetch(server, target, size=None)
        assert target.read_bytes() == CONTENT
    with file_server.serving(bytes(100)) as server, pytest.raises(HarnessError, match="not the published file"):
        fetch(server, target.with_name("other.bin"), size=None)
    assert [path.name for path in target.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("where", ["http://publisher.invalid/file.bin", "ftp://127.0.0.1/f", "file:///etc/passwd"])
def test_redirects_away_from_https_are_refused(file_server: ModuleType, target: Path, where: str) -> None:
    with file_server.serving(CONTENT, file_server.Answer(location=where)) as server:
        with pytest.raises(HarnessError, match=r"only https|answered 302"):
            fetch(server, target)
        assert len(server.requests) == 1, "there is nothing to retry"
    assert nothing_left(target)


def test_a_redirect_is_followed_and_a_loop_is_not(file_server: ModuleType, target: Path) -> None:
    with file_server.serving(CONTENT) as there:
        with file_server.serving(b"", file_server.Answer(location=there.url)) as here:
            fetch(here, target)
        assert target.read_bytes() == CONTENT
    target.unlink()
    with file_server.serving(b"", file_server.Answer(location="/file.bin")) as server, pytest.raises(HarnessError):
        fetch(server, target, ONCE)
    assert nothing_left(target)


def test_https_never_redirects_to_http_even_where_loopback_is_allowed() -> None:
    redirects = download._Redirects(FAST)
    request = urllib.request.Request("https://publisher.invalid/file.bin")
    with pytest.raises(download._GiveUp, match="from https"):
        redirects.redirect_request(request, io.BytesIO(), 302, "", {}, "http://127.0.0.1/file.bin")  # type: ignore[arg-type]
    assert redirects.redirect_request(request, io.BytesIO(), 302, "", {}, "https://mirror.invalid/f")  # type: ignore[arg-type]


@pytest.mark.parametrize("url", ["http://publisher.invalid/f", "http://127.0.0.1:9/f", "ftp://publisher.invalid/f",
                                 "file:///etc/passwd", "data:,x"])  # fmt: skip
def test_only_https_is_used_unless_allowed(target: Path, url: str) -> None:
    with pytest.raises(HarnessError, match="only https"):
        download.download(published(url), target)
    assert nothing_left(target)


def test_gone_is_not_retried(file_server: ModuleType, target: Path) -> None:
    with file_server.serving(CONTENT, file_server.Answer(status=404)) as server:
        with pytest.raises(HarnessError, match=r"404; put that file at"):
            fetch(server, target)
        assert len(server.requests) == 1
    assert nothing_left(target)


def test_unreachable_says_which_file_to_put_where(target: Path) -> None:
    with socket.socket() as unused:  # bound, never listening: refused at once
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file.bin"
        with pytest.raises(HarnessError) as caught:
            download.download(published(url), target, FAST)
    message = str(caught.value)
    assert url in message and str(target) in message and "unreachable" in message and "\n" not in message
    assert nothing_left(target)


def test_a_wrong_file_under_the_final_name_is_replaced_only_by_the_right_one(
    file_server: ModuleType, target: Path
) -> None:
    target.parent.mkdir(parents=True)
    target.write_bytes(b"mine")
    with file_server.serving(CONTENT, file_server.Answer(status=404)) as server, pytest.raises(HarnessError):
        fetch(server, target)
    assert target.read_bytes() == b"mine"
    with file_server.serving(CONTENT) as server:
        fetch(server, target)
    assert target.read_bytes() == CONTENT


def test_two_at_once_do_not_mix_their_bytes(file_server: ModuleType, target: Path) -> None:
    slow = [file_server.Answer(stall=0.2), file_server.Answer(stall=0.2), file_server.Answer()]
    errors: list[BaseException] = []

    def run() -> None:
        try:
            fetch(server, target)
        except BaseException as error:
            errors.append(error)

    with file_server.serving(CONTENT, *slow) as server:
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors and target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == ["file.bin"]


def test_no_room_is_said_before_anything_is_written(
    file_server: ModuleType, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with file_server.serving(CONTENT) as server, pytest.raises(HarnessError) as caught:
        fetch(server, target)
    assert str(target) in str(caught.value) and "700,000" in str(caught.value) and "1,000 are free" in str(caught.value)
    assert nothing_left(target)


def test_a_disk_that_fills_up_on_the_way_keeps_no_partial(
    file_server: ModuleType, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download.os, "fsync", full)
    with file_server.serving(CONTENT) as server, pytest.raises(HarnessError, match=r"disk full: .* needs 700,000"):
        fetch(server, target)
    assert nothing_left(target)


def test_digest_algorithms(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    md5, sha256 = "900150983cd24fb0d6963f7d28e17f72", hashlib.sha256(b"abc").hexdigest()
    assert download.is_published(path, PublishedFile("f", {"md5": md5.upper()}))
    assert not download.is_published(path, PublishedFile("f", {"md5": md5}, size=4))
    assert not download.is_published(path, PublishedFile("f", {"md5": md5, "sha256": "0" * 64}))
    assert download.is_published(path, PublishedFile("f", {"md5": "0" * 32, "sha256": sha256}))
    assert not download.is_published(path, PublishedFile("f")), "nothing published, nothing to be equal to"


# ------------------------------------------------------------------------------------------------------- archives


def member(content: bytes) -> PublishedFile:
    return PublishedFile("a/x", {"sha256": hashlib.sha256(content).hexdigest()}, len(content))


def pack(path: Path, entries: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as tape:
        for info, content in entries:
            info.size = len(content)
            tape.addfile(info, io.BytesIO(content))
    return path


def link(name: str, kind: bytes, to: str) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info, b""


def test_only_the_named_members_are_unpacked(tmp_path: Path) -> None:
    entries = [
        (tarfile.TarInfo("../outside"), b"evil"), (tarfile.TarInfo("/tmp/absolute"), b"evil"),
        link("a/link", tarfile.SYMTYPE, "/etc/passwd"), link("a/device", tarfile.CHRTYPE, ""),
        (tarfile.TarInfo("./a/x"), b"good"), (tarfile.TarInfo("a/x"), b"evil"), (tarfile.TarInfo("a/other"), b"-"),
    ]  # fmt: skip
    (tmp_path / "in").mkdir()
    archive = pack(tmp_path / "in" / "a.tar.gz", entries)
    out = tmp_path / "out"
    assert archives.extract(archive, {"a/x": (member(b"good"), out / "x")}) == [out / "x"]
    assert (out / "x").read_bytes() == b"good"
    everything = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert everything == {"in", "in/a.tar.gz", "out", "out/x"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_a_member_that_is_no_file_is_missing(tmp_path: Path, kind: bytes) -> None:
    archive = pack(tmp_path / "a.tar.gz", [link("a/x", kind, "../../etc/passwd")])
    with pytest.raises(HarnessError, match="does not hold a/x"):
        archives.extract(archive, {"a/x": (PublishedFile("a/x"), tmp_path / "out" / "x")})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"evil", b"longer than good"])
def test_a_member_with_other_bytes_is_refused(tmp_path: Path, content: bytes) -> None:
    archive = pack(tmp_path / "a.tar.gz", [(tarfile.TarInfo("a/x"), content)])
    with pytest.raises(HarnessError, match=r"a/x (is not the published file|has 16 bytes)"):
        archives.extract(archive, {"a/x": (member(b"good"), tmp_path / "out" / "x")})
    assert not any((tmp_path / "out").glob("*"))


def test_a_cut_archive_is_broken_and_leaves_no_file(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(50_000)
    archive = pack(tmp_path / "a.tar.gz", [(tarfile.TarInfo("a/x"), content)])
    whole = archive.read_bytes()
    for cut in (0, 10, 1000, 40_000):
        archive.write_bytes(whole[:cut])
        with pytest.raises(HarnessError, match=r"is broken|does not hold"):
            archives.extract(archive, {"a/x": (member(content), tmp_path / "out" / "x")})
        assert not any((tmp_path / "out").glob("*"))


def test_zip_members(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as bundle:
        bundle.writestr("../outside", b"evil")
        symlink = zipfile.ZipInfo("a/link")
        symlink.external_attr = 0o120777 << 16
        bundle.writestr(symlink, b"/etc/passwd")
        bundle.writestr("a/x", b"good")
    out = tmp_path / "out"
    archives.extract(archive, {"a/x": (member(b"good"), out / "x")})
    assert (out / "x").read_bytes() == b"good" and [p.name for p in out.iterdir()] == ["x"]
    with pytest.raises(HarnessError, match="does not hold a/link"):
        archives.extract(archive, {"a/link": (PublishedFile("a/link"), out / "link")})
