"""tune: search every method's settings with the same budget, then judge the winners on seeds that chose nothing.

Trials see the fit and validation parts of the label budget only: the test split is closed. The best few are measured on
more seeds, still on validation; then each winner and each default are run on fresh seeds, and there the test split is
opened, once per run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from harness import bench, registry, search_files, trials, tuning
from harness.arms import Plan, Request, make_plan, open_dataset, shown_name
from harness.config import Recipe
from harness.contracts import HarnessError
from harness.grid import Cell, Planner, cells_of
from harness.grid_setups import Setup, make_grid, request_of, settings_of
from harness.objectives import Objective, parse_objectives
from harness.search_space import Space, SpaceFile, make_space
from harness.trials import Search

TOP = 3  # best trials that are measured on more seeds
LEAST_SEEDS = 3  # of that, and at least twice those of a trial


@dataclass(frozen=True)
class Asked:
    """The words of a `tune` command. report_on: the data set that winners are judged on"""

    methods: tuple[str, ...]
    dataset: str
    report_on: str
    trials: int
    compute: float | None = None
    seeds: int = 1
    objectives: tuple[str, ...] = ("linear_probe.top1",)
    sampler: str | None = None
    pruner: str | None = None
    storage: str | None = None
    study: str | None = None
    confirm_seeds: int = 5
    recipes: tuple[Recipe, ...] = ()
    overrides: Mapping[str, Any] | None = None
    space: SpaceFile = field(default_factory=SpaceFile)


def make_searches(asked: Asked, base: Request) -> list[Search]:
    """One search per method; opens the training data, and what the untrained encoder gives is measured once.

    base: workspace, data folder, labels, device and tracking of the command. Raises HarnessError for whatever is wrong.
    """
    if asked.trials < 1:
        raise HarnessError(f"--trials {asked.trials}: a search needs at least one trial")
    objectives = parse_objectives(asked.objectives)
    objectives = tuple(
        sorted(objectives, key=lambda one: one.evaluator is None)
    )  # the first one is probed and ranked by
    methods = asked.methods + _fine_tuned_controls(asked.methods, objectives)
    requests = {name: _request(asked, base, methods, name, objectives) for name in methods}
    fixed = {name: {**r.layers.flags, **r.layers.overrides} for name, r in requests.items()}
    fine_tuned = any(one.evaluator and registry.load_evaluator(one.evaluator).trains_encoder for one in objectives)
    spaces = {
        name: make_space(name, settings_of(requests[name]), asked.space, fixed[name], fine_tuned) for name in methods
    }
    for name in methods:
        _check_ends(requests[name], spaces[name])
    keys = tuple(sorted({one.key for space in spaces.values() for one in space}))
    sampler = asked.sampler or ("qmc" if len(methods) > 1 else "tpe")
    if sampler not in tuning.SAMPLERS:
        raise HarnessError(f"unknown --sampler '{sampler}'; {registry.near(sampler, tuning.SAMPLERS)}")
    study = asked.study or "-".join([*asked.methods, "on", shown_name(asked.dataset).replace(":", "-")])
    if study != Path(study).name or study.startswith("."):
        raise HarnessError(f"--study '{study}' must be a plain name: it is a folder under results/studies")
    storage = asked.storage or tuning.default_storage(base.workspace)
    seeds = tuple(range(asked.seeds))
    found = [
        Search(study, name, requests[name], objectives, seeds, asked.trials, asked.compute, sampler,
               _pruner(asked, name, requests[name], objectives), spaces[name], keys, storage)
        for name in methods
    ]  # fmt: skip
    plans = Planner()
    for search in found:
        _check_objectives(search, _first_plan(search, plans))
    return found


def _fine_tuned_controls(methods: Sequence[str], objectives: Sequence[Objective]) -> tuple[str, ...]:
    """The untrained network takes part where fine-tuning is tuned: it has settings of its own there."""
    if not any(one.evaluator and registry.load_evaluator(one.evaluator).trains_encoder for one in objectives):
        return ()
    controls = (name for name in registry.methods_with_role("control") if name not in methods)
    plugins = {name: registry.load_method(name) for name in controls}
    return tuple(name for name, plugin in plugins.items() if not plugin.trains and not plugin.supervised)


def _request(
    asked: Asked, base: Request, methods: Sequence[str], name: str, objectives: Sequence[Objective]
) -> Request:
    evaluators = tuple(dict.fromkeys([*(o.evaluator for o in objectives if o.evaluator), trials.COLLAPSE]))
    grid = make_grid(methods=methods, datasets=[asked.dataset], labels=[base.labels], evaluators=evaluators,
                     recipes=asked.recipes, overrides=asked.overrides)  # fmt: skip
    request = request_of(grid, replace(base, control=False, allow_test=False), Setup(name, asked.dataset, None), 0,
                         base.labels, None)  # fmt: skip
    flags = {key: value for key, value in request.layers.flags.items() if key != "seed"}
    return replace(request, layers=replace(request.layers, flags=flags))


def _check_ends(request: Request, space: Space) -> None:
    """Refuse a range that runs outside what its setting takes."""
    for one in space:
        for value in one.ends:
            layers = replace(request.layers, overrides={**request.layers.overrides, one.key: value})
            try:
                settings_of(replace(request, layers=layers))
            except HarnessError as error:
                raise HarnessError(f"search range of {one.key}: {error}") from None


def _pruner(asked: Asked, name: str, request: Request, objectives: Sequence[Objective]) -> str:
    """The pruner of one method: what was asked for, or `asha` where trials have intermediate values."""
    pruner, trains, epochs = asked.pruner, registry.load_method(name).trains, settings_of(request).epochs
    if pruner is not None and pruner not in tuning.PRUNERS:
        raise HarnessError(f"unknown --pruner '{pruner}'; {registry.near(pruner, tuning.PRUNERS)}")
    if pruner == "none" or name not in asked.methods:
        return "none"
    why = ""
    if len(objectives) > 1:
        why = "with several objectives no trial can be pruned"
    elif pruner == "wilcoxon":
        if asked.seeds < tuning.WILCOXON_SEEDS:
            least = tuning.WILCOXON_SEEDS
            why = f"it compares seeds, and cannot stop a trial of fewer than {least}: --seeds {least}"
    elif not trains:
        why = f"method '{name}' trains nothing, so its trials have no intermediate values"
    elif epochs < 2:
        why = f"trials of {epochs} epoch have no intermediate values"
    if pruner is None:
        return "none" if why else "asha"
    if why:
        raise HarnessError(f"--pruner {pruner}: {why}")
    return pruner


def _first_plan(search: Search, plans: Planner) -> Plan:
    """The plan of the method by default; the data is fetched only where the training data is not there."""
    request = search.request_of({}, search.seeds[0])
    try:
        return plans.plan(request)
    except HarnessError:
        files = open_dataset(request.dataset, request.data_dir, None, request.offline).verify()
        if request.offline or all(file.state != "missing" for file in files):
            raise
        return make_plan(request, fetch=True)


def _check_objectives(search: Search, plan: Plan) -> None:
    for objective in search.objectives:
        if objective.evaluator is None:
            continue
        if not plan.budgets:
            raise HarnessError(
                f"data set '{plan.dataset_name}' has no labels to choose by; name another one to tune on"
            )
        if not plan.budgets[0].rounds:
            raise HarnessError(f"--labels {search.request.labels} holds one image of a class, which leaves none for "
                               "validation: a search needs more labels")  # fmt: skip
        known = trials.known_values(plan, objective)
        names = {name for word in known for name in (word, f"{word.partition('.')[0]}.{word.rpartition('.')[2]}")}
        if not registry.load_evaluator(objective.evaluator).trains_encoder and objective.name not in names:
            raise HarnessError(f"unknown objective '{objective.name}'; on validation {objective.evaluator} measures "
                               f"{', '.join(known) or 'nothing'}")  # fmt: skip


# ---------------------------------------------------------------------------------------------------- after the trials


@dataclass
class Result:
    """What a search of one method found. best: number of the best trial by its own seeds; winner: after more seeds; both
    None where no trial was completed; binds: what ended it; rescored: trial -> {seed: value}; confirmed: see docs/tune.md
    """

    search: Search
    records: list[tuning.TrialRecord]
    binds: str
    seconds: float
    best: int | None = None
    winner: int | None = None
    rescored: dict[int, dict[int, float]] | None = None
    confirmed: dict[str, Any] | None = None

    @property
    def params(self) -> dict[str, Any]:
        """The winner's settings."""
        return {} if self.winner is None else self.records[self.winner].params


def collect(search: Search) -> Result:
    """Read a search's finished trials; those beyond the number asked for are left out."""
    found = [t for t in tuning.read_trials(search.storage, search.name) if t.number < search.trials]
    done = [t for t in found if t.state in ("COMPLETE", "PRUNED", "FAIL")]
    seconds = sum(t.attrs.get("seconds", 0.0) for t in done)
    capped = search.compute is not None and len(done) < search.trials
    binds = f"compute={search.compute:g} binds after {len(done)} trials" if capped else f"trials={search.trials} binds"
    result = Result(search, found, binds, seconds)
    ranked = ranking(result)
    result.best = result.winner = ranked[0] if ranked else None
    return result


def ranking(result: Result) -> list[int]:
    """Numbers of the completed trials, best by the first objective first; of equals the earlier one."""
    complete = [t for t in result.records if t.state == "COMPLETE" and t.values is not None]
    return [t.number for t in sorted(complete, key=lambda t: (-(t.values or (0.0,))[0], t.number))]


def more_seeds(result: Result) -> tuple[int, ...]:
    """The seeds that the best few are measured on, those of the trials first; none where one trial is all there is."""
    known = result.search.seeds
    count = max(2 * len(known), LEAST_SEEDS)
    return tuple(range(count)) if len(ranking(result)) > 1 else ()


def requests_of(result: Result, numbers: Sequence[int], seeds: Sequence[int]) -> dict[tuple[int, int], Request]:
    """(trial, seed) -> request, the test split closed."""
    search = result.search
    return {
        (number, seed): search.request_of(result.records[number].params, seed, parent=search.journal)
        for number in numbers for seed in seeds
    }  # fmt: skip


Carry = Callable[[Sequence[Cell]], bench.Report]


def rescore(result: Result, carry: Carry) -> list[str]:
    """Measure the best few on more seeds and name the winner; returns the eval_ids behind it."""
    numbers, seeds = ranking(result)[:TOP], more_seeds(result)
    if not seeds:
        return []
    asked, planner = requests_of(result, numbers, seeds), Planner()
    found, ids = _measure(asked, planner, carry, result.search.objectives[0], "validation")
    scores = {n: {seed: v[0] for (number, seed), v in found.items() if number == n} for n in numbers}
    result.rescored = {n: score for n, score in scores.items() if len(score) == len(seeds)}
    if result.rescored:
        result.winner = max(result.rescored, key=lambda n: (sum(scores[n].values()), -n))
    return [eval_id for each in ids.values() for eval_id in each]


def confirm(result: Result, dataset: str, seeds: Sequence[int], carry: Carry, note: Callable[[str], None]) -> list[str]:
    """Run winner and default on fresh seeds, the test split open; returns the eval_ids of both.

    Where the test split cannot be read the two are compared on validation, and `note` hears of it.
    """
    search = result.search
    kinds = {"default": {}, "tuned": result.params}
    asked = {(kind, seed): search.request_of(params, seed, parent=search.journal, dataset=dataset, allow_test=True)
             for kind, params in kinds.items() for seed in seeds}  # fmt: skip
    planner, split = Planner(), "test"
    try:
        planner.plan(next(iter(asked.values())), fetch=True)
    except (HarnessError, OSError) as error:
        note(f"{search.method}: the test split cannot be read ({error}); winner and default are compared on validation")
        asked, split = {key: replace(request, allow_test=False) for key, request in asked.items()}, "validation"
    if split == "test" and not planner.plan(next(iter(asked.values()))).material.has_test:
        split = "validation"
    found, ids = _measure(asked, planner, carry, search.objectives[0], split)
    result.confirmed = {"dataset": shown_name(dataset), "split": split, "seeds": list(seeds)} | {
        kind: {"values": {str(seed): found[kind, seed][0] for seed in seeds if (kind, seed) in found},
               "pretrain_ids": [found[kind, seed][1] for seed in seeds if (kind, seed) in found],
               "eval_ids": sorted({eval_id for seed in seeds for eval_id in ids[kind, seed]})}
        for kind in kinds
    }  # fmt: skip
    return [eval_id for each in ids.values() for eval_id in each]


def _measure(
    asked: Mapping[Any, Request], planner: Planner, carry: Carry, objective: Objective, split: str
) -> tuple[dict[Any, tuple[float, str]], dict[Any, list[str]]]:
    """Carry requests out as cells; (value, pretrain_id) of those that have one, and the eval_ids of all."""
    cells = {key: cells_of([request], planner) for key, request in asked.items()}
    carry(list({cell.pretrain_id: cell for each in cells.values() for cell in each}.values()))
    values: dict[Any, tuple[float, str]] = {}
    for key, each in cells.items():
        rows = [row for row in bench.Report(each).rows() if row.evaluator == objective.evaluator]
        value = objective.value(rows, split)
        if value is not None:
            values[key] = value, each[0].pretrain_id
    return values, {key: [eval_id for cell in each for eval_id in cell.eval_ids] for key, each in cells.items()}


# ------------------------------------------------------------------------------------------------------------- writing


def document(asked: Asked, results: Sequence[Result]) -> dict[str, Any]:
    """A search as plain values: tuning.json."""
    first = results[0].search
    return {
        "study": first.study, "dataset": shown_name(asked.dataset), "report_on": shown_name(asked.report_on),
        "labels": first.request.labels, "objectives": [one.name for one in first.objectives],
        "directions": [one.direction for one in first.objectives], "seeds": list(first.seeds), "trials": first.trials,
        "compute": first.compute, "sampler": first.sampler,
        "storage": None if asked.storage is None else tuning.redact(asked.storage),
        "methods": {result.search.method: _method(result) for result in results},
    }  # fmt: skip


def _method(result: Result) -> dict[str, Any]:
    search = result.search
    return {
        "optuna_study": search.name, "pruner": search.pruner, "space_digest": tuning.digest(search.space),
        "space": {one.key: one.facts() for one in search.space}, "binds": result.binds, "seconds": result.seconds,
        "epochs": sum(t.attrs.get("epochs", 0) for t in result.records), "best": result.best, "winner": result.winner,
        "rescored": {str(n): {str(seed): v for seed, v in each.items()} for n, each in (result.rescored or {}).items()},
        "confirmed": result.confirmed, "pareto": pareto(result), "rank_agreement": rank_agreement(result),
        "importance": tuning.importances(search.storage, search.name),
        "trials": [search_files.trial_facts(asdict(t)) for t in result.records],
    }  # fmt: skip


def pareto(result: Result) -> list[int]:
    """Numbers of the completed trials that none other beats in every objective; with one objective the best."""
    signs = [1.0 if one.direction == "maximize" else -1.0 for one in result.search.objectives]
    points = {t.number: [s * v for s, v in zip(signs, t.values, strict=True)]
              for t in result.records if t.state == "COMPLETE" and t.values is not None}  # fmt: skip

    def beaten(point: list[float]) -> bool:
        return any(
            all(a >= b for a, b in zip(other, point, strict=True)) and other != point for other in points.values()
        )

    return [number for number, point in points.items() if not beaten(point)]


LEAST_FOR_AGREEMENT = 4  # completed trials with a probe after so many epochs


def rank_agreement(result: Result) -> dict[str, float]:
    """Spearman's rank correlation of a probe after so many epochs with the final value, over completed trials; by epoch."""
    from scipy.stats import spearmanr

    complete = [t for t in result.records if t.state == "COMPLETE" and t.values is not None]
    if result.search.pruner in ("none", "wilcoxon"):
        return {}
    found: dict[str, float] = {}
    for epoch in sorted({step for t in complete for step in t.intermediate}):
        pairs = [(t.intermediate[epoch], (t.values or (0.0,))[0]) for t in complete if epoch in t.intermediate]
        if len(pairs) >= LEAST_FOR_AGREEMENT and all(len(set(side)) > 1 for side in zip(*pairs, strict=True)):
            found[str(epoch)] = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    return found


def write(asked: Asked, results: Sequence[Result]) -> Path:
    """Write tuning.json, trials.csv and the winners' recipes; returns the study's folder."""
    workspace = results[0].search.request.workspace
    folder = search_files.write_search(workspace, document(asked, results))
    for result in results:
        if result.winner is None:
            continue
        search = result.search
        name = "best.toml" if len(results) == 1 else f"best-{search.method}.toml"
        value = result.records[result.winner].values
        about = [f"Trial {result.winner} of the search '{search.study}': {search.objectives[0].name} = {(value or [0])[0]:.6g}",
                 f"on validation, seeds {', '.join(map(str, search.seeds))}."]  # fmt: skip
        search_files.write_recipe(folder / name, search.request, result.params, about)
    return folder


__all__ = ["Asked", "Result", "collect", "confirm", "make_searches", "rescore", "write"]
