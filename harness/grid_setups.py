"""What a grid asks for: methods x data sets x encoders x axes x seeds x label budgets, as requests of `harness run`.

Every word is checked here, before any data is opened.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harness import registry
from harness.arms import Request, shown_name
from harness.budgets import parse_labels
from harness.compute_budgets import Budget, parse_budget
from harness.config import Layers, Recipe, RunConfig, resolve
from harness.contracts import HarnessError
from harness.stacked import parse_seeds


@dataclass(frozen=True)
class Grid:
    """What is compared. encoders: (None,) for each data set's own; axes: dotted settings and the values they take."""

    methods: tuple[str, ...]
    datasets: tuple[str, ...]
    encoders: tuple[str | None, ...] = (None,)
    seeds: tuple[int, ...] = (0,)
    labels: tuple[str, ...] = ("all",)
    evaluators: tuple[str, ...] | None = None
    budget: Budget | None = None
    layers: Layers = field(default_factory=Layers)
    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """One combination but for seed and labels. point: a value of every axis."""

    method: str
    dataset: str
    encoder: str | None
    point: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.method} on {shown_name(self.dataset)}", *([self.encoder] if self.encoder else [])]
        return ", ".join([*parts, *(f"{key}={value}" for key, value in self.point)])


def make_grid(
    *,
    methods: Sequence[str],
    datasets: Sequence[str],
    encoders: Sequence[str] = (),
    seeds: str = "0",
    labels: Sequence[str] = ("all",),
    evaluators: Sequence[str] | None = None,
    budget: str | None = None,
    recipes: Sequence[Recipe] = (),
    flags: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    axes: Mapping[str, tuple[Any, ...]] | None = None,
) -> Grid:
    """Check every word of a grid without opening data. Raises HarnessError for the first that means nothing.

    overrides, axes: dotted settings; `method.NAME.key` is a setting of one method
    """
    for words, flag in ((methods, "methods"), (datasets, "datasets"), (labels, "labels")):
        if not words:
            raise HarnessError(f"the grid names no {flag}; give --{flag} or a grid file with them")
    for name in methods:
        registry.load_method(name)
    for spec in datasets:
        registry.load_dataset(spec)
    for name in evaluators or ():
        registry.load_evaluator(name)
    for label in labels:
        parse_labels(label)
    axes, overrides = dict(axes or {}), dict(overrides or {})
    limits = parse_budget(budget) if budget else None
    for key in [*overrides, *axes]:
        if key in ("seed", "stack_seeds"):
            raise HarnessError(f"{key} is no setting of a grid: its seeds are named by --seeds and trained one by one")
        if key == "epochs" and limits is not None:
            raise HarnessError("--budget chooses the epochs, and epochs are set as well; leave one out")
        if key in axes and key in overrides:
            raise HarnessError(f"{key} is an axis of the grid and set as well; leave one out")
        _owner(key, methods)
    layers = Layers(list(recipes), dict(flags or {}), overrides)
    return Grid(tuple(dict.fromkeys(methods)), tuple(dict.fromkeys(datasets)), tuple(dict.fromkeys(encoders)) or (None,),
                parse_seeds(seeds), tuple(dict.fromkeys(labels)), None if evaluators is None else tuple(evaluators),
                limits, layers, axes)  # fmt: skip


def _owner(key: str, methods: Sequence[str]) -> str | None:
    """The method that a setting `method.NAME.key` is for. Raises HarnessError when it does not say which."""
    first, _, rest = key.partition(".")
    if first != "method":
        return None
    name = rest.partition(".")[0]
    if name in methods:
        return name
    if name in registry.names("method"):
        raise HarnessError(f"{key}: {name} is no method of this grid; it has {', '.join(methods)}")
    if len(methods) == 1:
        return None
    raise HarnessError(f"{key} does not say which method it is for; write method.NAME.{rest}")


def setups(grid: Grid) -> Iterator[list[Setup]]:
    """The combinations in the order in which they are run: one list of methods per data set, encoder and point."""
    points = [tuple(zip(grid.axes, values, strict=True)) for values in itertools.product(*grid.axes.values())]
    for dataset, encoder, point in itertools.product(grid.datasets, grid.encoders, points):
        yield [Setup(method, dataset, encoder, point) for method in grid.methods]


def request_of(grid: Grid, base: Request, setup: Setup, seed: int, labels: str, epochs: int | None) -> Request:
    """What `harness run` would be asked for one combination. epochs: what the budget allows, None without one."""
    flags = {**grid.layers.flags, "seed": seed}
    if setup.encoder is not None:
        flags["encoder.name"] = setup.encoder
    if epochs is not None:
        flags["epochs"] = epochs
    plain: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    for key, value in {**grid.layers.overrides, **dict(setup.point)}.items():
        if owner := _owner(key, grid.methods):
            own.setdefault(owner, {})[key.removeprefix(f"method.{owner}.")] = value
        else:
            plain[key] = value
    recipes = grid.layers.recipes + ([Recipe("grid", {}, own)] if own else [])
    layers = Layers(recipes, flags, plain)
    return replace(base, method=setup.method, dataset=setup.dataset, labels=labels, layers=layers,
                   evaluators=grid.evaluators)  # fmt: skip


def settings_of(request: Request) -> RunConfig:
    """The configuration of a request's method, before any data is opened. Raises HarnessError for a wrong setting."""
    plugin, _ = registry.load_dataset(request.dataset)
    return resolve(
        request.method, shown_name(request.dataset), request.layers, default_encoder=plugin.default_encoder,
        method_settings_of=request.method,
    )  # fmt: skip


__all__ = ["Grid", "Setup", "make_grid", "request_of", "settings_of", "setups"]
