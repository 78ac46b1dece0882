"""The floors' support vector machine against scikit-learn's own RBF kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.svm import SVC

from harness.evaluators.svm import SupportVectorMachine, squared_distances


def test_squared_distances_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(7, 4)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)
    naive = [[((a.astype(float) - b) ** 2).sum() for b in right] for a in left]
    assert np.allclose(squared_distances(left, right), naive, rtol=1e-12)
    assert (squared_distances(left, left) >= 0).all()


def test_refit_is_scikit_learns_machine(make_task: Any) -> None:
    task = make_task("300")
    result = SupportVectorMachine(SupportVectorMachine.Config(c=(10.0,), gamma=(1.0,))).evaluate(task)
    train, test = (task.features(split, "spatial").numpy().astype(np.float64) for split in ("train", "test"))
    theirs = SVC(C=10.0, gamma="scale").fit(train, task.labels("train")).predict(test)
    assert (result.predictions["spatial"] == theirs).mean() >= 0.998


def test_rows_and_order_of_events(make_task: Any) -> None:
    task = make_task("300")
    result = SupportVectorMachine(SupportVectorMachine.Config()).evaluate(task)
    keys = [(m.readout, m.split, m.metric) for m in result.measurements]
    assert keys == [(r, s, "top1") for s in ("validation", "test") for r in ("gap", "spatial")]
    assert all(m.value > 0.4 for m in result.measurements)
    first = next(i for i, event in enumerate(task.events) if "test" in event)
    assert all("test" in event for event in task.events[first:])
    again = SupportVectorMachine(SupportVectorMachine.Config()).evaluate(make_task("300"))
    assert again.measurements == result.measurements


def test_beyond_the_limit_the_row_says_linear(make_task: Any) -> None:
    result = SupportVectorMachine(SupportVectorMachine.Config(kernel_limit=299)).evaluate(make_task("300"))
    assert {m.metric for m in result.measurements} == {"top1_linear"}


@pytest.mark.parametrize(("spec", "splits"), [("1pc", {"test"}), ("3pc", {"validation", "test"})])
def test_few_labels(make_task: Any, spec: str, splits: set[str]) -> None:
    result = SupportVectorMachine(SupportVectorMachine.Config()).evaluate(make_task(spec))
    assert {m.split for m in result.measurements} == splits


def test_without_a_test_split(make_task: Any) -> None:
    closed = make_task("300", has_test=False, poison_test=True)
    result = SupportVectorMachine(SupportVectorMachine.Config()).evaluate(closed)
    assert {m.split for m in result.measurements} == {"validation"}


def test_features_that_are_not_finite_become_a_status(make_task: Any) -> None:
    task = make_task("300")
    task.given["train", "gap"] = torch.full((300, 16), float("nan"))
    found = SupportVectorMachine(SupportVectorMachine.Config()).evaluate(task).measurements
    assert [(m.metric, m.value, m.status) for m in found if m.readout == "gap"] == [("status", None, "NONFINITE")]
