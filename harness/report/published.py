"""Published numbers for a data set, read from results/reference/*.csv: shown beside ours, never averaged with them."""

from __future__ import annotations

import csv
import re
from functools import cache
from pathlib import Path

import harness
from harness.report.boards import Published

# how the sources say that the reported epoch is the best one of the test set
BEST_ON_TEST = re.compile(r"best (\w+ )?over (all epochs|training)", re.IGNORECASE)
FIELDS = ("method", "metric", "value", "protocol", "source", "year", "backbone", "pretrain_data", "pretrain_epochs",
          "note")  # fmt: skip


@cache
def of(dataset: str) -> tuple[Published, ...]:
    """Every published number whose file is about `dataset`: its name stands between underscores in the file's name."""
    named = re.compile(rf"(^|_){re.escape(dataset)}(_|$)")
    # inside the package when installed, beside it in a checkout
    folders = [folder for root in harness.__path__ if (folder := Path(root) / "results" / "reference").is_dir()]
    return tuple(
        number
        for folder in folders[:1]
        for file in sorted(folder.glob("*.csv"))
        if named.search(file.stem)
        for number in _read(file)
    )


def _read(file: Path) -> list[Published]:
    with file.open(encoding="utf-8", newline="") as lines:
        return [_number(line) for line in csv.DictReader(lines)]


def _number(line: dict[str, str]) -> Published:
    best = bool(BEST_ON_TEST.search(f"{line['protocol']} {line['note']}"))
    return Published(**{name: line[name] for name in FIELDS}, deviation=line["stddev"], best_epoch_on_test=best)
