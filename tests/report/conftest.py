"""Rows as an experiment would leave them, for tests of the report: planted numbers, never shown as results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import harness
from harness.contracts import Row

PLAIN: dict[str, Any] = dict.fromkeys(Row.model_fields) | {
    "dataset": "digits", "data_sha256": "d" * 64, "data_verified": True, "pretrain_data": "train",
    "encoder": "convnet_small", "labels": "all", "evaluator": "linear_probe", "readout": "gap", "split": "test",
    "metric": "top1", "n_test": 500, "steps": 40, "images_seen": 4000, "views_seen": 8000, "device_seconds": 2.0,
    "device": "cpu", "precision": "fp32", "num_threads": 1, "deterministic": False, "torch_version": "2", "git_commit": "c",
    "git_dirty": False, "harness_version": "0", "code_sha256": "c" * 64, "numbers_version": 2, "started_at": "2026-01-01",
    "finished_at": "2026-01-01", "status": "FINISHED", "images_per_second": 100.0, "peak_memory_bytes": 2**20,
}  # fmt: skip


def row(method: str, seed: int, value: float | None, **more: Any) -> dict[str, Any]:
    """One row; its identities follow from what it measures, its configuration from `config`."""
    config = {"encoder.name": "convnet_small", "epochs": 4, "seed": seed, "precision": "fp32", **more.pop("config", {})}
    one = {**PLAIN, "method": method, "seed": seed, "label_seed": seed, "value": value, "config": config, **more}
    arm = (method, seed, one["dataset"], one["encoder"], one["code_sha256"], one["numbers_version"], str(config))
    one["pretrain_id"] = f"{hash(arm) & 2**63 - 1:016x}"
    cell = (
        arm,
        one["evaluator"],
        one["labels"],
        one["label_seed"],
        one["fold"],
        one["data_sha256"],
        one["finished_at"],
    )
    one["eval_id"] = more.get("eval_id", f"{hash(cell) & 2**63 - 1:016x}")
    return one


def runs(method: str, values: Iterable[float], **more: Any) -> list[dict[str, Any]]:
    """A validation and a test row per seed 0, 1, ..."""
    return [
        row(method, seed, value, split=split, **more)
        for seed, value in enumerate(values)
        for split in ("validation", "test")
    ]


@pytest.fixture(scope="module", autouse=True)
def pictures() -> None:
    """Runs draw theirs: the report shows them."""


@pytest.fixture(scope="session")
def make_row() -> Callable[..., dict[str, Any]]:
    return row


@pytest.fixture(scope="session")
def make_runs() -> Callable[..., list[dict[str, Any]]]:
    return runs


@pytest.fixture(scope="session")
def frame() -> Callable[..., pd.DataFrame]:
    return lambda *groups: pd.DataFrame([one for group in groups for one in group], columns=list(Row.model_fields))


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of a method on digits at two label budgets, with an untrained network and the pixels floor: real rows,
    weights, figures and maps (of seed 0: the page shows those of the first seed)."""
    folder = tmp_path_factory.mktemp("report")
    shared: dict[str, Any] = {"dataset": "digits", "epochs": 1, "control": False, "tracking": "none", "workspace": folder,
                              "set": {"num_threads": 1, "precision": "fp32"}}  # fmt: skip
    for labels in ("10pc", "30pc"):
        for method in ("sc", "random_init", "pixels"):
            harness.run(method=method, labels=labels, seeds="0", evaluators=["linear_probe"], **shared)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("harness.run_figures._add", lambda *_, **__: None)
                harness.run(method=method, labels=labels, seeds="0-1", evaluators=["linear_probe"], **shared)
    return folder


@pytest.fixture(scope="session")
def rows(workspace: Path) -> pd.DataFrame:
    """Every row of that workspace."""
    return harness.load_results(workspace)
