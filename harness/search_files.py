"""What a search leaves under `results/studies/<study>/`, and how it is read back without Optuna.

study.json           the eval_ids of every row that belongs to the study (as of `harness bench --study`)
tuning.json          sealed: what was asked for, every method's trials, re-scored and confirmed settings, costs
trials.csv           one line per trial
best-<method>.toml   the winner's settings as a recipe; best.toml where there is one method
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import durable, registry
from harness.arms import Request
from harness.config import Layers, dotted, load_recipe, resolve
from harness.contracts import HarnessError
from harness.studies import read_search, searches, study_folder


def write_search(workspace: Path, document: Mapping[str, Any]) -> Path:
    """Write tuning.json and trials.csv of a study; returns its folder."""
    folder = study_folder(workspace, document["study"])
    durable.write_sealed(folder / "tuning.json", dict(document))
    durable.write_bytes(folder / "trials.csv", trials_csv(document).encode())
    return folder


def trial_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """A trial of tuning.json, of the fields of a harness.tuning.TrialRecord."""
    facts, attrs = {key: value for key, value in record.items() if key != "attrs"}, record["attrs"]
    wanted: dict[str, Any] = {
        "reason": None,
        "seconds": 0.0,
        "epochs": 0,
        "seeds": {},
        "pretrain_ids": [],
        "eval_ids": [],
    }
    probes = {str(epochs): value if value == value else None for epochs, value in record["intermediate"].items()}
    values = None if record["values"] is None else list(record["values"])
    return {
        **facts,
        "values": values,
        "intermediate": probes,
        **{key: attrs.get(key, none) for key, none in wanted.items()},
    }


def trials_csv(document: Mapping[str, Any]) -> str:
    """Every trial as one line: state and why, objectives (of completed trials), the last probe of one that was stopped,
    each seed's values, cost, settings."""
    methods = document["methods"]
    keys = sorted({key for one in methods.values() for trial in one["trials"] for key in trial["params"]})
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["method", "trial", "state", "reason", *document["objectives"], "last_probe", "seeds", "seconds",
                    "epochs", *keys])  # fmt: skip
    for method, one in methods.items():
        for trial in one["trials"]:
            # of a pruned trial Optuna calls its last probe its value
            complete = trial["state"] == "COMPLETE" and trial["values"]
            values = trial["values"] if complete else [""] * len(document["objectives"])
            probes = trial["intermediate"]
            probe = "" if complete or not probes else probes[max(probes, key=int)]
            seeds = "; ".join(
                f"{seed}: {', '.join(map(str, found or ['failed']))}" for seed, found in trial["seeds"].items()
            )
            table.writerow([method, trial["number"], trial["state"], trial["reason"] or "", *values, probe, seeds,
                            trial["seconds"], trial["epochs"], *(trial["params"].get(key, "") for key in keys)])  # fmt: skip
    return text.getvalue()


# ------------------------------------------------------------------------------------------------------------ recipes


def write_recipe(path: Path, request: Request, params: Mapping[str, Any], about: Sequence[str]) -> None:
    """Write a request's settings, with `params` over them, as a recipe that names its method and data set as well.

    about: lines of comment at its head. Raises HarnessError for a setting that a recipe cannot say.
    """
    method = request.method
    shared: dict[str, Any] = {}
    for recipe in request.layers.recipes:
        shared.update({key: value for key, value in recipe.run.items() if key not in ("method", "dataset", "labels")})
    for recipe in request.layers.recipes:
        shared.update({f"method.{key}": value for key, value in recipe.methods.get(method, {}).items()})
    for layer in (request.layers.flags, request.layers.overrides, params):
        shared.update({key: value for key, value in layer.items() if key != "seed"})
    own = {key.removeprefix("method."): v for key, v in shared.items() if key.startswith("method.")}
    every = {key: value for key, value in shared.items() if not key.startswith("method.")}
    head = {"method": method, "dataset": request.dataset, "labels": request.labels}
    lines = [*(f"# {line}" for line in about), "[run]"]
    lines += [f"{key} = {_toml(value)}" for key, value in (head | every).items() if value is not None]
    if own:
        lines += ["", f"[method.{method}]"]
        lines += [f"{key} = {_toml(value)}" for key, value in own.items() if value is not None]
    durable.write_bytes(path, ("\n".join(lines) + "\n").encode())
    _check(path, request, params)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(v) for v in value)}]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


def _check(path: Path, request: Request, params: Mapping[str, Any]) -> None:
    """Refuse a recipe that does not lead to the very settings it was written for."""
    layers = request.layers
    asked = Layers(
        layers.recipes, {k: v for k, v in layers.flags.items() if k != "seed"}, {**layers.overrides, **params}
    )
    plugin, _ = registry.load_dataset(request.dataset)
    evaluators = request.evaluators or ()
    wanted, found = (
        dotted(
            resolve(request.method, request.dataset, one, default_encoder=plugin.default_encoder, evaluators=evaluators)
        )
        for one in (asked, Layers([load_recipe(str(path))]))
    )
    wrong = [key for key in wanted if found.get(key) != wanted[key]]
    if wrong:
        raise HarnessError(f"{path}: a recipe cannot say {wrong[0]} = {wanted[wrong[0]]}; give it with --set beside it")


__all__ = ["read_search", "searches", "study_folder", "trial_facts", "trials_csv", "write_recipe", "write_search"]
