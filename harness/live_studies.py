"""Searches as an Optuna storage has them now, in the form of tuning.json: also those that are still at work, or were
stopped before that file was written. What the storage does not hold (settings on more and on fresh seeds) is the file's.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import search_files, studies, tuning
from harness.contracts import HarnessError
from harness.tracking import redact


def names(workspace: Path, storage: str | None = None) -> list[str]:
    """Names of the searches of a workspace and of its storage, or of the one at `storage`.

    Raises HarnessError where the storage cannot be reached.
    """
    return sorted({*studies.searches(workspace), *_in_storage(_address(workspace, storage))})


def document(workspace: Path, study: str, storage: str | None = None) -> dict[str, Any]:
    """tuning.json of a study with its trials as the storage has them now.

    Raises HarnessError, with near names, where neither knows the study, and where either cannot be read.
    """
    address = _address(workspace, storage)
    methods = _in_storage(address).get(study, [])
    written = studies.read_search(workspace, study) if study in studies.searches(workspace) else None
    if address is None or not methods:
        if written is None:
            raise studies.unknown(study, names(workspace, storage), redact(storage) if storage else workspace)
        return written
    found = written or _empty(study, address, methods[0])
    known = found["methods"]
    return {
        **found,
        "methods": {**known, **{method: _method(address, study, method, known.get(method)) for method in methods}},
    }


def _address(workspace: Path, storage: str | None) -> str | None:
    """The storage to read; None where the workspace has none. A file that is not there is not made."""
    address = storage or tuning.default_storage(workspace)
    kind, divider, path = address.partition(":///")
    if divider and kind.partition("+")[0] == "sqlite" and not Path(path.partition("?")[0]).is_file():
        if storage is not None:
            raise HarnessError(f"--storage {redact(storage)}: there is no such file")
        return None
    return address


def _in_storage(address: str | None) -> dict[str, list[str]]:
    """{study: its methods}: Optuna studies that `harness tune` made."""
    found: dict[str, list[str]] = {}
    for name in tuning.study_names(address) if address else ():
        study, divider, method = name.partition("/")
        if divider and study == Path(study).name and tuning.read_definition(address or "", name):
            found.setdefault(study, []).append(method)
    return found


def _empty(study: str, address: str, method: str) -> dict[str, Any]:
    """What all methods of a search have in common, as far as the storage says."""
    made = tuning.read_definition(address, f"{study}/{method}") or {}
    return {"study": study, "dataset": made["dataset"], "report_on": made["dataset"], "labels": made["labels"],
            "objectives": made["objective"], "seeds": made["seeds"], "sampler": made["sampler"],
            "trials": len(tuning.read_trials(address, f"{study}/{method}")), "methods": {}}  # fmt: skip


def _method(address: str, study: str, method: str, written: dict[str, Any] | None) -> dict[str, Any]:
    name = f"{study}/{method}"
    made, trials = tuning.read_definition(address, name) or {}, tuning.read_trials(address, name)
    facts = [search_files.trial_facts(asdict(trial)) for trial in trials]
    at_work = sum(trial.state not in studies.OVER for trial in trials)
    binds = f"{at_work} of {len(trials)} trials are not over" if at_work else f"trials={len(trials)} binds"
    kept = written or {"winner": None, "rescored": {}, "confirmed": None, "rank_agreement": {}, "binds": binds}
    return {
        **kept, "space": made["space"], "pruner": made["pruner"], "trials": facts,
        "binds": binds if at_work else kept["binds"], "seconds": sum(one["seconds"] for one in facts),
        "epochs": sum(one["epochs"] for one in facts), "pareto": tuning.best_numbers(address, name),
        "importance": tuning.importances(address, name),
    }  # fmt: skip


__all__ = ["document", "names"]
