"""What pruning saves: the same search with and without a pruner, epochs used and best value side by side.

    python benchmarks/pruning.py --data-dir DIR [--dataset fashion_mnist] [--method sc] [--trials 12] [--epochs 9]
                                 [--pruner asha] [--first 0] [--studies 3] [--labels 1000] [--workspace DIR]

Both searches draw the same settings (quasi-random, by study and trial number) and train on real data by recipe `quick`,
for more epochs, so that there are rungs. Epochs are of pretraining, over all trials. `best` is the validation
value of the best trial. Repeated over several studies, which draw other settings.

--replay trains every trial to its end instead, with a probe after every epoch, and lets `asha` judge them in 300 random
orders, with looks after other epochs than its own too: what each choice of looks saves and loses, whatever comes first.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, pstdev
from unittest import mock

import optuna

from harness import search, tuning
from harness.arms import Request
from harness.config import load_recipe
from harness.search import Asked, Result, make_searches
from harness.search_workers import work

ORDERS = 300


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


def probed(words: argparse.Namespace, workspace: Path, study: str) -> list[tuple[dict[int, float], float]]:
    """Every completed trial's probes by epoch and its value: a search that looks after every epoch and prunes nothing."""
    every = mock.patch.object(tuning, "rungs", lambda search, epochs: tuple(range(1, epochs)))
    nothing = mock.patch.object(tuning, "_make_pruner", lambda search: optuna.pruners.NopPruner())
    with every, nothing:
        records = searched(words, workspace / "probed", study, "asha").records
    return [(dict(one.intermediate), one.values[0]) for one in records if one.state == "COMPLETE" and one.values]


def judged(trials: Sequence[tuple[dict[int, float], float]], looks: Sequence[int], epochs: int) -> tuple[float, float]:
    """`asha` over these trials, one after the other: share of the epochs, and what the best one loses."""
    study = optuna.create_study(direction="maximize", pruner=tuning._BetterHalf())
    used, found = 0, []
    for probes, value in trials:
        trial = study.ask()
        for epoch in looks:
            trial.report(probes[epoch], epoch)
            if trial.should_prune():
                used += epoch
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            used += epochs
            found.append(value)
            study.tell(trial, value)
    return used / (epochs * len(trials)), max(value for _, value in trials) - max(found)


def replay(words: argparse.Namespace, workspace: Path) -> None:
    """One table per study: sets of looks, in the trials' own order and in random ones."""
    own = tuning.asha_looks(words.epochs)
    quarter, half = own[0], own[-1]
    choices = [(quarter,), (half,), (1, half), (quarter, half), own, (*own, round(2 * words.epochs / 3))]
    for number in range(words.first, words.first + words.studies):
        trials = probed(words, workspace, f"pruning-{number}")
        print(f"\nstudy {number}, {len(trials)} trials; asha looks after {own}\n{'looks':>14} {'share':>6} {'lost':>7} "
              f"{'any order: share':>17} {'deviation':>10} {'lost':>7} {'at most':>8}", flush=True)  # fmt: skip
        for looks in dict.fromkeys(choices):
            shuffled = [random.Random(turn).sample(trials, len(trials)) for turn in range(ORDERS)]
            shares, lost = zip(*(judged(order, looks, words.epochs) for order in shuffled), strict=True)
            share, loss = judged(trials, looks, words.epochs)
            print(f"{','.join(map(str, looks)):>14} {share:>6.0%} {loss:>7.4f} {mean(shares):>17.0%} "
                  f"{pstdev(shares):>10.0%} {mean(lost):>7.4f} {max(lost):>8.4f}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (("--dataset", "fashion_mnist"), ("--method", "sc"), ("--pruner", "asha"), ("--labels", "1000"),
                          ("--objective", "linear_probe.gap.top1")):  # fmt: skip
        parser.add_argument(flag, default=default)
    for flag, number in (("--trials", 12), ("--epochs", 9), ("--first", 0), ("--studies", 3)):
        parser.add_argument(flag, type=int, default=number)
    parser.add_argument("--replay", action="store_true", help="judge fully trained trials in many orders instead")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--workspace", type=Path)
    words = parser.parse_args()
    workspace = words.workspace or Path(tempfile.mkdtemp(prefix="pruning-"))
    print(f"{words.method} on {words.dataset}, {words.trials} trials of {words.epochs} epochs, {words.labels} labels, "
          f"{words.objective}")  # fmt: skip
    if words.replay:
        return replay(words, workspace)
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
