"""What `harness list`, `describe` and `show` tell, as plain records."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from harness import encoders, journal, registry, runs
from harness import records as rows
from harness.config import DataConfig, RunConfig, load_recipe, recipe_names
from harness.config import describe as describe_fields
from harness.contracts import HarnessError
from harness.encoders import EncoderConfig
from harness.grid_files import grid_names, load_grid
from harness.optim import OptimConfig, ScheduleConfig

KINDS = ("methods", "datasets", "encoders", "evaluators", "recipes", "grids", "runs")
JSON_ONLY = {kind: ("role", "source") if kind == "methods" else () for kind in KINDS}  # too wide for a terminal


def records(what: str, workspace: Path) -> list[dict[str, Any]]:
    """One record per entry of `what`. Raises HarnessError for a word that names nothing."""
    if what not in KINDS:
        raise HarnessError(f"list '{what}': {registry.near(what, KINDS)}")
    return {"methods": _methods, "datasets": _datasets, "encoders": _encoders, "evaluators": _evaluators,
            "recipes": _recipes, "grids": _grids, "runs": lambda: _runs(workspace)}[what]()  # fmt: skip


def _methods() -> list[dict[str, Any]]:
    """By family and year; null controls, controls, floors and what stands for outside weights come last, in this order."""
    plugins = {name: registry.load_method(name) for name in registry.names("method")}
    null = {p.null_control for p in plugins.values()}
    roles = {name: p.role or ("null control" if name in null else "method") for name, p in plugins.items()}
    order = ("method", "null control", "control", "floor", "outside")
    records = [
        {"family": p.family, "method": name, "title": registry.title(p), "year": p.year, "role": roles[name],
         "tier": p.tier if roles[name] == "method" else "", "idea": registry.idea(p), "source": p.source}
        for name, p in plugins.items()
    ]  # fmt: skip
    return sorted(records, key=lambda r: (order.index(r["role"]), r["family"], r["year"], r["method"]))


def _datasets() -> list[dict[str, Any]]:
    plugins = [(name, registry.load("dataset", name)) for name in registry.names("dataset")]
    return [
        {"name": f"{name}:PATH" if p.takes_argument else name, "title": p.title, "encoder": p.default_encoder,
         "pretrain_split": p.pretrain_split, "licence": p.licence}
        for name, p in plugins
    ]  # fmt: skip


def _encoders() -> list[dict[str, Any]]:
    return [
        {"name": name, "about": encoders.about(name)} for name in (*encoders.names(), "torchvision:NAME", "timm:NAME")
    ]


def _evaluators() -> list[dict[str, Any]]:
    plugins = [(name, registry.load_evaluator(name)) for name in registry.names("evaluator")]
    return [{"name": name, "title": registry.title(p), "needs_labels": p.needs_labels} for name, p in plugins]


def _recipes() -> list[dict[str, Any]]:
    out = []
    for name in recipe_names():
        recipe = load_recipe(name)
        out.append({"name": name, "settings": ", ".join(f"{k}={v}" for k, v in recipe.run.items()),
                    "methods": ", ".join(sorted(recipe.methods))})  # fmt: skip
    return out


def _grids() -> list[dict[str, Any]]:
    out = []
    for name in grid_names():
        grid = load_grid(name)
        axes = "; ".join(f"{key} = {', '.join(map(str, values))}" for key, values in grid["axes"].items())
        out.append({"name": name, "methods": ", ".join(grid["methods"]), "datasets": ", ".join(grid["datasets"]),
                    "seeds": grid["seeds"], "labels": ", ".join(grid["labels"]), "axes": axes})  # fmt: skip
    return out


def _runs(workspace: Path) -> list[dict[str, Any]]:
    return [
        {"pretrain_id": run.pretrain_id, "method": run.facts["method"], "dataset": run.facts["config"]["dataset_name"],
         "encoder": run.facts["config"]["encoder.name"], "seed": run.facts["config"]["seed"], "steps": run.facts["steps"],
         "status": run.facts["status"], "finished_at": run.facts["finished_at"]}
        for run in runs.finished(workspace)
    ]  # fmt: skip


def describe(method: str) -> dict[str, Any]:
    """Every setting that a run of `method` takes."""
    plugin = registry.load_method(method)
    scalars = [
        r
        for r in describe_fields(RunConfig, "")
        if r["key"] in ("epochs", "batch_size", "seed", "precision", "num_threads")
    ]
    settings = scalars + [
        record
        for prefix, model in (("data.", DataConfig), ("optim.", OptimConfig), ("schedule.", ScheduleConfig),
                              ("encoder.", EncoderConfig), ("method.", plugin.Config))
        for record in describe_fields(model, prefix)
    ]  # fmt: skip
    for name in registry.names("evaluator"):
        settings += describe_fields(registry.load_evaluator(name).Config, f"eval.{name}.")
    for record in settings:
        record["default"] = plugin.defaults.get(record["key"], record["default"])
    return {"method": method, "title": registry.title(plugin), "source": plugin.source, "family": plugin.family,
            "year": plugin.year, "about": inspect.getdoc(plugin) or "", "settings": settings}  # fmt: skip


def show(workspace: Path, word: str) -> dict[str, Any]:
    """Everything known of one pretraining; `steps_executed` counts all attempts, so repeated work is visible."""
    run = runs.find(workspace, word)
    written = journal.Journal(journal.journal_path(workspace, run.pretrain_id))
    facts = {k: v for k, v in run.facts.items() if k not in ("file", "info", "identity")}
    own = [row.model_dump(mode="json") for path in sorted((rows.runs_folder(workspace) / run.pretrain_id).glob("*.json"))
           for row in rows.read(path) or []]  # fmt: skip
    return {**facts, "steps_executed": written.steps_executed("pretrain"), "attempts": written.attempts, "rows": own}
