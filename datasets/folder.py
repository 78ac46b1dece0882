"""Your own images: `--dataset folder:PATH`, with train/ (one folder per class), optional test/ and unlabeled/.

    PATH/train/cat/a.jpg   PATH/train/dog/2019/b.png   PATH/test/cat/c.jpg   PATH/unlabeled/any/where/d.webp

Folders are searched to any depth and images taken in the order of their paths; hidden files and files without an image
suffix are passed over. Images of any size become squares of `--image-size` (default: the median short side, at most
96): short side scaled, centre kept, antialiased. If every image of train/ and unlabeled/ is grey, there is one channel.
Trees that decode to more than memory holds are decoded once, into a file below the data folder.
Without train/ there are no labels, without test/ no test rows. Every problem file is named before any work begins.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from harness import decoding, images, mapped
from harness.contracts import Dataset, DatasetInfo, FileReport, HarnessError, Split
from harness.images import shown

SPLITS = ("unlabeled", "train", "test")
MAX_DEFAULT_SIDE = 96
MAX_SIDE = 1024
NAMED_PROBLEMS = 5
DECODED = "decoded"  # below the data folder: pixels of trees that are larger than memory


@dataclass(frozen=True)
class _Listing:
    """The files of one split, in order, with their labels (-1: in no class); {name: what is wrong with it}."""

    files: tuple[Path, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...]
    problems: dict[str, str]


class Folder(Dataset):
    """A folder of images of your own."""

    name = "folder"
    title = "Folder of images"
    licence = "as stated by the owner of the images"
    citation = "local images"
    default_encoder = "convnet_small"
    mirror_keeps_label = True
    takes_argument = True

    def __init__(self, root: Path, image_size: int | None = None, argument: str | None = None) -> None:
        super().__init__(root, image_size, argument)
        if not argument:
            raise HarnessError("folder needs a path: write --dataset folder:PATH")
        if image_size is not None and not 1 <= image_size <= MAX_SIDE:
            raise HarnessError(f"--image-size {image_size}: folder takes 1 to {MAX_SIDE} pixels")
        self.path = Path(argument).expanduser()
        self._listings: dict[str, _Listing] | None = None
        self._surveyed: tuple[int, bool, dict[Path, str]] | None = None
        self._groups: dict[tuple[str, ...], tuple[dict[str, Split], dict[str, str]]] = {}
        self._info: DatasetInfo | None = None

    # ---- the Dataset contract

    @property
    def info(self) -> DatasetInfo:
        """Facts of the folder (cached). Lists test/ but opens none of its images. Raises HarnessError on problems."""
        if self._info is None:
            listings = self._listed()
            basis = self.split("train" if "train" in listings else "unlabeled")
            mean, std = images.channel_statistics(basis.images)
            channels, side = basis.images.shape[1:3]
            self._info = DatasetInfo(
                name=self.name, title=self.title, classes=listings["train"].classes if "train" in listings else None,
                image_size=(side, side), channels=channels, mean=mean, std=std,
                counts={name: len(listing.files) for name, listing in listings.items()}, licence=self.licence,
                citation=self.citation, default_encoder=self.default_encoder,
                pretrain_split="+".join(name for name in listings if name != "test"),
                mirror_keeps_label=self.mirror_keeps_label,
            )  # fmt: skip
        return self._info

    def split(self, name: str) -> Split:
        """Decode a split (cached), uint8 (N, C, S, S). Raises HarnessError naming files that cannot be used.

        train/ and unlabeled/ are read together, so that everything wrong with either is said at once.
        """
        listings = self._listed()
        if name not in listings:
            raise HarnessError(f"data set folder has no split {name!r}; {shown(self.path)} has {', '.join(listings)}")
        splits, wrong = self._read(self._group(name))
        self._refuse(wrong)
        return splits[name]

    def verify(self) -> list[FileReport]:
        """Decode every image of every split; one line per split, and one per file that cannot be used."""
        listings = self._listed()
        wrong = {file: reason for name in listings for file, reason in self._read(self._group(name))[1].items()}
        reports = [FileReport(name, "broken", reason) for name, reason in sorted(wrong.items())]
        for name, listing in listings.items():
            readable = sum(self._name(file) not in wrong for file in listing.files)
            reports.append(FileReport(f"{name}/", "readable, not the published file", f"{readable:,} images"))
        return reports

    def test_files(self) -> tuple[Path, ...]:
        listing = self._listed().get("test")
        return () if listing is None else listing.files

    def verified(self, split_expression: str) -> bool:
        """False: nobody has published digests of these files."""
        return False

    # ---- reading

    def _group(self, name: str) -> tuple[str, ...]:
        """The splits that are decoded together with this one."""
        return ("test",) if name == "test" else tuple(other for other in self._listed() if other != "test")

    def _read(self, names: tuple[str, ...]) -> tuple[dict[str, Split], dict[str, str]]:
        """Decode splits into one memory, in order (cached): ({name: split}, {file or folder: what is wrong with it})."""
        if names not in self._groups:
            listings = self._listed()
            wrong = {name: reason for listing in listings.values() for name, reason in listing.problems.items()}
            side, grey, unreadable = self._survey()
            files = [file for name in names for file in listings[name].files if file not in unreadable]
            pixels, more = self._decode(files, side, grey, "+".join(names))
            wrong |= {self._name(file): reason for file, reason in (unreadable | more).items()}
            splits: dict[str, Split] = {}
            start = 0
            for name in names if pixels is not None and not wrong else ():
                labels, count = listings[name].labels, len(listings[name].files)
                splits[name] = Split(pixels[start : start + count], None if labels is None else torch.tensor(labels))
                start += count
            self._groups[names] = splits, wrong
        return self._groups[names]

    def _decode(
        self, files: list[Path], side: int, grey: bool, splits: str
    ) -> tuple[torch.Tensor | None, dict[Path, str]]:
        """(N, C, side, side) uint8 in memory if that holds them, else in a file below the data folder."""
        if mapped.fits_in_memory(len(files) * side * side * (1 if grey else 3)):
            pixels, wrong = images.read_images(files, side, grey)
            return images.as_split(pixels, None).images, wrong
        return decoding.decode_to_file(files, side, grey, self.root / DECODED, f"{self.path.absolute()}\n{splits}")

    def _survey(self) -> tuple[int, bool, dict[Path, str]]:
        """(side of the square images, whether all are grey, unusable files), from the headers of train/ and unlabeled/.

        test/ has no say: a colour image there is turned grey where the rest is grey.
        """
        if self._surveyed is None:
            listings = self._listed()
            files = [file for name, listing in listings.items() if name != "test" for file in listing.files]
            facts, wrong = images.inspect_images(files)
            sides = [fact.short_side for fact in facts.values()] or [MAX_DEFAULT_SIDE]
            side = self.image_size or min(int(statistics.median_low(sides)), MAX_DEFAULT_SIDE)
            self._surveyed = side, all(fact.grey for fact in facts.values()), wrong
        return self._surveyed

    def _refuse(self, wrong: dict[str, str]) -> None:
        """Raise HarnessError with the first few names and the count, if anything is wrong."""
        if wrong:
            named = [f"{name} ({reason})" for name, reason in sorted(wrong.items())]
            raise HarnessError(
                f"folder: {len(named)} under {shown(self.path)} cannot be used: {'; '.join(named[:NAMED_PROBLEMS])}"
                f"{'; ...' if len(named) > NAMED_PROBLEMS else ''}: mend or remove them"
            )

    def _name(self, path: Path) -> str:
        """A file's name below the folder, fit for printing."""
        return shown(path.relative_to(self.path).as_posix())

    # ---- listing

    def _listed(self) -> dict[str, _Listing]:
        """{split: listing} in the order unlabeled, train, test (cached). Raises HarnessError where they do not fit."""
        if self._listings is None:
            if not self.path.is_dir():
                raise HarnessError(f"folder: {shown(self.path)} is not a folder")
            try:
                found = {name: self._list(name) for name in SPLITS}
            except OSError as error:
                raise HarnessError(f"folder: cannot list {shown(error.filename)}: {error.strerror}") from error
            listings = {name: listing for name, listing in found.items() if listing is not None}
            self._check_splits(listings)
            self._listings = listings
        return self._listings

    def _list(self, name: str) -> _Listing | None:
        """Walk one of the three folders; None if it is not there."""
        top = self.path / name
        if not top.is_dir():
            return None
        if not _inside(top, self.path):
            return _Listing((), None, (), {name: "a link out of the folder"})
        wrong: dict[str, str] = {}
        files = sorted(self._walk(top, wrong), key=lambda file: file.relative_to(self.path).as_posix())
        if name == "unlabeled":
            return _Listing(tuple(files), None, (), wrong)
        classes = sorted(child.name for child in top.iterdir() if child.is_dir() and not child.name.startswith("."))
        class_of = [file.relative_to(top).parts[0] for file in files]
        used = set(class_of)
        for file in files:
            if file.parent == top:
                wrong[self._name(file)] = "not in a class folder"
        for class_name in classes:
            if not class_name.isprintable():  # it would reach terminals, tables and pages
                wrong[shown(f"{name}/{class_name}")] = "unprintable characters in the name of a class"
            elif class_name not in used and shown(f"{name}/{class_name}") not in wrong:
                wrong[f"{name}/{class_name}"] = "a class folder without images"
        label_of = {class_name: label for label, class_name in enumerate(classes)}
        return _Listing(tuple(files), tuple(label_of.get(c, -1) for c in class_of), tuple(classes), wrong)

    def _walk(self, folder: Path, wrong: dict[str, str]) -> Iterator[Path]:
        """Image files below `folder`; links that lead out, nowhere or to folders go into `wrong`."""
        for path in folder.iterdir():
            if path.name.startswith("."):
                continue
            image = path.suffix.lower() in images.FORMAT_OF_SUFFIX
            if path.is_symlink() and (image or path.is_dir()):
                if not _inside(path, self.path):
                    wrong[self._name(path)] = "a link out of the folder"
                elif not path.is_file():  # to a folder: it could lead to itself, or bring the same images in twice
                    wrong[self._name(path)] = "a link to a folder" if path.is_dir() else "a link to nothing"
                else:
                    yield path
            elif path.is_dir():
                yield from self._walk(path, wrong)
            elif image:
                yield path

    def _check_splits(self, listings: dict[str, _Listing]) -> None:
        """Raise HarnessError unless the splits that are there can be used together; give test/ the labels of train/."""
        where = shown(self.path)
        if "train" not in listings and "unlabeled" not in listings:
            raise HarnessError(
                f"folder: {where} has neither train/ nor unlabeled/: put images into train/CLASS/, or into unlabeled/ "
                "if they have no labels"
            )
        for name, listing in listings.items():
            if not listing.files:
                self._refuse(listing.problems)
                raise HarnessError(f"folder: {where}/{name} holds no images ({' '.join(images.FORMAT_OF_SUFFIX)})")
        if "test" in listings:
            test = listings["test"]
            known = listings["train"].classes if "train" in listings else ()
            strange = [shown(f"test/{name}") for name in test.classes if name not in known]
            if strange:
                self._refuse(dict.fromkeys(strange, "a class that train/ does not have"))
            position = {label: known.index(name) for label, name in enumerate(test.classes)}
            labels = tuple(position.get(label, -1) for label in test.labels or ())
            listings["test"] = replace(test, labels=labels)


def _inside(path: Path, folder: Path) -> bool:
    """Whether `path`, links followed, lies in `folder`, links followed."""
    return path.resolve().is_relative_to(folder.resolve())
