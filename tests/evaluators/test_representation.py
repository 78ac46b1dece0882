"""RankMe, LiDAR, alignment, uniformity against naive versions; the collapse alarm; values that are not finite."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import fractional_matrix_power

from harness.evaluators import representation
from harness.evaluators.representation import Representation


def _views() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(30, 1, 5)) * [3, 2, 1, 1, 0.1] + 0.3 * rng.normal(size=(30, 4, 5))


def _exp_entropy(spectrum: list[float]) -> float:
    total = sum(spectrum)
    shares = [value / total + 1e-7 for value in spectrum]
    return math.exp(-sum(p * math.log(p) for p in shares))


def test_effective_rank_against_eigenvalues() -> None:
    x = _views()[:, 0]
    naive = _exp_entropy(list(np.sqrt(np.linalg.eigvalsh(x.T @ x))))
    assert representation.effective_rank(torch.from_numpy(x)) == pytest.approx(naive, rel=1e-9)


def test_effective_rank_of_orthogonal_rows_is_their_number() -> None:
    assert representation.effective_rank(torch.eye(8, dtype=torch.float64)) == pytest.approx(8, rel=1e-4)


def test_lidar_against_matrix_roots() -> None:
    views = _views()
    means = views.mean(1)
    between = np.cov(means.T)
    within = sum((v - m)[:, None] * (v - m) for rows, m in zip(views, means, strict=True) for v in rows)
    root = fractional_matrix_power(within / (30 * 3) + 1e-4 * np.eye(5), -0.5)
    naive = _exp_entropy(list(np.linalg.eigvalsh(root @ between @ root)))
    assert representation.lidar(torch.from_numpy(views)) == pytest.approx(naive, rel=1e-8)


def test_alignment_and_uniformity_against_loops() -> None:
    views = _views()
    unit = views / np.linalg.norm(views, axis=2, keepdims=True)
    pairs = [((a - b) ** 2).sum() for i, a in enumerate(unit[:, 0]) for b in unit[:i, 0]]
    left, right = torch.from_numpy(views[:, 0]), torch.from_numpy(views[:, 1])
    assert representation.uniformity(left) == pytest.approx(math.log(np.exp(-2 * np.array(pairs)).mean()), rel=1e-9)
    assert representation.alignment(left, right) == pytest.approx(
        ((unit[:, 0] - unit[:, 1]) ** 2).sum(1).mean(), rel=1e-9
    )


def test_isotropic_features_have_the_largest_std() -> None:
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert representation.feature_std(x) == pytest.approx(1 / 4, rel=0.01)


def _evaluate(task: Any) -> dict[str, Any]:
    result = Representation(Representation.Config(num_images=64, num_views=3)).evaluate(task)
    assert all(m.split == "pretrain" and m.readout == "gap" for m in result.measurements)
    return {m.metric: m for m in result.measurements}


def test_rows_without_labels_or_test(make_task: Any) -> None:
    task = make_task(poison_test=True)
    before = {name: tensor.clone() for name, tensor in task.encoder.state_dict().items()}
    rows = _evaluate(task)
    assert set(rows) == {"effective_rank", "lidar", "alignment", "uniformity", "feature_std"}
    assert all(math.isfinite(m.value) and m.collapsed is False for m in rows.values())
    assert not any("labels" in event for event in task.events)
    assert all(torch.equal(before[name], tensor) for name, tensor in task.encoder.state_dict().items())
    assert _evaluate(make_task()) == rows
    assert _evaluate(make_task(seed=1)) == rows  # one fixed set of views


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_constant_features_are_collapsed(make_task: Any, constant: float) -> None:
    task = make_task()
    task.given["pretrain", "gap"] = torch.full((100, 16), constant)
    task.encoder.read = lambda feature_map, readout: torch.full((len(feature_map), 16), constant)
    rows = _evaluate(task)
    assert all(m.collapsed and math.isfinite(m.value) for m in rows.values()) and len(rows) == 5


def test_one_direction_is_collapsed(make_task: Any) -> None:
    task = make_task()
    task.given["pretrain", "gap"] = torch.randn(100, 1) * torch.randn(1, 16)
    assert _evaluate(task)["effective_rank"].collapsed


def test_features_that_are_not_finite_become_a_status(make_task: Any) -> None:
    task = make_task()
    task.given["pretrain", "gap"] = torch.full((100, 16), float("nan"))
    rows = _evaluate(task)
    assert set(rows) == {"status"} and rows["status"].value is None and rows["status"].status == "NONFINITE"
