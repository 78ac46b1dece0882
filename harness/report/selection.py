"""Which rows a report is about: `--filter KEY=VALUE`. A filter must not make a method look better: what it is measured
against stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness import registry
from harness.errors import HarnessError
from harness.report.measurements import plugins_of

if TYPE_CHECKING:
    import pandas as pd

BESIDE = ("control", "null control", "floor")
# roles that a filter on such a field leaves alone; a setting is treated like `method`
KEPT = {"method": BESIDE, "evaluator": ("floor",), "readout": ("floor",), "encoder": ("floor",)}
# fields that say how features were read: rows on the pretraining itself (its cost, its failure, a collapse) stay
OF_READING = ("evaluator", "readout", "labels", "label_seed", "fold", "label_subset_sha256", "split", "metric")


def select(rows: pd.DataFrame, filters: Sequence[str]) -> pd.DataFrame:
    """The rows that every filter holds for; of several values, separated by commas, any one will do.

    A key is a field of rows or a setting (`epochs`, `method.temperature`). Floors always stay, and controls and null
    controls where methods or settings are chosen. Raises HarnessError for a filter that is none, names nothing or leaves
    nothing.
    """
    for word in filters:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise HarnessError(f"--filter '{word}': give KEY=VALUE, for instance dataset=mnist")
        if not len(rows):
            return rows
        values = rows[key].astype(object) if key in rows.columns else _setting(rows, key)
        wanted = values.map(_word).isin({part.strip() for part in value.split(",")})
        if not wanted.any():
            raise HarnessError(
                f"--filter {word} leaves no row; there are {', '.join(sorted(set(values.map(_word)))[:8])}"
            )
        roles = KEPT.get(key, () if key in rows.columns else BESIDE)
        kept = [name for name, plugin in plugins_of(rows["method"]).items() if plugin.role in roles]
        wanted |= rows["method"].isin(kept)
        if key in OF_READING:
            wanted |= rows["split"] == "pretrain"
        rows = rows[wanted]
    return rows


def _setting(rows: pd.DataFrame, key: str) -> pd.Series:
    known = {name for config in rows["config"] for name in config}
    if key not in known:
        raise HarnessError(f"--filter {key}: no such field or setting; {registry.near(key, {*rows.columns, *known})}")
    return rows["config"].map(lambda config: config.get(key))


def _word(value: Any) -> str:
    """As the value is typed: 4 for 4.0, true, null."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or value != value:
        return "null"
    return f"{value:g}" if isinstance(value, float) and value.is_integer() else str(value)
