"""Did a change of NUMBERS_VERSION change what is measured? Two sets of rows of the same study, paired by seed.

    python benchmarks/numbers_change.py BEFORE AFTER        # folders of row files, e.g. of two checkouts' results/studies

A difference is that of the same seed under both versions, in points of test top-1; beside it stands the standard deviation
over seeds before the change, which is what a change has to stay within to be called rounding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from harness import durable


def load(folder: Path) -> pd.DataFrame:
    """Test top-1 of every row file under a folder."""
    # the sealed rows alone: what is published leaves the predictions of single images out
    files = [durable.read_sealed(path) for path in sorted(folder.rglob("*.json"))]
    frame = pd.DataFrame([row for file in files if file is not None for row in file["rows"]])
    return frame[(frame.split == "test") & (frame.metric == "top1")]


def main() -> None:
    """Print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    chosen = parser.parse_args()
    before, after = load(chosen.before), load(chosen.after)
    key = ["dataset", "method", "evaluator", "readout", "seed"]
    both = before.merge(after, on=key, suffixes=("_before", "_after"), validate="1:1")
    versions = [sorted(set(frame.numbers_version)) for frame in (before, after)]
    print(f"NUMBERS_VERSION {versions[0]} to {versions[1]}, {len(both)} pairs, seeds {sorted(set(both.seed))}\n")
    print(
        "| data set | method | evaluation | before | after | mean difference (each seed) | s.d. over seeds before | within |"
    )
    print("|---|---|---|---|---|---|---|---|")
    outside = 0
    for names, group in both.groupby(key[:-1], dropna=False, sort=False):
        dataset, method, evaluator, readout = names
        group = group.sort_values("seed")
        difference = 100 * (group.value_after - group.value_before)
        noise = 100 * group.value_before.std(ddof=1)
        within = abs(difference.mean()) <= noise
        outside += not within
        each = ", ".join(f"{value:+.2f}" for value in difference)
        evaluation = f"{evaluator} {readout}" if isinstance(readout, str) else evaluator
        means = f"{100 * group.value_before.mean():.2f} | {100 * group.value_after.mean():.2f}"
        print(f"| {dataset} | {method} | {evaluation} | {means} "
              f"| {difference.mean():+.2f} ({each}) | {noise:.2f} | {'yes' if within else 'no'} |")  # fmt: skip
    print(
        f"\n{outside} of {both.groupby(key[:-1], dropna=False).ngroups} means moved by more than one standard deviation."
    )


if __name__ == "__main__":
    main()
