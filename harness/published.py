"""Data sets that are a list of published files: where the files are looked for, verified, fetched, and cached.

A subclass names its files and reads them; everything that could differ by accident between two such data sets (error
lines, states of files, when a digest is computed, what `fetch` leaves alone) is decided here once.
"""

from __future__ import annotations

import gzip
import zlib
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from harness import archives, download, images
from harness.contracts import Dataset, DatasetInfo, FileReport, HarnessError, PublishedFile, Split
from harness.images import shown


class BrokenFile(HarnessError):
    """A data file that does not hold what its format promises; the text names the file and the reason."""

    def __init__(self, path: Path, reason: object) -> None:
        self.reason = shown(reason)
        super().__init__(f"{shown(path)} is broken ({self.reason})")


class PublishedDataset(Dataset):
    """A data set of fixed image size whose files are published somewhere; subclasses say where and how to read them.

    folders: candidates under the data folder, best first ("": the data folder itself); the one that holds most of the
        files is used, the first of them if none holds any
    split_files: {split: file names inside that folder}; other_files: more of them that `verify` and `fetch` look after
    transfer, progress: how `fetch` downloads, and whom it tells; set them on the instance
    """

    classes: ClassVar[tuple[str, ...]]
    side: ClassVar[int]
    channels: ClassVar[int]
    folders: ClassVar[tuple[str, ...]]
    split_files: ClassVar[Mapping[str, tuple[str, ...]]]
    other_files: ClassVar[tuple[str, ...]] = ()
    transfer: download.Transfer = download.Transfer()
    progress: download.Progress | None = None

    def __init__(self, root: Path, image_size: int | None = None, argument: str | None = None) -> None:
        super().__init__(root, image_size, argument)
        if image_size not in (None, self.side):
            raise HarnessError(f"{self.name} has images of {self.side} pixels: leave out --image-size {image_size}")
        if argument is not None:
            raise HarnessError(f"{self.name} takes no argument: write --dataset {self.name}")
        self._splits: dict[str, Split] = {}
        self._info: DatasetInfo | None = None

    # ---- what a subclass answers

    @abstractmethod
    def read(self, split: str) -> Split:
        """Decode one split. Raises HarnessError naming a missing or broken file."""

    @abstractmethod
    def count(self, split: str) -> int:
        """Images in a split, without reading any image. Raises HarnessError or OSError when its files do not say."""

    def check(self, name: str, path: Path) -> None:
        """Raise BrokenFile unless the file called `name` can be read from `path`."""
        raise NotImplementedError

    # ---- where files are

    def folder(self) -> Path:
        """The folder that the files are read from."""
        names = self._data_files()
        candidates = [self.root / folder for folder in self.folders]
        present = [sum(self._variant(folder, name) is not None for name in names) for folder in candidates]
        return candidates[present.index(max(present))]

    def _data_files(self) -> list[str]:
        """Every file the data are read from, each once."""
        names = [name for split in self.split_files.values() for name in split]
        return list(dict.fromkeys([*names, *self.other_files]))

    def _variant(self, folder: Path, name: str) -> Path | None:
        """The file called `name` in `folder`, plain or gzipped, if it is there."""
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
        return None

    def locate(self, name: str) -> Path | None:
        """Path of a data file, or None if it is nowhere under the data folder."""
        return self._variant(self.folder(), name)

    def require(self, name: str) -> Path:
        """Path of a data file. Raises HarnessError saying which file to put where."""
        path = self.locate(name)
        if path is not None:
            return path
        source = self._source(name)
        where = shown(self._destination(source))
        raise HarnessError(
            f"{self.name}: {name} is missing: run `harness data fetch {self.name}`, or put {source.url} at {where}"
        )

    def _published(self, name: str) -> PublishedFile | None:
        """What is published about a file, by the last part of its name."""
        return next((file for file in self.published if Path(file.name).name == name), None)

    def _source(self, name: str) -> PublishedFile:
        """The published file to fetch in order to have `name`."""
        file = self._published(name)
        archive = next((other for other in self.published if file is not None and other.name == file.archive), file)
        assert archive is not None and archive.url is not None, f"{self.name}.published says nothing about {name}"
        return archive

    def _destination(self, source: PublishedFile) -> Path:
        """Where a fetched file belongs: archives in the data folder, single files inside the folder in use."""
        return self.root / source.name if ".tar" in source.name else self.folder() / Path(source.name).name

    def member_target(self, file: PublishedFile) -> Path:
        """Where a file out of an archive belongs: inside the folder in use."""
        return self.folder() / Path(file.name).name

    # ---- the Dataset contract

    @property
    def info(self) -> DatasetInfo:
        """Facts read from the files (cached). Opens `train` only; other splits are counted without their images.

        Every split the data set defines is in `counts`, with 0 where its files are missing or do not say: that is an
        error when the split is asked for, and disturbs nothing before.
        """
        if self._info is None:
            train = self.split("train")
            mean, std = images.channel_statistics(train.images)
            counts = {name: len(train) if name == "train" else self._count_or_zero(name) for name in self.split_files}
            self._info = DatasetInfo(
                name=self.name, title=self.title, classes=self.classes, image_size=(self.side, self.side),
                channels=self.channels, mean=mean, std=std, counts=counts, licence=self.licence, citation=self.citation,
                default_encoder=self.default_encoder, pretrain_split=self.pretrain_split,
                mirror_keeps_label=self.mirror_keeps_label,
            )  # fmt: skip
        return self._info

    def _count_or_zero(self, split: str) -> int:
        try:
            return self.count(split)
        except (HarnessError, OSError):
            return 0

    def split(self, name: str) -> Split:
        """Decode one split (cached). Raises HarnessError naming a split that is not there, or the file at fault."""
        if name not in self.split_files:
            raise HarnessError(f"data set {self.name} has no split {name!r}; it has {', '.join(self.split_files)}")
        if name not in self._splits:
            try:
                self._splits[name] = self.read(name)
            except BrokenFile as error:
                advice = f"delete it and run `harness data fetch {self.name}`"
                raise HarnessError(f"{self.name}: {error}: {advice}") from error
            except OSError as error:
                raise HarnessError(f"{self.name}: cannot read {shown(error.filename)}: {error.strerror}") from error
        return self._splits[name]

    def verify(self) -> list[FileReport]:
        """Report on every file of every split: digest first, then whether it can be read at all."""
        return [self._report(name) for name in self._data_files()]

    def _report(self, name: str) -> FileReport:
        path = self.locate(name)
        if path is None:
            source = self._source(name)
            return FileReport(name, "missing", f"put {source.url} at {shown(self._destination(source))}")
        place = path.relative_to(self.root).as_posix()
        try:
            if self.is_published(name, path):
                return FileReport(place, "published")
            self.check(name, path)
        except BrokenFile as error:
            return FileReport(place, "broken", error.reason)
        except OSError as error:
            return FileReport(place, "broken", f"cannot be read: {error.strerror or error}")
        published = self._published(name)
        known = published is not None and download.strongest(published) is not None
        return FileReport(place, "readable, not the published file", "" if known else "no digest of it is published")

    def is_published(self, name: str, path: Path) -> bool:
        """Whether `path` is the published file: byte for byte, or for a .gz its content."""
        plain, packed = self._published(name), self._published(f"{name}.gz")
        if path.suffix != ".gz":
            return plain is not None and download.is_published(path, plain)
        if packed is not None and download.is_published(path, packed):
            return True
        known = plain and download.strongest(plain)
        if not known:
            return False
        try:  # the same bytes packed again (some distributions do): what was unpacked decides
            with gzip.open(path) as stream:
                return download.digest_stream(stream, known[0]) == known[1]  # type: ignore[arg-type]
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise BrokenFile(path, error) from error

    def test_files(self) -> list[Path]:
        found = [self.locate(name) for name in self.split_files.get("test", ())]
        return [path for path in found if path is not None]

    def verified(self, split_expression: str) -> bool:
        """Whether every file behind these splits (`a+b`) is the published one; False if one is missing or broken."""
        for split in split_expression.split("+"):
            for name in self.split_files[split]:
                published = self._published(name)
                if published is None or download.strongest(published) is None:
                    continue  # STL-10's fold list: no digest of it is published anywhere
                path = self.locate(name)
                try:
                    if path is None or not self.is_published(name, path):
                        return False
                except (BrokenFile, OSError):
                    return False
        return True

    # ---- fetching

    def fetch(self, offline: bool = False) -> list[str]:
        """Download and unpack what is missing or broken; one line per source.

        Raises HarnessError, one line, saying which file to put where when it cannot be reached or `offline` is set.
        """
        return [self._fetch_source(source, offline) for source in self.published if source.url]

    def _fetch_source(self, source: PublishedFile, offline: bool) -> str:
        """Have everything that comes from one address."""
        names = [name for name in self._data_files() if self._source(name) is source]
        wanting = {name for name in names if self._report(name).state in ("missing", "broken")}
        if not wanting:
            return f"{source.name}: already there"
        target = self._destination(source)
        if not (target.is_file() and download.is_published(target, source)):
            if offline:
                raise HarnessError(f"{self.name}: offline, so nothing is fetched: put {source.url} at {shown(target)}")
            download.download(source, target, self.transfer, self.progress)
        if ".tar" in source.name:
            members = [(file, self.member_target(file)) for file in self.published if file.archive == source.name]
            archives.extract(target, {
                file.name: (file, place) for file, place in members if place.name in wanting or not place.is_file()
            })  # fmt: skip
        self._splits.clear()
        self._info = None
        return f"{source.name}: fetched and checked"
