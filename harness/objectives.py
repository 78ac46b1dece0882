"""What `harness tune` optimises: a validation number of an evaluator, or what it costs.

`EVALUATOR.READOUT.METRIC` (`linear_probe.gap.top1`), or `EVALUATOR.METRIC`: of an evaluator that measures several
readouts the best one, as chosen on validation (`knn.top1`), and the only way to name one that has none
(`fine_tune.top1`). `cost`: device seconds of the pretraining, to be small.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from harness import registry
from harness.contracts import HarnessError

COST = "cost"
ACCURACY = re.compile(r"top1(_k[1-9]\d*)?")  # metrics that a search may raise; each a fraction of 1


class Measured(Protocol):
    """A Row or a Measurement."""

    @property
    def readout(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def value(self) -> float | None: ...


@dataclass(frozen=True)
class Objective:
    """One number that a search optimises. evaluator: None for the cost; readout: None for the best one."""

    name: str
    evaluator: str | None
    readout: str | None
    metric: str

    @property
    def direction(self) -> str:
        """`maximize` or `minimize`, in Optuna's words."""
        return "minimize" if self.evaluator is None else "maximize"

    def value(self, found: Iterable[Measured], split: str = "validation") -> float | None:
        """Its value among what the evaluator measured on `split`, a mean where there are several folds; None: not there."""
        values: dict[str | None, list[float]] = {}
        for one in found:
            if one.split == split and one.metric == self.metric and one.value is not None:
                values.setdefault(one.readout, []).append(one.value)
        means = {name: sum(each) / len(each) for name, each in values.items()}
        if self.readout is not None:
            return means.get(self.readout)
        return max(means.values(), default=None)


def parse_objectives(words: Sequence[str]) -> tuple[Objective, ...]:
    """Read `--objective`. Raises HarnessError for what no evaluator could measure."""
    found = tuple(dict.fromkeys(_parse(word) for word in words))
    if all(one.evaluator is None for one in found):
        raise HarnessError("--objective cost alone would find the method that does least; name an accuracy beside it")
    return found


def _parse(word: str) -> Objective:
    if word == COST:
        return Objective(word, None, None, COST)
    evaluator, _, rest = word.partition(".")
    readout, _, metric = rest.rpartition(".")
    if evaluator not in registry.names("evaluator") or not ACCURACY.fullmatch(metric):
        hint = registry.near(evaluator, [*registry.names("evaluator"), COST])
        if evaluator in registry.names("evaluator"):
            hint = "the metric is top1 (knn: top1_kN as well)"
        raise HarnessError(f"unknown objective '{word}'; write EVALUATOR.READOUT.top1, EVALUATOR.top1 or cost: {hint}")
    plugin = registry.load_evaluator(evaluator)
    if not plugin.needs_labels:
        raise HarnessError(f"objective '{word}': {evaluator} uses no labels, so it has nothing on validation")
    if readout and plugin.trains_encoder:
        raise HarnessError(f"objective '{word}': {evaluator} has no readouts; write {evaluator}.{metric}")
    return Objective(word, evaluator, readout or None, metric)


def evaluators_of(objectives: Iterable[Objective]) -> tuple[str, ...]:
    """The evaluators behind objectives, each once."""
    return tuple(dict.fromkeys(one.evaluator for one in objectives if one.evaluator is not None))


__all__ = ["COST", "Objective", "evaluators_of", "parse_objectives"]
