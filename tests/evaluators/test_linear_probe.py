"""Linear probe: parity with scikit-learn, choice on validation only, awkward features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from harness.evaluators.linear_probe import PATH_TOLERANCE, LinearProbe, fit_path, pca


def _problem(shape: str) -> tuple[Tensor, Tensor, Tensor]:
    """Train features, labels and test features from digits' pixels; `wide` has more columns than rows."""
    x, y = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    if shape == "wide":
        generator = torch.Generator().manual_seed(0)
        x = torch.relu(x @ torch.randn(64, 500, generator=generator, dtype=torch.float64) / 8)
        return x[:300], y[:300], x[1297:]
    kept = y < {"tall": 10, "binary": 2}[shape]
    x, y = x[kept], y[kept]
    cut = len(x) * 2 // 3
    return x[:cut], y[:cut], x[cut:]


def _scikit_learn(rows: np.ndarray, labels: np.ndarray, strength: float) -> tuple[Tensor, Tensor]:
    """weight (D, K), bias (K,). A binary model there is one column w, ours the pair -w/2, w/2: half the penalty."""
    binary = labels.max() == 1
    model = LogisticRegression(C=(2 if binary else 1) / (len(rows) * strength), tol=1e-8, max_iter=10000)
    model.set_params(solver="newton-cg").fit(rows, labels)
    weight, bias = torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_)
    if binary:
        weight, bias = torch.cat([-weight, weight], 1) / 2, torch.cat([-bias, bias]) / 2
    return weight, bias


@pytest.mark.parametrize("shape", ["tall", "wide", "binary"])
@pytest.mark.parametrize("strength", [1e-6, 1e-4, 1e-2, 10.0])
def test_parity_with_scikit_learn(shape: str, strength: float) -> None:
    train, labels, test = _problem(shape)
    ours = fit_path(train, labels, int(labels.max()) + 1, [strength])[0]
    rows = ours.standardise(train)
    weight, bias = _scikit_learn(rows.numpy(), labels.numpy(), strength)
    loss = torch.nn.functional.cross_entropy(rows @ weight + bias, labels) + strength / 2 * weight.square().sum()
    assert ours.converged
    assert ours.objective == pytest.approx(float(loss), rel=1e-4)
    agreed = (ours.logits(test).argmax(1) == (ours.standardise(test) @ weight + bias).argmax(1)).double().mean()
    assert agreed >= 0.999


def test_a_hundred_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100).repeat(5)
    centres = torch.randn(100, 20, generator=generator)
    train = centres[labels] + 0.3 * torch.randn(500, 20, generator=generator)
    ours = fit_path(train, labels, 100, [1e-3])[0]
    weight, bias = _scikit_learn(ours.standardise(train).numpy(), labels.numpy(), 1e-3)
    test = centres[labels] + 0.3 * torch.randn(500, 20, generator=generator)
    assert ours.converged
    assert torch.equal(ours.logits(test).argmax(1), (ours.standardise(test) @ weight + bias).argmax(1))


def test_the_loose_path_is_within_its_tolerance_of_the_optimum() -> None:
    train, labels, _ = _problem("wide")
    strengths = np.geomspace(1e2, 1e-6, 12).tolist()
    path = fit_path(train, labels, 10, strengths, PATH_TOLERANCE)
    for strength, model in zip(strengths, path, strict=True):
        best = fit_path(train, labels, 10, [strength])[0].objective
        assert model.converged
        assert best <= model.objective * (1 + 1e-6) <= best * (1 + 3 * PATH_TOLERANCE)


def test_constant_and_scaled_features_change_nothing() -> None:
    train, labels, test = _problem("tall")
    plain = fit_path(train, labels, 10, [1e-3])[0].logits(test)
    odd = [torch.cat([x * 1e4 + 3, torch.full((len(x), 2), 0.1)], 1).float() for x in (train, test)]
    assert torch.equal(fit_path(odd[0], labels, 10, [1e-3])[0].logits(odd[1]).argmax(1), plain.argmax(1))


def test_a_class_without_rows_is_never_predicted() -> None:
    train, labels, test = _problem("tall")
    kept = (labels != 3) & (labels != 9)
    logits = fit_path(train[kept], labels[kept], 10, [1e-3])[0].logits(test)
    assert bool(torch.isfinite(logits).all())
    assert not np.isin(logits.argmax(1).numpy(), [3, 9]).any()


def test_all_features_constant() -> None:
    model = fit_path(torch.ones(20, 4), torch.arange(20) % 2, 2, [1e-3])[0]
    assert model.converged
    assert torch.allclose(model.logits(torch.ones(1, 4)), torch.zeros(1, 2, dtype=torch.float64), atol=1e-6)


def test_constant_features_of_classes_of_unequal_size() -> None:
    """Nothing but the classes' shares can be learnt from features of a collapsed network."""
    labels = torch.tensor([0] * 12 + [1] * 5 + [2] * 3)
    for model in fit_path(torch.ones(20, 4), labels, 4, [1e2, 1e-6]):
        shares = torch.softmax(model.logits(torch.ones(1, 4)), 1)[0]
        assert torch.allclose(shares, torch.tensor([12, 5, 3, 0], dtype=torch.float64) / 20, atol=1e-4)


def test_pca_spans_the_same_space_as_scikit_learn() -> None:
    train, _, test = _problem("tall")
    mean, axes = pca(train, 10)
    ours = (test - mean) @ axes
    theirs = torch.from_numpy(PCA(10, svd_solver="full").fit(train.numpy()).transform(test.numpy()))
    assert torch.allclose(ours.abs().flip(1), theirs.abs(), atol=1e-8)


def test_rows_and_order_of_events(make_task: Any) -> None:
    task = make_task("300")
    before = {name: tensor.clone() for name, tensor in task.encoder.state_dict().items()}
    result = LinearProbe(LinearProbe.Config()).evaluate(task)
    keys = [(m.readout, m.split, m.metric) for m in result.measurements]
    wanted = [(r, "validation", "top1") for r in ("gap", "spatial", "spatial_pca")]
    wanted += [(r, "test", m) for r in ("gap", "spatial", "spatial_pca") for m in ("top1", "nll")]
    assert keys == wanted
    assert all(m.value is not None and np.isfinite(m.value) and m.converged for m in result.measurements)
    top1 = {(m.readout, m.split): m.value for m in result.measurements if m.metric == "top1"}
    assert top1["spatial", "test"] > 0.8 and top1["gap", "test"] > 0.3
    assert result.measurements[0].n_test == 60
    first = next(i for i, event in enumerate(task.events) if "test" in event)
    assert all("test" in event for event in task.events[first:])
    assert set(result.predictions) == {"gap", "spatial", "spatial_pca"}
    after = task.encoder.state_dict()
    assert not task.encoder.training and all(torch.equal(before[name], after[name]) for name in before)
    again = LinearProbe(LinearProbe.Config()).evaluate(make_task("300"))
    assert again.measurements == result.measurements


def test_validation_rows_without_a_test_split(make_task: Any) -> None:
    task = make_task("300", has_test=False, poison_test=True)
    result = LinearProbe(LinearProbe.Config()).evaluate(task)
    assert {m.split for m in result.measurements} == {"validation"} and not result.predictions


def test_one_label_per_class_uses_the_default_strength(make_task: Any) -> None:
    result = LinearProbe(LinearProbe.Config()).evaluate(make_task("1pc"))
    assert {m.split for m in result.measurements} == {"test"}
    assert result.chosen["gap.strength"] == LinearProbe.Config().default_strength


def test_cross_validation_counts_every_image_once(make_task: Any) -> None:
    result = LinearProbe(LinearProbe.Config()).evaluate(make_task("3pc"))
    assert result.measurements[0].split == "validation" and result.measurements[0].n_test == 30


def test_an_edge_of_the_path_is_flagged(make_task: Any) -> None:
    narrow = LinearProbe.Config(weakest=1.0, strongest=100.0, num_strengths=3)
    assert LinearProbe(narrow).evaluate(make_task("300")).chosen["spatial.at_edge"] is True


def test_shuffled_labels_give_chance(make_task: Any) -> None:
    task = make_task("1000")
    task.train_labels = np.random.default_rng(0).permutation(task.train_labels)
    result = LinearProbe(LinearProbe.Config()).evaluate(task)
    for m in result.measurements:
        if m.metric == "top1":
            assert abs(m.value - 0.1) < 5 * (0.09 / m.n_test) ** 0.5


def test_predictions_do_not_depend_on_test_labels(make_task: Any) -> None:
    honest, planted = make_task("300"), make_task("300")
    planted.test_labels = (planted.test_labels + 1) % 10
    a, b = (LinearProbe(LinearProbe.Config()).evaluate(task) for task in (honest, planted))
    assert all(np.array_equal(a.predictions[name], b.predictions[name]) for name in a.predictions)
    assert a.chosen == b.chosen


def test_an_encoder_that_has_collapsed_to_one_point_predicts_the_commonest_class(make_task: Any) -> None:
    """All readouts, the principal components of constant features, of which there are none, included."""
    task = make_task()
    with torch.no_grad():
        for parameter in task.encoder.parameters():
            parameter.zero_()
        assert task.features("test", "spatial").std(0).max() == 0
    rows = LinearProbe(LinearProbe.Config()).evaluate(task).measurements
    commonest = np.bincount(task.labels("train")).argmax()
    top1 = {row.readout: row.value for row in rows if row.split == "test" and row.metric == "top1"}
    assert set(top1) == {"gap", "spatial", "spatial_pca"}
    assert set(top1.values()) == {float((task.test_labels == commonest).mean())}


def test_features_that_are_not_finite_become_a_status(make_task: Any) -> None:
    task = make_task("300")
    broken = task.features("train", "gap").clone()
    broken[0, 0] = float("nan")
    task.given["train", "gap"] = broken
    rows = [m for m in LinearProbe(LinearProbe.Config()).evaluate(task).measurements if m.readout == "gap"]
    assert [(m.metric, m.value, m.status) for m in rows] == [("status", None, "NONFINITE")]
