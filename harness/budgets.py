"""Label budgets: which labelled images an evaluation may use, and how it pays for its own validation out of them.

`--labels` is `all`, an integer (total count), a number with a point (fraction), `Npc` (N per class) or `folds` (the
data set's own). Within a class, images are taken in the order of hash(label_seed, index), so the subsets of one label
seed are nested: 10pc lies inside 100pc, 1000 inside 4000, 0.1 inside 0.5.

- Counts are class-balanced: total // classes each, the remainder one each to the first classes in class order. A class
  that has too few images is an error with the numbers, never silently made up for by the others.
- Fractions are stratified: each class gives its own share, rounded half up.
- Validation is the first 20% of each class in that order (so it is nested too), at least one. With fewer than five
  images in the smallest class it is that many rounds of stratified cross-validation; with one, there are no rounds.

Source: `shared/design/protocol.md`, "Splits and label budgets".
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from harness.augment import hash_seeds, mix, stream_key
from harness.contracts import HarnessError, LabelBudget

VALIDATION_SHARE = 0.2
CROSS_VALIDATION_BELOW = 5  # images of the smallest class


@dataclass(frozen=True)
class LabelSpec:
    """`--labels`, understood. amount: images in all, a fraction, or images per class; 1 for `all` and `folds`."""

    kind: Literal["all", "count", "fraction", "per_class", "folds"]
    amount: float = 1


def parse_labels(spec: str) -> LabelSpec:
    """Read `--labels` without looking at any data. Raises HarnessError for what could never be a budget."""
    if spec in ("all", "folds"):
        return LabelSpec(spec)  # type: ignore[arg-type]
    match = re.fullmatch(r"([+-]?)(?:(\d{1,15})(pc)?|(\d*\.\d+|\d+\.)(?:[eE]([+-]?\d+))?)", spec)
    if match is None:
        raise HarnessError(
            f"labels {spec!r} is not understood; write all, a count (1000), a fraction with a point (0.1), "
            "a count per class (10pc) or folds"
        )
    sign, count, per_class, fraction, exponent = match.groups()
    amount = float(count) if count else float(f"{fraction}e{exponent or 0}")
    if sign == "-" or amount == 0:
        raise HarnessError(f"labels {spec!r}: a budget must be above zero")
    if count:
        return LabelSpec("per_class" if per_class else "count", int(count))
    if amount > 1:
        raise HarnessError(f"labels {spec!r}: a fraction cannot be above 1; a count is written without a point")
    return LabelSpec("fraction", amount)


def make_budgets(
    spec: str,
    labels: np.ndarray | None,
    num_classes: int,
    label_seed: int,
    folds: Sequence[np.ndarray] | None = None,
) -> list[LabelBudget]:
    """Choose the labelled images for `spec`: one budget, or one per fold under `folds`.

    labels: (N,) int of `train`, in [0, num_classes), or None when it has none
    folds: index arrays into `train` where the data set defines them
    Raises HarnessError: unreadable spec, no labels, more labels asked for than there are, no folds.
    """
    wanted = parse_labels(spec)
    if labels is None or num_classes < 1 or len(labels) == 0:
        raise HarnessError(f"unlabelled data asked for a probe (labels {spec!r}): only label-free evaluators can run")
    labels = np.asarray(labels).astype(np.int64)
    if labels.min() < 0 or labels.max() >= num_classes:
        raise HarnessError(f"labels run from {labels.min()} to {labels.max()}, outside 0 to {num_classes - 1}")
    subsets: list[tuple[int | None, np.ndarray]]
    if wanted.kind == "folds":
        if not folds:
            raise HarnessError("labels 'folds': this data set defines no folds of its own; ask for a count, say 1000")
        subsets = [(number, np.asarray(fold).astype(np.int64)) for number, fold in enumerate(folds)]
    else:
        order = _hash_order(np.arange(len(labels)), label_seed)
        by_class = [order[labels[order] == c] for c in range(num_classes)]
        counts = _class_counts(spec, wanted, np.array([len(members) for members in by_class]))
        subsets = [(None, np.concatenate([members[:n] for members, n in zip(by_class, counts, strict=True)]))]
    return [_budget(spec, label_seed, number, subset, labels) for number, subset in subsets]


def indices_digest(indices: np.ndarray) -> str:
    """SHA-256 over the sorted indices as little-endian int64: the same set has the same digest in any order."""
    return hashlib.sha256(np.sort(indices).astype("<i8").tobytes()).hexdigest()


def _hash_order(indices: np.ndarray, label_seed: int) -> np.ndarray:
    """Sort dataset indices by hash(label_seed, index); salted, so that no training order or view shares the hash."""
    positions = torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64))
    keys = mix(hash_seeds(label_seed, 0, positions) + stream_key("labels"))
    return indices[torch.argsort(keys, stable=True).numpy()]


def _class_counts(spec: str, wanted: LabelSpec, available: np.ndarray) -> np.ndarray:
    """How many images each class gives: (num_classes,) int64. Raises HarnessError where a class has too few."""
    if wanted.kind == "all":
        return available
    num_classes, total = len(available), int(available.sum())
    if wanted.kind == "fraction":
        counts = np.floor(wanted.amount * available + 0.5).astype(np.int64)
        empty = np.flatnonzero((counts == 0) & (available > 0))
        if len(empty):
            need = 0.5 / available[empty].min()
            raise HarnessError(
                f"labels {spec!r} buys none of the {available[empty[0]]} images of class {empty[0]}; "
                f"the smallest fraction that reaches every class is {math.ceil(need * 1e6) / 1e6:g}"
            )
        return counts
    each, remainder = (int(wanted.amount), 0) if wanted.kind == "per_class" else divmod(int(wanted.amount), num_classes)
    if each == 0:
        raise HarnessError(f"labels {spec!r}: {remainder} labels cannot cover {num_classes} classes")
    counts = each + (np.arange(num_classes) < remainder).astype(np.int64)
    short = np.flatnonzero(counts > available)
    if len(short):
        listed = ", ".join(f"class {c} has {available[c]} of {counts[c]}" for c in short[:3])
        more = f" and {len(short) - 3} more classes" if len(short) > 3 else ""
        raise HarnessError(f"labels {spec!r} asks for {counts.sum()} of {total} labels: {listed}{more}")
    return counts


def _budget(spec: str, label_seed: int, fold: int | None, subset: np.ndarray, labels: np.ndarray) -> LabelBudget:
    indices = _hash_order(np.sort(subset), label_seed)
    chosen = labels[indices]
    return LabelBudget(
        spec=spec,
        label_seed=label_seed,
        fold=fold,
        indices=indices,
        rounds=_rounds(chosen),
        sha256=indices_digest(indices),
        smallest_class=int(np.unique(chosen, return_counts=True)[1].min()),
    )


def _rounds(labels: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Stratified (fit, validation) positions for a budget with these labels (B,), in budget order."""
    classes, counts = np.unique(labels, return_counts=True)
    rank = np.empty(len(labels), np.int64)  # of an image within its class
    for c in classes:
        members = labels == c
        rank[members] = np.arange(members.sum())
    smallest = int(counts.min())
    if smallest == 1:
        return ()
    if smallest < CROSS_VALIDATION_BELOW:
        held_out = [rank % smallest == number for number in range(smallest)]
    else:
        share = np.floor(VALIDATION_SHARE * counts + 0.5).astype(np.int64)  # >= 1, because counts >= 5
        held_out = [rank < share[np.searchsorted(classes, labels)]]
    return tuple((np.flatnonzero(~held), np.flatnonzero(held)) for held in held_out)
