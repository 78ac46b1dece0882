"""kNN against a slow float64 loop, its clipping and its ties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from harness.evaluators import knn
from harness.evaluators.knn import KNearestNeighbours, predict


def _slow(queries: np.ndarray, bank: np.ndarray, labels: np.ndarray, num_classes: int, k: int) -> list[int]:
    out = []
    for query in queries:
        similarity = [float(query @ b / np.linalg.norm(query) / np.linalg.norm(b)) for b in bank]
        nearest = sorted(range(len(bank)), key=lambda i: (-similarity[i], i))[:k]
        votes = [0.0] * num_classes
        for i in nearest:
            votes[labels[i]] += math.exp(similarity[i] / 0.07)
        out.append(votes.index(max(votes)))
    return out


@pytest.mark.parametrize("k", [1, 5, 20])
def test_against_a_slow_loop(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "SIMILARITIES_AT_ONCE", 1000)  # several chunks, the last one short
    rng = np.random.default_rng(k)
    bank, queries, labels = rng.normal(size=(150, 6)), rng.normal(size=(40, 6)), rng.integers(0, 4, 150)
    fast = predict(torch.from_numpy(queries), torch.from_numpy(bank), torch.from_numpy(labels), 4, [k], 0.07)[0]
    assert fast.tolist() == _slow(queries, bank, labels, 4, k)


def test_ties_go_to_the_earlier_images_and_the_lower_class() -> None:
    bank = torch.ones(50, 3)
    labels = torch.tensor([2, 2, 1, 1] + [0] * 46)
    votes = predict(torch.ones(2, 3), bank, labels, 3, [1, 2, 3, 4, 50], 0.07)
    assert [v.tolist() for v in votes] == [[2, 2], [2, 2], [2, 2], [1, 1], [0, 0]]


def test_zero_features_are_no_error() -> None:
    predicted = predict(torch.zeros(3, 2), torch.zeros(4, 2), torch.tensor([1, 0, 1, 0]), 2, [1], 0.07)
    assert predicted[0].tolist() == [1, 1, 1]


def test_k_is_clipped_to_half_the_smallest_class(make_task: Any) -> None:
    result = KNearestNeighbours(KNearestNeighbours.Config(variants=(1, 200))).evaluate(make_task("10pc"))
    assert result.chosen["gap.k"] == 5
    assert {m.metric for m in result.measurements} == {"top1", "top1_k1"}  # a bank of 100 has no 200 neighbours


def test_rows_and_order_of_events(make_task: Any) -> None:
    task = make_task("300")
    before = {name: tensor.clone() for name, tensor in task.encoder.state_dict().items()}
    result = KNearestNeighbours(KNearestNeighbours.Config()).evaluate(task)
    keys = [(m.readout, m.split, m.metric) for m in result.measurements]
    assert keys == [(r, s, m) for s in ("validation", "test") for r in ("gap", "spatial") for m in ("top1", "top1_k1")]
    assert next(m.value for m in result.measurements if (m.readout, m.split) == ("spatial", "test")) > 0.8
    first = next(i for i, event in enumerate(task.events) if "test" in event)
    assert all("test" in event for event in task.events[first:])
    assert all(torch.equal(before[name], tensor) for name, tensor in task.encoder.state_dict().items())
    again = KNearestNeighbours(KNearestNeighbours.Config()).evaluate(make_task("300"))
    assert again.measurements == result.measurements


def test_without_test_split_and_with_one_label_per_class(make_task: Any) -> None:
    evaluator = KNearestNeighbours(KNearestNeighbours.Config())
    closed = evaluator.evaluate(make_task("300", has_test=False, poison_test=True))
    assert {m.split for m in closed.measurements} == {"validation"}
    assert {m.split for m in evaluator.evaluate(make_task("1pc")).measurements} == {"test"}


def test_features_that_are_not_finite_become_a_status(make_task: Any) -> None:
    task = make_task("300")
    task.given["train", "gap"] = torch.full((300, 16), float("inf"))
    rows = [
        m for m in KNearestNeighbours(KNearestNeighbours.Config()).evaluate(task).measurements if m.readout == "gap"
    ]
    assert [(m.metric, m.value, m.status) for m in rows] == [("status", None, "NONFINITE")]
