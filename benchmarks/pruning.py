"""What pruning saves: the same search with and without a pruner, epochs used and best value side by side.

    python benchmarks/pruning.py --data-dir DIR [--dataset fashion_mnist] [--method sc] [--trials 12] [--epochs 9]
                                 [--pruner asha] [--first 0] [--studies 3] [--labels 1000] [--workspace DIR]

Both searches draw the same settings (quasi-random, by study and trial number) and train on real data by recipe `quick`,
for more epochs, so that there are rungs. Epochs are of pretraining, over all trials. `best` is the validation
value of the best trial. Repeated over several studies, which draw other settings.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from harness import search, tuning
from harness.arms import Request
from harness.config import load_recipe
from harness.search import Asked, Result, make_searches
from harness.search_workers import work


def searched(words: argparse.Namespace, workspace: Path, study: str, pruner: str) -> Result:
    """One search in a folder of its own, so that no run of the other is cached."""
    asked = Asked(
        (words.method,), words.dataset, words.dataset, words.trials, sampler="qmc", pruner=pruner, study=study,
        recipes=(load_recipe("quick"),), overrides={"epochs": words.epochs}, objectives=(words.objective,),
    )  # fmt: skip
    base = Request("", "", workspace=workspace / pruner, data_dir=words.data_dir, labels=words.labels, tracking="none",
                   offline=True)  # fmt: skip
    searches = make_searches(asked, base)
    for one in searches:
        tuning.prepare(one)
    work(searches, lambda message: None)
    return search.collect(searches[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (("--dataset", "fashion_mnist"), ("--method", "sc"), ("--pruner", "asha"), ("--labels", "1000"),
                          ("--objective", "linear_probe.gap.top1")):  # fmt: skip
        parser.add_argument(flag, default=default)
    for flag, number in (("--trials", 12), ("--epochs", 9), ("--first", 0), ("--studies", 3)):
        parser.add_argument(flag, type=int, default=number)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--workspace", type=Path)
    words = parser.parse_args()
    workspace = words.workspace or Path(tempfile.mkdtemp(prefix="pruning-"))
    print(f"{words.method} on {words.dataset}, {words.trials} trials of {words.epochs} epochs, {words.labels} labels, "
          f"{words.objective}")  # fmt: skip
    print(f"{'study':>6} {'epochs, none':>13} {f'epochs, {words.pruner}':>13} {'share':>6} {'best, none':>11} "
          f"{f'best, {words.pruner}':>11} {'difference':>11}", flush=True)  # fmt: skip
    for number in range(words.first, words.first + words.studies):
        results = {pruner: searched(words, workspace, f"pruning-{number}", pruner) for pruner in ("none", words.pruner)}
        epochs = [sum(t.attrs["epochs"] for t in result.records) for result in results.values()]
        best = [(result.records[result.best].values or (0.0,))[0] if result.best is not None else float("nan")
                for result in results.values()]  # fmt: skip
        print(f"{number:>6} {epochs[0]:>13} {epochs[1]:>13} {epochs[1] / epochs[0]:>6.0%} {best[0]:>11.4f} {best[1]:>11.4f} "
              f"{best[1] - best[0]:>+11.4f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
