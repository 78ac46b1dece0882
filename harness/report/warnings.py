"""What must be said beside rows that are compared: one line per finding, none where all is well.

Each function takes the rows that stand side by side (one board's, status rows included), as of `harness.load_results`.
A seed that is missing from every method leaves no trace in rows; the list of a grid's cells is what shows it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Any

from harness import declarations, registry

if TYPE_CHECKING:
    import pandas as pd


def all_of(rows: pd.DataFrame) -> list[str]:
    """Every warning about these rows, the gravest first."""
    checks = (
        overlapping,
        failed_runs,
        missing_seeds,
        mixed_versions,
        unconverged,
        unequal_budgets,
        collapsed,
        dirty_trees,
    )
    return [line for check in checks for line in check(rows)]


def missing_seeds(rows: pd.DataFrame) -> list[str]:
    """Methods without a number for a seed that another method has, on the same data set and label budget; likewise
    evaluations that a method has at some of its seeds only."""
    out = []
    measured = _measured(rows)
    everyone = _sets(measured, "dataset", "labels", of="seed")
    own = _sets(measured, "dataset", "labels", "method", of="seed")
    asked = _sets(measured, "dataset", "labels", "evaluator", of="seed")
    read = _sets(measured, "dataset", "labels", "method", "evaluator", of="seed")
    for (dataset, labels, method), parts in groupby(read, key=lambda key: key[:3]):
        mine = own[dataset, labels, method]
        if lacking := everyone[dataset, labels] - mine:
            out.append(f"{method}: no number for {_seeds(lacking)} that others have ({dataset}, {labels} labels)")
        for *_, evaluator in parts:
            if lacking := (asked[dataset, labels, evaluator] & mine) - read[dataset, labels, method, evaluator]:
                out.append(f"{method}: no {evaluator} for {_seeds(lacking)} ({dataset}, {labels} labels)")
    return out


def failed_runs(rows: pd.DataFrame) -> list[str]:
    """Runs and evaluations that ended without a number."""
    failed = rows[rows["status"] != "FINISHED"]
    return [
        f"{method} ({dataset}): {_seeds(part['seed'])} ended as {status}, in no mean"
        for (method, dataset, status), part in failed.groupby(["method", "dataset", "status"], sort=True)
    ]


def mixed_versions(rows: pd.DataFrame) -> list[str]:
    """More than one version of a method's or evaluator's code, of the engine, of harness, of torch, or of the data."""
    out = []
    for (method, evaluator), found in _sets(rows, "method", "evaluator", of="code_sha256").items():
        if len(found) > 1:
            part = rows[(rows["method"] == method) & (rows["evaluator"] == evaluator)]
            codes = part["code_sha256"]
            each = (f"{code[:8]} ({_seeds(part.loc[codes == code, 'seed'])})" for code in codes.unique())
            out.append(f"{method}, {evaluator}: several versions of the code: {', '.join(each)}")
    for column, words in (
        ("numbers_version", "the engine"),
        ("harness_version", "harness"),
        ("torch_version", "torch"),
    ):
        if len(versions := sorted(set(rows[column].dropna()))) > 1:
            out.append(f"several versions of {words}: {', '.join(map(str, versions))}")
    digests = _sets(_measured(rows), "dataset", "pretrain_data", "split", of="data_sha256")
    for (dataset, _, split), found in digests.items():
        if len(found) > 1:
            out.append(f"{dataset}, {split} rows: several versions of the data")
    return out


def dirty_trees(rows: pd.DataFrame) -> list[str]:
    """Rows made in a working tree with changes that no commit holds."""
    dirty = rows[rows["git_dirty"].fillna(False).astype(bool)]
    if dirty.empty:
        return []
    return [f"made with uncommitted changes in the working tree: {', '.join(_names(dirty))}"]


def unequal_budgets(rows: pd.DataFrame) -> list[str]:
    """Methods that saw different numbers of images in pretraining, or other labelled images at the same seed.

    Controls and floors are no rivals: their images are not compared, their labels are.
    """
    out = []
    measured = _measured(rows)
    trained = measured[(measured["images_seen"] > 0) & ~measured["method"].isin(_beside(measured))]
    seen = _sets(trained, "dataset", "labels", "method", of="images_seen")
    subsets = _sets(measured, "dataset", "labels", "seed", "method", of="label_subset_sha256")
    for dataset, labels in _sets(measured, "dataset", "labels", of="seed"):
        counts = {method: sorted(found) for (*place, method), found in seen.items() if place == [dataset, labels]}
        if len({count for found in counts.values() for count in found}) > 1:
            each = (f"{method} {' / '.join(f'{count:,.0f}' for count in found)}" for method, found in counts.items())
            out.append(f"images seen in pretraining differ ({dataset}, {labels} labels): {', '.join(each)}")
        given: dict[int, set[frozenset[str]]] = {}
        for (*place, seed, _), found in subsets.items():
            if place == [dataset, labels]:
                given.setdefault(seed, set()).add(frozenset(found))
        if apart := [seed for seed, found in given.items() if len(found) > 1]:
            out.append(f"methods were given different labelled images at {_seeds(apart)} ({dataset}, {labels} labels)")
    return out


def collapsed(rows: pd.DataFrame) -> list[str]:
    """Runs whose features had collapsed."""
    return [f"{method}: collapsed features at {seeds}" for method, seeds in _flagged(rows, "collapsed", True)]


def unconverged(rows: pd.DataFrame) -> list[str]:
    """Fits that had not converged when they were measured."""
    return [
        f"{method}: not converged at {seeds}; comparisons with it are invalid"
        for method, seeds in _flagged(rows, "converged", False)
    ]


def overlapping(rows: pd.DataFrame) -> list[str]:
    """Data sets with test images among those that were pretrained on or labelled."""
    out = []
    counted = rows[rows["test_overlap"].fillna(0).astype(float) > 0]
    for dataset, part in counted.groupby("dataset", sort=True):
        most = int(part["test_overlap"].max())
        words = "1 test image is" if most == 1 else f"{most:,} test images are"
        out.append(f"{dataset}: {words} among the training or unlabelled images too")
    return out


def _measured(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with a number that labels went into."""
    return rows[rows["value"].notna() & rows["labels"].notna() & rows["split"].isin(("test", "validation"))]


def _sets(rows: pd.DataFrame, *key: str, of: str) -> dict[tuple[Any, ...], set[Any]]:
    """{values of the columns `key`: the values of column `of` beside them}, sorted by key; one pass, where selecting and
    grouping a table for every question would take most of a report's time."""
    found: dict[tuple[Any, ...], set[Any]] = {}
    for *place, value in zip(*(rows[name].tolist() for name in (*key, of)), strict=True):
        found.setdefault(tuple(place), set()).add(value)
    return dict(sorted(found.items()))


def _beside(rows: pd.DataFrame) -> list[str]:
    """The controls and floors among the methods of these rows, as far as they are installed."""
    names = set(rows["method"]) & set(registry.names("method"))
    return [name for name in names if declarations.of_method(name)["role"] in ("control", "floor")]


def _names(rows: pd.DataFrame) -> list[str]:
    return sorted(set(rows["method"]))


def _flagged(rows: pd.DataFrame, column: str, value: bool) -> list[tuple[str, str]]:
    """(method and evaluator, seeds) of the rows with that flag."""
    found = rows[rows[column].notna() & (rows[column] == value)]
    return [
        (f"{method}, {evaluator}", _seeds(part["seed"]))
        for (method, evaluator), part in found.groupby(["method", "evaluator"], sort=True)
    ]


def _seeds(numbers: Iterable[int]) -> str:
    each = sorted({int(number) for number in numbers})
    return f"seed{'s' if len(each) > 1 else ''} {', '.join(map(str, each))}"
