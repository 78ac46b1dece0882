"""Label budgets: nested, balanced, paid-for validation, and one clear line for what cannot be had."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.augment import hash_seeds, mix, stream_key
from harness.budgets import indices_digest, make_budgets, parse_labels
from harness.contracts import HarnessError, LabelBudget

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 130))


def _budget(spec: str, labels: np.ndarray = LABELS, seed: int = 0) -> LabelBudget:
    return make_budgets(spec, labels, int(labels.max()) + 1, seed)[0]


@pytest.mark.parametrize(
    ("spec", "kind", "amount"),
    [
        ("all", "all", 1), ("folds", "folds", 1), ("1000", "count", 1000), ("10pc", "per_class", 10),
        ("0.1", "fraction", 0.1), (".25", "fraction", 0.25), ("1.", "fraction", 1), ("1.0e-2", "fraction", 0.01),
    ],
)  # fmt: skip
def test_specs(spec: str, kind: str, amount: float) -> None:
    assert (parse_labels(spec).kind, parse_labels(spec).amount) == (kind, amount)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "not understood"), ("many", "not understood"), ("1e3", "not understood"), ("10 pc", "not understood"),
        ("nan", "not understood"), ("0", "above zero"), ("0pc", "above zero"), ("0.0", "above zero"),
        ("-5", "above zero"), ("-0.5", "above zero"), ("1.5", "above 1"), ("5", "cannot cover 10 classes"),
        ("2000", "class 0 has 130 of 200"), ("131pc", "1310 of 1300"), ("0.001", "none of the 130 images of class 0"),
        ("folds", "defines no folds"),
    ],
)  # fmt: skip
def test_errors_are_one_line(spec: str, says: str) -> None:
    with pytest.raises(HarnessError, match=says) as error:
        _budget(spec)
    assert "\n" not in str(error.value)


def test_unlabelled_data_is_refused() -> None:
    with pytest.raises(HarnessError, match="unlabelled data asked for a probe"):
        make_budgets("all", None, 0, 0)


def test_the_smallest_fraction_it_names_works() -> None:
    labels = np.repeat([0, 1], [1000, 7])
    with pytest.raises(HarnessError, match="reaches every class is") as error:
        _budget("0.01", labels)
    fraction = str(error.value).rpartition(" ")[2]
    assert (labels[_budget(fraction, labels).indices] == 1).sum() == 1


def test_all_takes_everything_however_imbalanced() -> None:
    labels = np.repeat([0, 1, 2], [50, 7, 300])
    budget = _budget("all", labels)
    assert sorted(budget.indices) == list(range(357)) and budget.smallest_class == 7


def test_remainder_goes_to_the_first_classes() -> None:
    assert np.bincount(LABELS[_budget("1003").indices]).tolist() == [101] * 3 + [100] * 7


def test_order_is_that_of_the_hash() -> None:
    indices = torch.from_numpy(_budget("500", seed=3).indices)
    keys = mix(hash_seeds(3, 0, indices) + stream_key("labels"))
    assert bool((keys[1:] > keys[:-1]).all())
    assert set(_budget("500", seed=3).indices) != set(_budget("500", seed=4).indices)


def test_subsets_are_fixed() -> None:
    """Integers of the golden test: they may change with NUMBERS_VERSION only."""
    ordered = np.repeat(np.arange(10), 130)
    assert _budget("1pc", ordered).indices.tolist() == [138, 612, 1165, 975, 823, 327, 474, 1212, 79, 687]
    assert indices_digest(np.array([3, 1, 2])) == hashlib.sha256(struct.pack("<3q", 1, 2, 3)).hexdigest()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(2, 60), min_size=2, max_size=8), st.data())
def test_properties(seed: int, sizes: list[int], data: st.DataObject) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    each = data.draw(st.integers(1, min(sizes)))
    more = data.draw(st.integers(each, min(sizes)))
    total = data.draw(st.integers(len(sizes), each * len(sizes)))
    small, large, count, half, everything = (
        _budget(spec, labels, seed) for spec in (f"{each}pc", f"{more}pc", str(total), "0.5", "all")
    )
    assert np.bincount(labels[small.indices]).tolist() == [each] * len(sizes)
    balance = np.bincount(labels[count.indices])
    assert balance.sum() == total and balance.max() - balance.min() <= 1
    assert np.bincount(labels[half.indices]).tolist() == [int(n / 2 + 0.5) for n in sizes]
    assert set(count.indices) <= set(small.indices) <= set(large.indices) <= set(everything.indices)
    for budget in (small, large, count, half, everything):
        _check_rounds(budget, labels[budget.indices])
        assert budget.sha256 == indices_digest(budget.indices)


def _check_rounds(budget: LabelBudget, labels: np.ndarray) -> None:
    sizes = np.bincount(labels)
    smallest = sizes.min()
    assert budget.smallest_class == smallest
    assert len(budget.rounds) == (0 if smallest == 1 else smallest if smallest < 5 else 1)
    for fit, validation in budget.rounds:
        assert sorted([*fit, *validation]) == list(range(len(labels)))
        held_out = np.bincount(labels[validation], minlength=len(sizes))
        assert (held_out >= 1).all() and (np.bincount(labels[fit], minlength=len(sizes)) >= 1).all()
        if smallest >= 5:
            assert np.abs(held_out - 0.2 * sizes).max() <= 0.5
    if 2 <= smallest < 5:  # cross-validation: every image is held out once
        assert sorted(np.concatenate([validation for _, validation in budget.rounds])) == list(range(len(labels)))


def test_held_out_images_stay_held_out_in_larger_budgets() -> None:
    small, large = _budget("100"), _budget("1000")
    fit = set(large.indices[large.rounds[0][0]])
    assert not fit & set(small.indices[small.rounds[0][1]])


def test_folds_are_the_data_sets_own() -> None:
    folds = [np.arange(100) + 100 * number for number in range(10)]
    budgets = make_budgets("folds", LABELS, 10, 0, folds)
    assert [budget.fold for budget in budgets] == list(range(10))
    for budget, fold in zip(budgets, folds, strict=True):
        assert set(budget.indices) == set(fold) and budget.sha256 == indices_digest(fold)
    assert _budget("all").fold is None


def test_a_tiny_class_still_gives_a_valid_budget() -> None:
    labels = np.repeat([0, 1], [40, 3])
    assert len(_budget("all", labels).rounds) == 3
    _check_rounds(_budget("all", labels), labels[_budget("all", labels).indices])
