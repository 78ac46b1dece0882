"""Image files decoded once, by worker processes, into one file that is then mapped: for trees larger than memory.

The file is kept beside a sealed note of its SHA-256, under a key made of every image file's path, size and time of
change, the image size, and Pillow's version; a change of any of them decodes anew. Workers are processes of this
module, not of `multiprocessing`: that would run a caller's script without a `__main__` guard a second time, and a
decoder that dies on hostile bytes takes only its own process with it. Such a file is named like any other broken one.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import PIL
from torch import Tensor

import harness
from harness import durable, images
from harness.contracts import HarnessError
from harness.mapped import ABANDONED_SECONDS, open_pixels, reserve

VERSION = 1  # of how a file becomes pixels; a new one decodes every tree again
CHUNK_FILES = 64


def decode_to_file(
    files: Sequence[Path], side: int, grey: bool, folder: Path, tree: str
) -> tuple[Tensor | None, dict[Path, str]]:
    """Decode image files as `images.read_image` does: ((N, C, side, side) uint8, mapped; {file: why it cannot be used}).

    No images where any file cannot be used. folder: where decoded files are kept; tree: what these files are of all
    that is kept there: an earlier file of the same tree and size is removed. Raises HarnessError when there is no room.
    """
    channels = 1 if grey else 3
    size = len(files) * side * side * channels
    place = hashlib.sha256(f"{tree}\n{side}".encode(errors="surrogateescape")).hexdigest()[:12]
    path = folder / f"{place}-{_key(files, side, grey)}.pixels"
    note = path.with_suffix(".json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with durable.locked(folder / "decoding.lock"):  # others wait for the result instead of making it twice
            durable.sweep(folder, ABANDONED_SECONDS, time.time())
            if not _is_whole(path, note, size):
                wrong: dict[Path, str] = {}
                durable.write(path, lambda temporary: wrong.update(_decode(files, side, grey, temporary, size)))
                if wrong:
                    path.unlink()
                    return None, wrong
                durable.write_sealed(note, {"sha256": durable.sha256_file(path), "images": len(files)})
            for old in folder.glob(f"{place}-*"):
                if old not in (path, note):
                    old.unlink()
            return open_pixels(path, (len(files), side, side, channels)).permute(0, 3, 1, 2), {}
    except OSError as error:
        raise HarnessError(
            f"{len(files):,} images take {size:,} bytes decoded, too many for memory, and {images.shown(folder)} cannot "
            f"hold them ({error.strerror or error}); choose another --data-dir or a smaller --image-size"
        ) from error


def _key(files: Sequence[Path], side: int, grey: bool) -> str:
    digest = hashlib.sha256(f"{VERSION} {PIL.__version__} {side} {grey}\n".encode())
    for file in files:
        try:
            facts = os.stat(file)
        except OSError as error:
            raise HarnessError(
                f"{images.shown(file)} changed while it was read ({error.strerror}); run again"
            ) from None
        digest.update(os.fsencode(os.path.abspath(file)) + f"\0{facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


def _is_whole(path: Path, note: Path, size: int) -> bool:
    """Whether the file is there, byte for byte as it was written."""
    if not (path.is_file() and note.is_file() and path.stat().st_size == size):
        return False
    known = durable.read_sealed(note)
    return known is not None and durable.sha256_file(path) == known["sha256"]


def _decode(files: Sequence[Path], side: int, grey: bool, target: Path, size: int) -> dict[Path, str]:
    """Fill `target` with the pixels of all files, in order."""
    reserve(target, size)
    starts = range(0, len(files), CHUNK_FILES)
    workers = [_Worker(target, side, grey) for _ in range(min(os.cpu_count() or 1, images.MAX_THREADS, len(starts)))]
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def decode(start: int) -> dict[int, str]:
        worker = idle.get()
        try:
            return worker.decode(start, [os.fspath(file) for file in files[start : start + CHUNK_FILES]])
        finally:
            idle.put(worker)

    try:
        with ThreadPoolExecutor(len(workers)) as pool:
            return {files[i]: reason for part in pool.map(decode, starts) for i, reason in part.items()}
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """One process that decodes: started when first needed, and again when it dies."""

    def __init__(self, target: Path, side: int, grey: bool) -> None:
        self.words = [os.fspath(target), str(side), "grey" if grey else "colour"]
        self.process: subprocess.Popen[str] | None = None

    def decode(self, start: int, files: list[str]) -> dict[int, str]:
        """Decode files into positions from `start` on: {position: why its file cannot be used}.

        A process that dies is replaced and given the same files one by one, so that the one it died of is known.
        """
        wrong = self._ask(start, files)
        if wrong is None:
            wrong = {}
            for position, file in enumerate(files, start):
                alone = self._ask(position, [file])
                wrong |= {position: "its decoder crashed"} if alone is None else alone
        return wrong

    def _ask(self, start: int, files: list[str]) -> dict[int, str] | None:
        if self.process is None:
            self._start()
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps([start, files]) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer.endswith("\n"):
            self.stop()
            return None
        return {int(position): reason for position, reason in json.loads(answer).items()}

    def _start(self) -> None:
        """Start the process: in a session of its own, so that Ctrl-C reaches only us; it ends with its input."""
        home = os.fspath(Path(harness.__file__).parent.parent)
        paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "harness.decoding", *self.words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            code = self.process.wait()
            self.stop()
            raise HarnessError(f"a process that decodes images could not start (exit status {code})")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def _serve(target: str, side: int, grey: bool) -> None:
    """The worker: one line of JSON in, [first position, files]; one out, {position: why its file cannot be used}."""
    warnings.simplefilter("ignore")
    descriptor = os.open(target, os.O_WRONLY)
    print("ready", flush=True)
    for line in sys.stdin:
        start, files = json.loads(line)
        wrong = {}
        for position, file in enumerate(files, start):
            try:
                pixels = images.read_image(Path(file), side, grey)
                os.pwrite(descriptor, pixels.tobytes(), position * pixels.nbytes)
            except images.UnreadableImage as error:
                wrong[position] = str(error)
            except OSError as error:
                wrong[position] = f"its pixels cannot be written: {error.strerror or error}"
        print(json.dumps(wrong), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "grey")
