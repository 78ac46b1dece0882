"""What a search found: `results/studies/<study>/tuning.json` as written by `harness tune`, and what may be concluded from it.

The expected best of n trials follows Dodge, Gururangan, Card, Schwartz & Smith, "Show Your Work", EMNLP 2019, section 3,
drawn without replacement (Tang et al., ACL 2020): n of the trials that were paid for, in any order. A pruned or failed
trial was paid for and gave no network, so it counts as the worst of the completed ones; leaving it out would flatter the
method that fails most. Values are those of the first objective; the larger is the better.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness import durable, registry, statistics
from harness.contracts import HarnessError

STATES = ("COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING")  # in Optuna's words
OVER = STATES[:3]
LEAST_FOR_IMPORTANCE = 10  # completed trials; harness.tuning.importances says why
POOR_AGREEMENT = 0.5  # Spearman's rank correlation of a rung with the end, below which a reader is warned


# -------------------------------------------------------------------------------------------------------------- files


def study_folder(workspace: Path, study: str) -> Path:
    return workspace / "results" / "studies" / study


def searches(workspace: Path) -> list[str]:
    """Names of the studies of a workspace that are searches."""
    return sorted(path.parent.name for path in (workspace / "results" / "studies").glob("*/tuning.json"))


def read_search(workspace: Path, study: str) -> dict[str, Any]:
    """tuning.json of a study (docs/tune.md lists its fields). Raises HarnessError where there is none, or it was changed."""
    path = study_folder(workspace, study) / "tuning.json"
    if study not in searches(workspace):
        raise unknown(study, searches(workspace), workspace)
    found = durable.read_sealed(path)
    if found is None:
        raise HarnessError(f"{path} is damaged; run its `harness tune` again to make it anew")
    return found


def unknown(study: str, known: Iterable[str], where: Path | str) -> HarnessError:
    """The one line for a study that is not there: near names, or that there is none."""
    known = list(known)
    hint = registry.near(study, known) if known else "make one with `harness tune`"
    return HarnessError(f"there is no search '{study}' in {where}; {hint}")


# ------------------------------------------------------------------------------------------------------------ content


@dataclass(frozen=True)
class Trial:
    """One trial. value: of the first objective, None unless it is complete; values: of all of them; probes: value of a
    probe by epochs done; seeds: what each validation seed came to; seconds: of the device"""

    number: int
    state: str
    value: float | None
    values: tuple[float, ...] | None
    params: Mapping[str, Any]
    probes: Mapping[int, float | None]
    seeds: Mapping[str, Sequence[float] | None]
    seconds: float
    epochs: int
    reason: str | None


@dataclass(frozen=True)
class Confirmed:
    """Default and tuned settings on seeds that chose nothing. default, tuned: {seed: value}; gap: tuned minus default over
    the seeds that both have, None without one"""

    dataset: str
    split: str
    default: Mapping[int, float]
    tuned: Mapping[int, float]
    gap: statistics.Paired | None

    @property
    def seeds(self) -> list[int]:
        """Those that both have."""
        return sorted(set(self.default) & set(self.tuned))

    def mean(self, kind: str) -> float:
        """Of `default` or `tuned`, over the seeds that both have."""
        values = self.default if kind == "default" else self.tuned
        return float(np.mean([values[seed] for seed in self.seeds]))


@dataclass(frozen=True)
class MethodSearch:
    """One method's part of a search. space: range of each varied setting, as plain values; winner: number of the trial that
    won on more seeds; rescored: {trial: its mean there}; binds: what ended it; importance: share of each setting, largest
    first, empty where nothing can be said; rank_agreement: {epochs: Spearman's correlation of the probe with the end}"""

    method: str
    trials: tuple[Trial, ...]
    space: Mapping[str, Mapping[str, Any]]
    pruner: str
    binds: str
    seconds: float
    epochs: int
    winner: int | None
    rescored: Mapping[int, float]
    importance: Mapping[str, float]
    rank_agreement: Mapping[int, float]
    pareto: tuple[int, ...]
    confirmed: Confirmed | None

    @property
    def complete(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.value is not None]

    @property
    def best(self) -> Trial | None:
        """The completed trial of the highest value; of equals the earlier one."""
        return max(self.complete, key=lambda trial: (trial.value, -trial.number), default=None)

    @property
    def counts(self) -> dict[str, int]:
        """How many trials are in each state."""
        return {state: sum(trial.state == state for trial in self.trials) for state in STATES}

    @property
    def failures(self) -> dict[str, int]:
        """How many trials failed for each reason, by its first word."""
        reasons = [(t.reason or "not said").partition(":")[0] for t in self.trials if t.state == "FAIL"]
        return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}

    @property
    def expected_best(self) -> list[float]:
        """Expected best value after 1, 2, ... of the trials that are over; empty where none is complete."""
        found = [trial.value for trial in self.complete if trial.value is not None]
        lost = sum(trial.state in OVER for trial in self.trials) - len(found)
        return expected_best([*found, *[min(found)] * lost]).tolist() if found else []

    @property
    def history(self) -> list[tuple[Trial, float | None]]:
        """(trial, best value up to it) of the trials that are over, by number."""
        best: float | None = None
        out = []
        for trial in self.trials:
            if trial.state in OVER:
                if trial.value is not None:
                    best = trial.value if best is None else max(best, trial.value)
                out.append((trial, best))
        return out

    @property
    def steps(self) -> list[Trial]:
        """The completed trials that were better than all before them."""
        seen: list[Trial] = []
        for trial in self.complete:
            if not seen or (trial.value or 0.0) > (seen[-1].value or 0.0):
                seen.append(trial)
        return seen


@dataclass(frozen=True)
class Study:
    """A search. dataset: what settings were chosen on; report_on: what they were judged on"""

    name: str
    dataset: str
    report_on: str
    labels: str
    objectives: tuple[str, ...]
    seeds: tuple[int, ...]
    sampler: str
    trials: int
    methods: tuple[MethodSearch, ...]

    @property
    def metric(self) -> str:
        """Of the first objective: `top1`."""
        return self.objectives[0].rpartition(".")[2]


def read(document: Mapping[str, Any]) -> Study:
    """The study that a tuning.json, or harness.live_studies, describes."""
    methods = tuple(_method(name, facts) for name, facts in document["methods"].items())
    return Study(document["study"], document["dataset"], document["report_on"], document["labels"],
                 tuple(document["objectives"]), tuple(document["seeds"]), document["sampler"], document["trials"],
                 methods)  # fmt: skip


def _method(name: str, facts: Mapping[str, Any]) -> MethodSearch:
    rescored = {int(trial): float(np.mean(list(found.values()))) for trial, found in facts["rescored"].items() if found}
    agreement = {int(epoch): rho for epoch, rho in facts["rank_agreement"].items()}
    importance = dict(sorted(facts["importance"].items(), key=lambda pair: -pair[1]))  # a JSON file sorts its keys
    confirmed = None if facts["confirmed"] is None else _confirmed(facts["confirmed"])
    return MethodSearch(name, tuple(map(_trial, facts["trials"])), facts["space"], facts["pruner"], facts["binds"],
                        facts["seconds"], facts["epochs"], facts["winner"], rescored, importance,
                        dict(sorted(agreement.items())), tuple(facts["pareto"]), confirmed)  # fmt: skip


def _trial(facts: Mapping[str, Any]) -> Trial:
    # a pruned trial has its last probe as its value in Optuna: measured otherwise, so no value here
    values = tuple(facts["values"]) if facts["state"] == "COMPLETE" and facts["values"] else None
    probes = {int(epochs): value for epochs, value in facts["intermediate"].items()}
    return Trial(facts["number"], facts["state"], None if values is None else values[0], values, facts["params"],
                 dict(sorted(probes.items())), facts["seeds"], facts["seconds"], facts["epochs"], facts["reason"])  # fmt: skip


def _confirmed(facts: Mapping[str, Any]) -> Confirmed:
    default, tuned = ({int(seed): v for seed, v in facts[kind]["values"].items()} for kind in ("default", "tuned"))
    both = sorted(set(default) & set(tuned))
    gap = statistics.paired([tuned[seed] - default[seed] for seed in both]) if both else None
    return Confirmed(facts["dataset"], facts["split"], default, tuned, gap)


# -------------------------------------------------------------------------------------------------------- conclusions


def expected_best(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Expected maximum of 1, 2, ..., N draws without replacement. values: (N,); returns (N,), rising to the maximum.

    The maximum of n of N is the i-th smallest with probability C(i - 1, n - 1) / C(N, n); from n to n + 1 that changes by
    the factor (i - n) (n + 1) / (n (N - n)), so no binomial is ever formed.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    count = len(ordered)
    ranks, weights = np.arange(1, count + 1), np.full(count, 1 / count)
    out = np.empty(count)
    for n in range(1, count + 1):
        out[n - 1] = weights @ ordered
        if n < count:
            weights = weights * np.maximum(ranks - n, 0) * ((n + 1) / (n * (count - n)))
    return out


def agreement_warnings(method: str, rank_agreement: Mapping[Any, float]) -> list[str]:
    """What a reader should know of a search whose rungs ranked trials otherwise than their ends did. rank_agreement: as in
    `MethodSearch`"""
    return [f"{method}: after {epochs} epochs trials ranked otherwise than at the end (Spearman {rho:+.2f}): "
            "pruning there may have stopped good ones"
            for epochs, rho in rank_agreement.items() if rho < POOR_AGREEMENT]  # fmt: skip


def summary(study: Study) -> dict[str, Any]:
    """A study as plain values, for `--json`."""
    return {
        "study": study.name, "dataset": study.dataset, "report_on": study.report_on, "labels": study.labels,
        "objectives": list(study.objectives), "seeds": list(study.seeds), "sampler": study.sampler, "trials": study.trials,
        "methods": {one.method: _summary(one) for one in study.methods},
    }  # fmt: skip


def _summary(found: MethodSearch) -> dict[str, Any]:
    best, done = found.best, found.confirmed
    return {
        "counts": {state.lower(): count for state, count in found.counts.items()}, "failures": found.failures,
        "best": None if best is None else {"trial": best.number, "value": best.value, "params": dict(best.params)},
        "winner": found.winner, "rescored": {str(number): value for number, value in found.rescored.items()},
        "pareto": list(found.pareto), "cost": {"device_seconds": found.seconds, "epochs": found.epochs, "binds": found.binds},
        "importance": {"rests_on": len(found.complete), "at_least": LEAST_FOR_IMPORTANCE, "shares": dict(found.importance)},
        "expected_best": found.expected_best,
        "history": [{"trial": trial.number, "state": trial.state, "value": trial.value, "best": value}
                    for trial, value in found.history],
        "confirmed": None if done is None else {
            "dataset": done.dataset, "split": done.split,
            "default": {str(seed): value for seed, value in done.default.items()},
            "tuned": {str(seed): value for seed, value in done.tuned.items()},
            "difference": None if done.gap is None else
            {"mean": done.gap.mean, "low": done.gap.low, "high": done.gap.high, "n": done.gap.n, "verdict": done.gap.verdict},
        },
        "warnings": agreement_warnings(found.method, found.rank_agreement),
    }  # fmt: skip


__all__ = ["Confirmed", "MethodSearch", "Study", "Trial", "agreement_warnings", "expected_best", "read", "read_search",
           "searches", "study_folder", "summary", "unknown"]  # fmt: skip
