"""Which pretrainings and evaluations a grid consists of, and which of them a workspace still lacks.

A grid is methods x data sets x encoders x axes x seeds x label budgets. Every combination is planned as `harness run`
plans it; arms that several combinations share (controls, floors, a pretraining under several label budgets) are one
cell. Nothing here trains or writes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from harness import floor, records, registry
from harness.arms import Arm, Plan, Request, build_method, cells, failure_id, make_plan, pretext_id, shown_name
from harness.budgets import parse_labels
from harness.compute_budgets import Bound, Budget, parse_budget
from harness.config import Layers, Recipe, RunConfig, dotted, resolve
from harness.contracts import HarnessError, Status
from harness.stacked import parse_seeds

# ------------------------------------------------------------------------------------------------------------- what


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


# ------------------------------------------------------------------------------------------------------------ cells


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a cell."""

    evaluator: str
    labels: str | None
    fold: int | None
    eval_id: str


@dataclass(frozen=True)
class Cell:
    """One pretraining and every evaluation that the grid wants of it.

    role: `method`, `null control`, `control` or `floor`; requests: each leads to a plan that holds it, one per budget
    images: drawn in training; flops_per_image: of a training step, None where it was not counted
    """

    pretrain_id: str
    method: str
    role: str
    dataset: str
    encoder: str
    seed: int
    point: tuple[tuple[str, Any], ...]
    steps: int
    batch_size: int
    device: str
    precision: str
    num_threads: int
    requests: tuple[Request, ...]
    evaluations: tuple[Evaluation, ...]
    flops_per_image: float | None = None

    @property
    def images(self) -> int:
        return self.steps * self.batch_size

    @property
    def eval_ids(self) -> list[str]:
        """Of the pretraining's own rows and of every evaluation."""
        return [pretext_id(self.pretrain_id), *(e.eval_id for e in self.evaluations)]

    def __str__(self) -> str:
        point = "".join(f", {key}={value}" for key, value in self.point)
        return f"{self.method} on {self.dataset}, seed {self.seed}{point}"


@dataclass
class Planned:
    """cells: each once, in the order in which they are run; refused: combination -> why it cannot be run; bounds: what
    --budget came to."""

    cells: list[Cell]
    refused: dict[str, str]
    bounds: dict[str, Bound]


class Planner:
    """Plans requests one after the other and opens the data of neighbours once."""

    def __init__(self) -> None:
        self._last: tuple[tuple[Any, ...], Plan] | None = None

    def plan(self, request: Request, fetch: bool = False) -> Plan:
        """See harness.arms.make_plan."""
        data = settings_of(request).data
        key = (request.dataset, request.data_dir, request.allow_test, data.image_size, data.pretrain_split,
               data.num_pretrain_images is None)  # fmt: skip
        beside = self._last[1] if self._last and self._last[0] == key else None
        self._last = None  # the images of another data set must not stay beside the new ones
        plan = make_plan(request, fetch, beside)
        self._last = (key, plan)
        return plan


def plan_cells(
    grid: Grid,
    base: Request,
    *,
    fetch: bool = False,
    flops: bool = False,
    bound_of: Callable[[Plan], Bound] | None = None,
) -> Planned:
    """Plan every combination. A wrong setting ends it with HarnessError; a combination that cannot be run is refused.

    fetch: download missing data first; flops: count the arithmetic of every kind of training step
    bound_of: what --budget allows a setup, said of a plan without it
    Raises HarnessError as well when every combination is refused.
    """
    planner, found = Planner(), Planned([], {}, {})
    gathered: dict[str, Cell] = {}
    counted: dict[str, float | None] = {}
    groups = list(setups(grid))
    for setup in itertools.chain.from_iterable(groups):
        settings_of(request_of(grid, base, setup, grid.seeds[0], grid.labels[0], None))
    for group in groups:
        epochs: dict[Setup, int] = {}
        for seed, setup, labels in itertools.product(grid.seeds, group, grid.labels):
            words = f"{setup}, labels {labels}"
            if words in found.refused:
                continue
            try:
                if bound_of is not None and setup not in epochs:
                    bound = bound_of(planner.plan(request_of(grid, base, setup, seed, labels, None), fetch))
                    found.bounds[str(setup)], epochs[setup] = bound, bound.epochs
                plan = planner.plan(request_of(grid, base, setup, seed, labels, epochs.get(setup)), fetch)
            except HarnessError as error:
                found.refused[words] = str(error)
                continue
            for arm in plan.arms:
                _gather(gathered, arm, plan, setup)
                if flops:
                    _count(gathered, arm, plan, counted)
    if not gathered:
        raise HarnessError(next(iter(found.refused.values())))
    found.cells = list(gathered.values())
    return found


def _gather(gathered: dict[str, Cell], arm: Arm, plan: Plan, setup: Setup) -> None:
    """Add an arm to the cells; one that is there already gets the evaluations that are new."""
    wanted = [
        Evaluation(cell.evaluator, cell.budget.spec if cell.budget else None, cell.budget.fold if cell.budget else None,
                   cell.eval_id)
        for cell in cells(arm, plan)
    ]  # fmt: skip
    known = gathered.get(arm.pretrain_id)
    if known is None:
        config = arm.config
        gathered[arm.pretrain_id] = Cell(
            arm.pretrain_id, arm.method, arm.role, config.dataset_name, arm.encoder, config.seed, setup.point, arm.steps,
            arm.batch_size, plan.device.type, config.precision, config.num_threads or 1, (plan.request,), tuple(wanted),
        )  # fmt: skip
        return
    ids = {evaluation.eval_id for evaluation in known.evaluations}
    if new := tuple(e for e in wanted if e.eval_id not in ids):
        gathered[arm.pretrain_id] = replace(
            known, requests=(*known.requests, plan.request), evaluations=known.evaluations + new
        )


def _count(gathered: dict[str, Cell], arm: Arm, plan: Plan, counted: dict[str, float | None]) -> None:
    """Set a cell's flops_per_image; steps that differ in the seed alone are counted once."""
    cell = gathered[arm.pretrain_id]
    if not arm.plugin.trains or cell.flops_per_image is not None:
        return
    settings = {k: v for k, v in dotted(arm.config).items() if k.startswith(("encoder.", "method.", "data.image_size"))}
    key = repr((arm.method, cell.dataset, arm.batch_size, arm.config.precision, sorted(settings.items())))
    if key not in counted:
        info = plan.material.info
        try:
            counted[key] = floor.count(
                build_method(arm.method, arm.config, info), info, arm.batch_size, plan.device
            ).flops
        except Exception:  # a method whose step looks at values has no count, and is listed without
            counted[key] = None
    gathered[arm.pretrain_id] = replace(cell, flops_per_image=counted[key])


# --------------------------------------------------------------------------------------------------------- standing


@dataclass(frozen=True)
class Standing:
    """Where a cell stands in a workspace. missing: eval_ids that have no rows yet; status: of a failure."""

    state: Literal["finished", "missing", "failed"]
    missing: tuple[str, ...] = ()
    status: Status | None = None


RETRIED = ("INTERRUPTED", "OUT_OF_MEMORY", "FAILED")  # by --retry-failed; a loss that is not finite comes again


def standing(workspace: Path, cell: Cell) -> Standing:
    """Read a cell's row files."""
    missing = []
    for eval_id in cell.eval_ids:
        rows = records.read(records.rows_path(workspace, cell.pretrain_id, eval_id))
        if rows is None or rows[0].status in RETRIED:
            missing.append(eval_id)
        elif rows[0].status == "NONFINITE" and eval_id == pretext_id(cell.pretrain_id):
            return Standing("failed", (), "NONFINITE")
    if not missing:
        return Standing("finished")
    failure = records.read(records.rows_path(workspace, cell.pretrain_id, failure_id(cell.pretrain_id)))
    if failure is not None and failure[0].status != "INTERRUPTED":
        return Standing("failed", tuple(missing), failure[0].status)
    return Standing("missing", tuple(missing))


__all__ = ["Cell", "Evaluation", "Grid", "Planned", "Planner", "Setup", "Standing", "make_grid", "plan_cells", "request_of",
           "settings_of", "setups", "standing"]  # fmt: skip
