"""Calibration: measures against slow loops and scikit-learn, the temperature against a grid, and what pays for it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss
from torch import Tensor
from torch.nn import functional as F

from harness.evaluators.calibration import (
    TEMPERATURES,
    Calibration,
    brier_score,
    expected_calibration_error,
    fit_temperature,
)
from harness.evaluators.linear_probe import LinearProbe, fit_path


def _problem(classes: int = 7, count: int = 400, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits whose own softmax draws the labels, then stretched: the best temperature is near `scale`."""
    generator = torch.Generator().manual_seed(classes)
    logits = 1.5 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(torch.softmax(logits, 1), 1, generator=generator)[:, 0]
    return scale * logits, labels


def _ece_by_hand(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """Guo et al. 2017, eq. 3, one bin and one image at a time."""
    total = 0.0
    for b in range(1, bins + 1):
        members = [
            row for row in range(len(labels)) if (b - 1) / bins < probabilities[row].max() <= b / bins
        ]  # fmt: skip
        if members:
            accuracy = sum(probabilities[row].argmax() == labels[row] for row in members) / len(members)
            confidence = sum(probabilities[row].max() for row in members) / len(members)
            total += len(members) / len(labels) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("classes", [2, 7, 100])
@pytest.mark.parametrize("bins", [15, 4])
def test_expected_calibration_error_against_a_loop(classes: int, bins: int) -> None:
    logits, labels = _problem(classes)
    probabilities = torch.softmax(logits, 1)
    expected = _ece_by_hand(probabilities.numpy(), labels.numpy(), bins)
    assert expected > 0.01
    assert expected_calibration_error(probabilities, labels, bins) == pytest.approx(expected, abs=1e-12)


def test_a_confidence_on_an_edge_belongs_to_the_lower_bin() -> None:
    probabilities = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([1, 1, 0])
    expected = _ece_by_hand(probabilities.numpy(), labels.numpy(), 4)
    assert expected_calibration_error(probabilities, labels, 4) == pytest.approx(expected) == pytest.approx(1.75 / 3)


@pytest.mark.parametrize("classes", [2, 7])
def test_brier_and_nll_are_scikit_learns(classes: int) -> None:
    logits, labels = _problem(classes)
    probabilities = torch.softmax(logits, 1)
    theirs = brier_score_loss(labels, probabilities, labels=range(classes), scale_by_half=False)
    assert brier_score(probabilities, labels) == pytest.approx(theirs, rel=1e-9)
    slow = np.mean(
        [
            sum((p - (k == y)) ** 2 for k, p in enumerate(row))
            for row, y in zip(probabilities.tolist(), labels.tolist(), strict=True)
        ]
    )
    assert brier_score(probabilities, labels) == pytest.approx(slow, rel=1e-12)
    theirs = log_loss(labels, probabilities, labels=range(classes))
    assert float(F.cross_entropy(logits, labels)) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_the_temperature_is_the_best_of_a_fine_grid(scale: float) -> None:
    logits, labels = _problem(scale=scale)
    found = fit_temperature(logits, labels)
    grid = np.geomspace(0.1, 10, 1001)
    nll = [float(F.cross_entropy(logits / t, labels)) for t in grid]
    assert found == pytest.approx(grid[int(np.argmin(nll))], rel=3e-3)
    assert found == pytest.approx(scale, rel=0.2)
    assert float(F.cross_entropy(logits / found, labels)) <= min(nll)


def test_a_temperature_without_a_best_value_is_the_edge() -> None:
    labels = torch.tensor([0, 1, 2])
    right = 50 * torch.eye(3, dtype=torch.float64)  # softmax knows nothing below 1e-21 of it
    assert fit_temperature(right, labels) == TEMPERATURES[0]
    assert fit_temperature(-right, labels) == TEMPERATURES[1]


def _values(task: Any) -> tuple[dict[tuple[Any, ...], Any], dict[str, Any]]:
    found = Calibration(Calibration.Config()).evaluate(task)
    values = {(m.readout, m.split, m.metric): m.value for m in found.measurements}
    assert len(values) == len(found.measurements)
    return values, found.chosen


@pytest.mark.parametrize("labels", ["300", "3pc"])
def test_rows_from_the_probes_own_models(make_task: Any, labels: str) -> None:
    task = make_task(labels)
    values, chosen = _values(task)
    probe = LinearProbe(LinearProbe.Config()).evaluate(make_task(labels))
    theirs = {(m.readout, m.split, m.metric): m.value for m in probe.measurements}
    targets, test_targets = torch.from_numpy(task.labels("train")), torch.from_numpy(task.labels("test"))
    for readout in ("gap", "spatial", "spatial_pca"):
        assert values[readout, "validation", "top1"] == theirs[readout, "validation", "top1"]
        assert values[readout, "test", "nll"] == pytest.approx(theirs[readout, "test", "nll"], rel=1e-9)
    for readout in ("gap", "spatial"):
        features, strength = task.features("train", readout), chosen[f"{readout}.strength"]
        pooled, truth = [], []
        for fit, validation in task.budget.rounds:  # with 3 per class: three rounds
            model = fit_path(features[fit], targets[fit], 10, [strength])[0]
            pooled.append(model.logits(features[validation]))
            truth.append(targets[validation])
        logits, held = torch.cat(pooled), torch.cat(truth)
        assert len(held) == (30 if labels == "3pc" else 60)
        temperature = fit_temperature(logits, held)
        assert values[readout, "validation", "temperature"] == temperature == chosen[f"{readout}.temperature"]
        assert values[readout, "validation", "nll"] == pytest.approx(float(F.cross_entropy(logits, held)))
        assert values[readout, "validation", "nll_scaled"] <= values[readout, "validation", "nll"]
        refit = fit_path(features, targets, 10, [strength])[0].logits(task.features("test", readout))
        for suffix, given in (("", refit), ("_scaled", refit / temperature)):
            p = torch.softmax(given, 1)
            assert values[readout, "test", f"nll{suffix}"] == pytest.approx(float(F.cross_entropy(given, test_targets)))
            ece = _ece_by_hand(p.numpy(), test_targets.numpy(), 15)
            assert values[readout, "test", f"ece{suffix}"] == pytest.approx(ece, abs=1e-9)
            brier = brier_score_loss(test_targets, p / p.sum(1, keepdim=True), labels=range(10), scale_by_half=False)
            assert values[readout, "test", f"brier{suffix}"] == pytest.approx(brier)


def test_the_temperature_is_paid_for_by_the_budget(make_task: Any) -> None:
    task = make_task("300")
    Calibration(Calibration.Config()).evaluate(task)
    first = next(i for i, event in enumerate(task.events) if "test" in event)
    assert all("test" in event for event in task.events[first:])
    closed, _ = _values(make_task("300", has_test=False, poison_test=True))
    assert {(split, metric) for _, split, metric in closed} == {
        ("validation", metric) for metric in ("top1", "nll", "nll_scaled", "temperature")
    }


def test_one_label_per_class_buys_no_temperature(make_task: Any) -> None:
    values, chosen = _values(make_task("1pc"))
    assert {(split, metric) for _, split, metric in values} == {("test", m) for m in ("nll", "ece", "brier")}
    assert "gap.temperature" not in chosen


def test_features_that_are_not_finite_are_said_once(make_task: Any) -> None:
    task = make_task("300")
    bad = task.features("test", "gap")
    bad[3, 0] = math.nan
    task.given["test", "gap"] = bad
    found = Calibration(Calibration.Config()).evaluate(task)
    gap = [(m.metric, m.status) for m in found.measurements if (m.readout, m.split) == ("gap", "test")]
    assert gap == [("status", "NONFINITE")]
    task.given["train", "gap"] = torch.full_like(task.features("train", "gap"), math.inf)
    found = Calibration(Calibration.Config()).evaluate(task)
    assert [(m.split, m.metric) for m in found.measurements if m.readout == "gap"] == [("validation", "status")]
