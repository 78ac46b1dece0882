"""The command that makes one run again, from what its rows say of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from harness import registry
from harness.config import Layers, dotted, resolve
from harness.contracts import HarnessError, Row

WIDTH = 96  # characters of a line


def commands(rows: Sequence[Row], facts: Mapping[str, Any] | None = None) -> list[str]:
    """The `harness run` commands that lead to the same pretrain_id, one per label budget of the run's rows.

    rows: of one pretrain_id; facts: the record beside its weights, which alone knows whether seeds were trained together
    A setting is written where it differs from what the method gets by default; all of them are where the method or the
    data set is not installed. The folder behind `folder:NAME` and `--data-dir` are not in rows and stay the reader's.
    """
    own = [row for row in rows if not _source(row)]
    first = (own or rows)[0]
    dataset = _source(first) or first.dataset
    config = {key: value for row in own or rows for key, value in row.config.items()}
    usual = _defaults(first.method, dataset)
    words = ["harness", "run", "--method", first.method, "--dataset", dataset, "--device", first.device]
    together = (facts or {}).get("identity", {}).get("stacked")
    words += (
        ["--seed", str(first.seed)]
        if not together
        else ["--seeds", ",".join(map(str, together)), "--stack-seeds", "on"]
    )
    words += ["--deterministic"] if first.deterministic else []
    elsewhere = dict.fromkeys(row.dataset for row in rows if _source(row))
    words += ["--no-control", *(["--transfer", ",".join(elsewhere)] if elsewhere else [])]
    for key, value in sorted(config.items()):
        if key in ("method_name", "dataset_name", "seed", "stack_seeds") or (key in usual and usual[key] == value):
            continue
        words += ["--set", f"{key}={_typed(value)}"]
    budgets: list[tuple[str | None, int | None]]
    budgets = list(dict.fromkeys((row.labels, row.label_seed) for row in rows if row.labels is not None))
    return [_wrapped([*words, *_evaluations(rows, *budget)]) for budget in budgets or [(None, None)]]


def _source(row: Row) -> str:
    """The data set a run was pretrained on, of a row measured on another one; empty for any other row."""
    return row.pretrain_data.rpartition(":")[0]


def _evaluations(rows: Sequence[Row], labels: str | None, label_seed: int | None) -> list[str]:
    """--eval, --labels and --label-seed of one budget; what needs no labels goes with every budget."""
    used = {row.evaluator for row in rows if row.labels in (labels, None)}
    names = [name for name in registry.names("evaluator") if name in used]
    words = ["--eval", ",".join(names)] if names else []
    words += [] if labels is None else ["--labels", labels]
    return words + ([] if label_seed in (None, rows[0].seed) else ["--label-seed", str(label_seed)])


def _wrapped(words: Sequence[str]) -> str:
    """A command for a shell, in lines of at most WIDTH characters where its words allow it; options stay with values."""
    units: list[str] = []
    for word in words:
        quoted = shlex.quote(word)
        if units and not word.startswith("--") and units[-1].startswith("--") and " " not in units[-1]:
            units[-1] += f" {quoted}"
        else:
            units.append(quoted)
    lines = [""]
    for unit in units:
        if lines[-1] and len(lines[-1]) + len(unit) + 3 > WIDTH:
            lines.append("   ")
        lines[-1] += f" {unit}" if lines[-1] else unit
    return " \\\n".join(lines)


@cache
def _defaults(method: str, dataset: str) -> dict[str, Any]:
    """What a run of the method on the data set gets when nothing is said; empty where one of them is not installed."""
    try:
        plugin, _ = registry.load_dataset(dataset)
        config = resolve(method, dataset, Layers(), default_encoder=plugin.default_encoder,
                         evaluators=registry.names("evaluator"))  # fmt: skip
    except HarnessError:
        return {}
    # as JSON and back: a row's config went the same way
    plain: dict[str, Any] = json.loads(json.dumps(dotted(config)))
    return plain


def _typed(value: Any) -> str:
    """A value as `--set` reads it."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)
