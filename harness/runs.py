"""Finished pretrainings of a workspace: find one by a word, read what it was made of, load its encoder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness import arms, checkpoint, durable
from harness.config import Layers, Recipe, RunConfig, build
from harness.contracts import DatasetInfo, Encoder, HarnessError


@dataclass(frozen=True)
class Run:
    """One finished pretraining. facts: everything recorded with its weights (config, identity, steps, digests, ...)."""

    workspace: Path
    pretrain_id: str
    facts: dict[str, Any]

    @property
    def folder(self) -> Path:
        return checkpoint_folder(self.workspace, self.pretrain_id)

    @property
    def config(self) -> RunConfig:
        """The resolved configuration it was trained with."""
        settings = {
            k: v for k, v in self.facts["config"].items() if not k.startswith(("method_name", "dataset_name", "eval."))
        }
        return build(self.facts["method"], self.facts["config"]["dataset_name"], settings, ())

    @property
    def info(self) -> DatasetInfo:
        """The facts of the data it was trained on, as they were then."""
        stored: dict[str, Any] = self.facts["info"]
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        return DatasetInfo(**values)

    def encoder(self) -> Encoder:
        """The trained encoder on the CPU in eval mode; its digest is checked."""
        with torch.random.fork_rng(devices=[]):  # its first weights are replaced: the caller's draws go on as they were
            encoder = arms.build_encoder(self.facts["method"], self.config, self.info)
        loaded = checkpoint.load_encoder(self.folder)
        assert loaded is not None
        encoder.load_state_dict(loaded[0])
        return encoder.eval()


def checkpoint_folder(workspace: Path, pretrain_id: str) -> Path:
    """Where the states and the finished encoder of a pretraining lie."""
    return workspace / ".harness" / "checkpoints" / pretrain_id


def finished(workspace: Path) -> list[Run]:
    """Every finished pretraining of a workspace whose record is whole, oldest first."""
    out = []
    for pointer in (workspace / ".harness" / "checkpoints").glob("*/encoder.json"):
        facts = durable.read_sealed(pointer)
        if facts is not None:
            out.append(Run(workspace, pointer.parent.name, facts))
    return sorted(out, key=lambda run: (run.facts["finished_at"], run.pretrain_id))


def find(workspace: Path, word: str) -> Run:
    """The run that `word` names: `latest`, or a unique prefix of its pretrain_id. Raises HarnessError otherwise."""
    if word == "latest":
        pointer = workspace / ".harness" / "latest.json"
        latest = durable.read_sealed(pointer) if pointer.exists() else None
        if latest is None:
            raise HarnessError(f"there is no finished run in {workspace}; make one with `harness run`")
        word = latest["pretrain_id"]
    if not re.fullmatch(r"[0-9a-f]{1,16}", word):
        raise HarnessError(
            f"'{word}' names no run: give `latest` or the first letters of a pretrain_id (harness list runs)"
        )
    folders = sorted(p.parent.name for p in (workspace / ".harness" / "checkpoints").glob(f"{word}*/encoder.json"))
    if len(folders) != 1:
        found = (
            f"several ({', '.join(folders[:4])}); give more letters" if folders else "none (see `harness list runs`)"
        )
        raise HarnessError(f"run '{word}' in {workspace}: found {found}")
    facts = durable.read_sealed(checkpoint_folder(workspace, folders[0]) / "encoder.json")
    if facts is None:
        raise HarnessError(
            f"the record of run {folders[0]} is damaged; delete {checkpoint_folder(workspace, folders[0])} and rerun"
        )
    return Run(workspace, folders[0], facts)


def load_encoder(run: str = "latest", workspace: str | Path = ".") -> Encoder:
    """The encoder of a finished pretraining, on the CPU in eval mode: uint8 or [0, 1] images -> feature map.

    run: `latest` or the first letters of a pretrain_id. Raises HarnessError when there is none or a byte is wrong.
    """
    return find(Path(workspace).resolve(), run).encoder()


def request_again(run: Run, overrides: dict[str, Any], **changes: Any) -> arms.Request:
    """The request that leads to this very pretraining again, with other evaluations.

    Its own settings are the resolved ones; the controls get the layers of the original command, as they did then.
    """
    wrong = [key for key in overrides if not key.startswith("eval.")]
    if wrong:
        raise HarnessError(
            f"--set {wrong[0]}: a finished run can only be evaluated in other ways; set eval.* keys, or run again"
        )
    asked = run.facts["layers"]
    layers = Layers(
        [Recipe(r["name"], r["run"], r["methods"]) for r in asked["recipes"]],
        asked["flags"],
        {**asked["overrides"], **overrides},
    )
    pinned = {
        k: v for k, v in run.facts["config"].items() if not k.startswith(("method_name", "dataset_name", "eval."))
    }
    return arms.Request(
        method=run.facts["method"], dataset=run.facts["dataset"], layers=layers, workspace=run.workspace, pinned=pinned,
        stacked=run.facts["identity"].get("stacked"), device=run.facts["identity"]["device"],
        deterministic=run.facts["identity"]["deterministic"], **changes,
    )  # fmt: skip


__all__ = ["Run", "checkpoint_folder", "find", "finished", "load_encoder", "request_again"]
