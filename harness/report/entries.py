"""Measurements of one method in one configuration as one entry of a board, and what two of them differ by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from harness import statistics
from harness.report.boards import Cost, Entry
from harness.report.measurements import CLEAN, Measured, Plugin

Cell = tuple[int | None, int | None]  # (label_seed, fold)


@dataclass
class Arm:
    """The measurements of one method in one configuration, by one evaluator, on one board.

    seeds: {seed: {(label_seed, fold): measurement}}; repeated: how many measurements of the same cell were set aside
    """

    method: str
    encoder: str
    evaluator: str
    code_sha256: str
    settings: dict[str, Any]
    label: str = ""
    repeated: int = 0
    seeds: dict[int, dict[Cell, Measured]] = field(default_factory=dict)

    def add(self, one: Measured) -> None:
        """Take a measurement in; of two of the same cell the later one counts."""
        cells = self.seeds.setdefault(one.seed, {})
        before = cells.get(one.cell)
        if before is not None:
            self.repeated += 1
            one = max(one, before, key=lambda m: (m.finished_at, m.eval_id))
        cells[one.cell] = one

    def all(self) -> list[Measured]:
        return [one for seed in sorted(self.seeds) for one in self.seeds[seed].values()]

    @property
    def key(self) -> str:
        return f"{self.method} ({self.label})" if self.label else self.method

    def headlines(self, split: str) -> dict[int, dict[Cell, float]]:
        """{seed: {cell: top-1 of the readout that validation chose}}."""
        return {seed: found for seed, cells in self.seeds.items() if (found := _headlines(cells, split))}

    def unconverged(self, split: str) -> tuple[int, ...]:
        """Seeds with a run whose headline came from a fit that had not converged."""
        return tuple(
            seed for seed, cells in sorted(self.seeds.items())
            if any(one.unconverged and (split, one.chosen(split)) in one.unconverged for one in cells.values())
        )  # fmt: skip


def _headlines(cells: Mapping[Cell, Measured], split: str) -> dict[Cell, float]:
    chosen = {cell: (one, one.chosen(split)) for cell, one in cells.items()}
    return {cell: one.tops[split][name] for cell, (one, name) in chosen.items() if name is not None}


def arms_of(measurements: Iterable[Measured]) -> list[Arm]:
    """One arm per (method, encoder, evaluator, code, configuration), labelled where a method has several."""
    found: dict[tuple[str, ...], Arm] = {}
    for one in measurements:
        key = (one.method, one.encoder, one.evaluator, one.code_sha256, one.identity)
        if key not in found:
            found[key] = Arm(one.method, one.encoder, one.evaluator, one.code_sha256, one.settings)
        found[key].add(one)
    by_method: dict[str, list[Arm]] = {}
    for arm in found.values():
        by_method.setdefault(arm.method, []).append(arm)
    for arms in by_method.values():
        if len(arms) > 1:
            _label(arms)
    return list(found.values())


def _label(arms: Sequence[Arm]) -> None:
    """Name what tells the configurations of one method apart: settings, encoder, evaluator, code."""
    keys = sorted({key for arm in arms for key in arm.settings})
    differing = [key for key in keys if len({repr(arm.settings.get(key)) for arm in arms}) > 1]
    for arm in arms:
        parts = [f"{key.removeprefix('method.')}={arm.settings[key]}" for key in differing if key in arm.settings]
        for name in ("encoder", "evaluator"):
            if len({getattr(other, name) for other in arms}) > 1:
                parts.append(getattr(arm, name))
        if len({other.code_sha256 for other in arms if other.evaluator == arm.evaluator}) > 1:
            parts.append(f"code {arm.code_sha256[:8]}")
        arm.label = ", ".join(parts)


Headlines = dict[int, dict[Cell, float]]  # of one arm, as `Arm.headlines` gives them


def paired_values(mine: Headlines, theirs: Headlines) -> dict[int, float]:
    """{seed: mean of `mine` minus `theirs` over the folds and label draws that both have}, for seeds that both have."""
    out = {}
    for seed in sorted(mine.keys() & theirs.keys()):
        if common := [cell for cell in mine[seed] if cell in theirs[seed]]:
            out[seed] = fmean(mine[seed][cell] - theirs[seed][cell] for cell in common)
    return out


def entry_of(arm: Arm, plugin: Plugin, split: str, seeds: Sequence[int], encoder: str) -> Entry | None:
    """The entry of `arm` without its differences; None where it has no value on `split`.

    seeds, encoder: the board's
    """
    heads = arm.headlines(split)
    if not heads:
        return None
    values = {seed: fmean(heads[seed].values()) for seed in sorted(heads)}
    choices = {seed: _words(one.chosen(split) for one in arm.seeds[seed].values()) for seed in values}
    interval = statistics.t_interval(list(values.values()))
    runs = {s: tuple(dict.fromkeys(m.pretrain_id for m in arm.seeds[s].values())) for s in values}
    collapsed = tuple(s for s in values if any(m.collapsed for m in arm.seeds[s].values()))
    missing = tuple(s for s in seeds if s not in values)
    return Entry(
        key=arm.key, method=arm.method, title=plugin.title, role=plugin.role, family=plugin.family, year=plugin.year,
        tier=plugin.tier, label=arm.label, encoder=arm.encoder, guest=arm.encoder != encoder, evaluator=arm.evaluator,
        values=values, chosen=choices, readout=_words(one.chosen(split) for one in arm.all()),
        readouts=_readouts(arm, split), metrics=_metrics(arm, split), mean=fmean(values.values()),
        deviation=stdev(values.values()) if len(values) > 1 else None, low=interval.low, high=interval.high,
        cost=_cost(arm.all()), unconverged=arm.unconverged(split), collapsed=collapsed, missing=missing, flags=(),
        runs=runs, settings=arm.settings,
    )  # fmt: skip


def flags_of(entry: Entry, arm: Arm, evaluator: str) -> tuple[str, ...]:
    """What must be said beside the number."""
    out = []
    if entry.unconverged:
        out.append(f"not converged: seed {_list(entry.unconverged)}; comparisons with it are invalid")
    if entry.collapsed:
        out.append(f"collapsed: seed {_list(entry.collapsed)}")
    if entry.missing:
        out.append(f"missing: seed {_list(entry.missing)}")
    if entry.guest and entry.role != "floor":
        out.append(f"other encoder: {entry.encoder}")
    if entry.evaluator != evaluator:
        out.append(f"read by {entry.evaluator}")
    if any(one.metric == CLEAN[1] for one in arm.all()):
        out.append("a linear machine: too many labels for the kernel's")
    if arm.repeated:
        out.append(f"{arm.repeated} repeated measurements set aside, the latest counts")
    return tuple(out)


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(str(seed) for seed in seeds)


def _words(names: Iterable[str | None]) -> str:
    """`gap`, or with counts where there are several: `gap 1, spatial 2`."""
    counts = Counter(name for name in names if name)
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))


def _readouts(arm: Arm, split: str) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, list[float]]] = {}
    for one in arm.all():
        for name, value in one.tops.get(split, {}).items():
            if name:
                found.setdefault(name, {}).setdefault(one.seed, []).append(value)
    return {name: {seed: fmean(values) for seed, values in by_seed.items()} for name, by_seed in found.items()}


def _metrics(arm: Arm, split: str) -> dict[str, float]:
    """Means over runs of the other test metrics at each run's headline readout."""
    found: dict[str, list[float]] = {}
    for one in arm.all():
        for metric, value in one.others.get(one.chosen(split) or "", {}).items():
            found.setdefault(metric, []).append(value)
    return {metric: fmean(values) for metric, values in found.items()}


def _cost(runs: Sequence[Measured]) -> Cost:
    def mean(name: str) -> float | None:
        values = [value for one in runs if (value := getattr(one, name)) is not None]
        return fmean(values) if values else None

    peaks = [one.peak_memory_bytes for one in runs if one.peak_memory_bytes is not None]
    return Cost(mean("images_seen"), mean("views_seen"), mean("pretrain_seconds"), mean("evaluation_seconds"),
                mean("images_per_second"), max(peaks, default=None),
                tuple(sorted({one.device for one in runs})))  # fmt: skip
