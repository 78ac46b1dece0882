"""Searches with planted values, made through Optuna's own API and written as `harness tune` writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from harness import live_studies, search_files, tuning

SPACE: dict[str, dict[str, Any]] = {
    "batch_size": {"values": [64, 128, 256]},
    "method.patches": {"low": 2, "high": 4, "log": False, "whole": True},
    "method.temperature": {"low": 0.05, "high": 1.0, "log": True, "whole": False},
    "optim.lr": {"low": 0.01, "high": 0.3, "log": True, "whole": False},
    "optim.weight_decay": {"low": 1e-5, "high": 1e-2, "log": True, "whole": False},
    "schedule.name": {"values": ["step", "cosine"]},
}
DISTRIBUTIONS = {
    key: CategoricalDistribution(facts["values"]) if "values" in facts
    else IntDistribution(facts["low"], facts["high"]) if facts["whole"]
    else FloatDistribution(facts["low"], facts["high"], log=facts["log"])
    for key, facts in SPACE.items()
}  # fmt: skip


def plant(workspace: Path, study: str = "planted", methods: Sequence[str] = ("sc", "simclr"), trials: int = 24,
          objectives: Sequence[str] = ("linear_probe.top1",), pruned: int = 4, waiting: int = 0) -> str:  # fmt: skip
    """Make the Optuna studies of a search in the workspace's storage; returns its address.

    The value falls with the distance of log(lr) from 0.05 and hardly with anything else. Of every `pruned` trials one is
    pruned (0: none), the fifth one has failed, `waiting` are to be done.
    """
    storage = tuning.default_storage(workspace)
    workspace.mkdir(parents=True, exist_ok=True)
    for place, method in enumerate(methods):
        random = np.random.default_rng(place)
        made = optuna.create_study(study_name=f"{study}/{method}", storage=tuning.connect(storage),
                                   directions=["maximize", "minimize"][: len(objectives)])  # fmt: skip
        definition = {"method": method, "dataset": "digits", "objective": list(objectives), "seeds": [0, 1], "labels": "all",
                      "label_seed": None, "recipe": [], "settings": {}, "sampler": "qmc", "pruner": "asha", "space": SPACE,
                      "keys": list(SPACE)}  # fmt: skip
        made.set_user_attr("definition", definition)
        made.add_trials([_trial(number, random, place, len(objectives), pruned) for number in range(trials)])
        for _ in range(waiting):
            made.enqueue_trial({})
    return storage


def _trial(number: int, random: np.random.Generator, place: int, objectives: int, pruned: int) -> Any:
    params = {
        "batch_size": int(random.choice([64, 128, 256])), "method.patches": int(random.integers(2, 5)),
        "method.temperature": float(math.exp(random.uniform(math.log(0.05), 0.0))),
        "optim.lr": float(math.exp(random.uniform(math.log(0.01), math.log(0.3)))),
        "optim.weight_decay": float(10 ** random.uniform(-5, -2)), "schedule.name": str(random.choice(["step", "cosine"])),
    }  # fmt: skip
    value = (
        0.82 - 0.03 * place - 0.05 * math.log(params["optim.lr"] / 0.05) ** 2 + 0.01 * float(random.standard_normal())
    )
    probes = {1: value - 0.2 + 0.05 * float(random.standard_normal()), 3: value - 0.1}
    cost = 12.0 + float(random.uniform(0, 3))
    more: dict[str, Any] = {"params": params, "distributions": DISTRIBUTIONS}
    if number == 5:
        return create_trial(
            state=TrialState.FAIL, user_attrs={"reason": "NONFINITE", "seconds": 1.0, "epochs": 0}, **more
        )
    if pruned and number % pruned == pruned - 1:
        return create_trial(state=TrialState.PRUNED, values=[probes[1], cost][:objectives], intermediate_values={1: probes[1]},
                            user_attrs={"reason": "after 1 epochs", "seconds": cost / 4, "epochs": 1}, **more)  # fmt: skip
    seeds = {"0": [value - 0.01, cost][:objectives], "1": [value + 0.01, cost][:objectives]}
    return create_trial(values=[value, cost][:objectives], intermediate_values=probes,
                        user_attrs={"seconds": cost, "epochs": 8, "seeds": seeds}, **more)  # fmt: skip


def write(workspace: Path, study: str = "planted", seeds: int = 5, split: str = "test", agreement: float = 0.9) -> Path:
    """Write tuning.json of a planted search, its winners confirmed on `seeds` seeds, and their recipes; its folder."""
    document = live_studies.document(workspace, study)
    random = np.random.default_rng(9)
    for method, facts in document["methods"].items():
        complete = [trial for trial in facts["trials"] if trial["state"] == "COMPLETE"]
        best = max(complete, key=lambda trial: trial["values"][0])
        facts["winner"] = best["number"]
        facts["rescored"] = {str(best["number"]): {"0": 0.8, "1": 0.82, "2": 0.81}}
        facts["rank_agreement"] = {"1": agreement, "3": 0.98}
        default = {str(10 + seed): 0.7 + 0.01 * float(random.standard_normal()) for seed in range(seeds)}
        tuned = {seed: value + 0.05 + 0.01 * float(random.standard_normal()) for seed, value in default.items()}
        facts["confirmed"] = {
            "dataset": document["dataset"], "split": split, "seeds": [int(seed) for seed in default],
            **{kind: {"values": found, "pretrain_ids": [], "eval_ids": []} for kind, found in
               (("default", default), ("tuned", tuned))},
        } if seeds else None  # fmt: skip
        folder = search_files.study_folder(workspace, study)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"best-{method}.toml").write_text(f'[run]\nmethod = "{method}"\n')
    return search_files.write_search(workspace, json.loads(json.dumps(document)))
