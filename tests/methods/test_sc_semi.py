"""sc_semi: its two terms against loops in float64, what a step and an identity of it hold, and that labels stay inside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import harness
from harness.arms import Request, make_plan, training_batches
from harness.batches import MixedBatches
from harness.config import Layers
from harness.contracts import Batch, HarnessError
from harness.encoders import build
from harness.methods.sc import SpatialContrasting
from harness.methods.sc_semi import SpatialContrastingSemi, labelled_cross_entropy

STEP = torch.tensor(0)
CPU = torch.device("cpu")


def looped_cross_entropy(scores: Tensor, labels: list[int]) -> float:
    """-log of the label's share, row by row, in float64."""
    losses = []
    for row, label in zip(scores.detach().double().numpy(), labels, strict=True):
        if label >= 0:
            shares = np.exp(row - row.max())
            losses.append(-np.log(shares[label] / shares.sum()))
    return float(np.mean(losses))


def looped_contrast(method: SpatialContrastingSemi, batch: Batch) -> float:
    """Eq. 4 in both directions with mean patches and L2 distances, pair by pair, in float64."""
    with torch.no_grad():
        feature_map = method.encoder(method.view(batch)).double().numpy()
    corners, cells = method.corners(batch.seeds).numpy(), method.geometries[0].cells
    vectors = np.array([
        [image[:, r : r + cells, c : c + cells].mean((1, 2)) for image, (r, c) in zip(feature_map, draw, strict=True)]
        for draw in corners
    ])  # fmt: skip
    losses = []
    for anchors, others in (vectors, vectors[::-1]):
        for i, anchor in enumerate(anchors):
            nearness = np.array([-np.sqrt(((anchor - other) ** 2).sum()) for other in others])
            losses.append(np.log(np.exp(nearness - nearness[i]).sum()))
    return float(np.mean(losses))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("labels", [[-1, 0, -1, 2, -1, 1], [0, 1, 2, 0, 1, 2], [-1, -1, -1, -1, -1, 2]])
def test_the_loss_is_its_two_terms(
    make_method: Callable[..., Any], make_batch: Callable[..., Batch], labels: list[int], weight: float
) -> None:
    method, batch = make_method(SpatialContrastingSemi, weight=weight), make_batch([5, 9, 1, 30, 22, 7], labels)
    out = method.loss(batch, STEP)
    with torch.no_grad():
        scores = method.classifier(method.encoder(method.view(batch)))
    supervised, contrasting = looped_cross_entropy(scores, labels), looped_contrast(method, batch)
    assert out["supervised"].item() == pytest.approx(supervised, rel=1e-5)
    assert out["sc"].item() == pytest.approx(contrasting, rel=1e-5)
    assert out["loss"].item() == pytest.approx(supervised + weight * contrasting, rel=1e-5)
    hits = [int(row.argmax()) == label for row, label in zip(scores, labels, strict=True) if label >= 0]
    assert out["top1"].item() == pytest.approx(np.mean(hits))


def test_the_sc_term_is_scs(make_method: Callable[..., Any], make_batch: Callable[..., Batch]) -> None:
    """Same encoder, same batch, labels unread: to the last bit."""
    for settings in ({}, {"layers": ("conv3", "conv4")}, {"projector": 8, "patches_per_image": 3}):
        semi, plain = make_method(SpatialContrastingSemi, **settings), make_method(SpatialContrasting, **settings)
        batch = make_batch([5, 9, 1, 30], [-1, 0, -1, 2])
        assert torch.equal(semi.loss(batch, STEP)["sc"], plain.loss(batch, STEP)["loss"])


@pytest.mark.parametrize("rows", [1, 7, 32])
def test_labelled_cross_entropy_and_its_gradient(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    scores = torch.randn(rows, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(-1, 5, (rows,), generator=generator)
    labels[0] = 3
    loss, _ = labelled_cross_entropy(scores, labels)
    assert loss.item() == pytest.approx(looped_cross_entropy(scores, labels.tolist()), rel=1e-12)
    (slope,) = torch.autograd.grad(loss, scores)
    expected = (scores.detach().softmax(1) - torch.nn.functional.one_hot(labels.clamp_min(0), 5)) / (labels >= 0).sum()
    torch.testing.assert_close(slope, torch.where((labels >= 0)[:, None], expected, 0.0), rtol=1e-12, atol=1e-14)


def test_no_label_no_supervised_term() -> None:
    loss, top1 = labelled_cross_entropy(torch.randn(4, 3, requires_grad=True), torch.full((4,), -1))
    assert loss.item() == top1.item() == 0


def test_one_graph(
    make_method: Callable[..., Any], make_batch: Callable[..., Batch], assert_one_graph: Callable[..., None]
) -> None:
    assert_one_graph(make_method(SpatialContrastingSemi), make_batch([5, 9, 1, 30], [-1, 0, -1, 2]))


def test_refusals(make_method: Callable[..., Any], make_batch: Callable[..., Batch], toy_info: Any) -> None:
    with pytest.raises(HarnessError, match="without labels"):
        make_method(SpatialContrastingSemi).loss(make_batch([1, 2]), STEP)
    unlabelled = dataclasses.replace(toy_info, classes=None)
    with pytest.raises(HarnessError, match="toy has 0"):
        SpatialContrastingSemi(build("convnet_small", unlabelled), SpatialContrastingSemi.Config(), unlabelled)


# ------------------------------------------------------------------------------------------------- in a whole command


def plan_of(labels: str = "10pc", **overrides: Any) -> Any:
    layers = Layers(flags={"epochs": 2}, overrides=overrides)
    return make_plan(Request("sc_semi", "digits", layers, labels=labels, evaluators=("knn",), control=False))


def test_labels_of_the_fit_part_only_and_every_pretraining_image_without() -> None:
    plan = plan_of()
    arm, material = plan.arms[0], plan.material
    train, (budget,) = material.split("train"), plan.budgets
    fit, validation = (set(budget.indices[rows].tolist()) for rows in budget.rounds[0])
    assert set(arm.labelled.tolist()) == fit
    data = training_batches(arm, material, CPU)
    assert isinstance(data, MixedBatches) and len(data) == len(train) and arm.batch_size == 128
    seen_labelled, seen = set(), set()
    for step in range(2 * data.steps_per_epoch):
        batch = data.at(step)
        assert batch.labels is not None and len(batch) == 128 and int((batch.labels >= 0).sum()) == 64
        for image, label, index in zip(batch.images, batch.labels.tolist(), batch.indices.tolist(), strict=True):
            if label < 0:
                assert torch.equal(image, material.pretrain_images[index])
                seen.add(index)
            else:
                position = int(arm.labelled[index - len(train)])
                assert torch.equal(image, train.images[position]) and label == int(train.labels[position])
                seen_labelled.add(position)
    assert seen_labelled == fit and not seen_labelled & validation
    assert validation & seen  # without their labels, as any pretraining image


@pytest.mark.parametrize(("labels", "batch", "accumulate"), [("10", 128, 32), ("10pc", 32, 16), ("10", 2, 1)])
def test_every_part_of_a_step_has_labelled_images(labels: str, batch: int, accumulate: int) -> None:
    plan = plan_of(labels, batch_size=batch, accumulate=accumulate)
    arm = plan.arms[0]
    data = training_batches(arm, plan.material, CPU)
    assert arm.batch_size == batch
    for step in range(3):
        found = data.at(step).labels
        assert found is not None and len(found) == batch
        parts = found.tensor_split(arm.config.accumulate)
        assert all((part >= 0).any() for part in parts)
    assert arm.config.accumulate <= accumulate


def test_identity_holds_the_labels_and_the_pretraining_data(tmp_path: Path, published_formats: ModuleType) -> None:
    ids = []
    for name, unlabelled, seed in (("a", 20, 0), ("b", 24, 0), ("a", 20, 1)):
        data = tmp_path / name / "pets"
        published_formats.write_image_folder(
            data, np.random.default_rng(0), num_train=24, num_test=0, num_unlabeled=unlabelled
        )
        layers = Layers(overrides={"data.pretrain_split": "unlabeled", "batch_size": 8})
        request = Request("sc_semi", f"folder:{data}", layers, tmp_path, labels="6pc", label_seed=seed,
                          evaluators=("knn",), control=False)  # fmt: skip
        identity = make_plan(request).arms[0].identity
        assert set(identity["data"]) == {"train", "unlabeled"} and identity["labelled"]
        ids.append(make_plan(request).arms[0].pretrain_id)
    assert len(set(ids)) == 3


def test_a_run_beside_the_same_images_seen(tmp_path: Path) -> None:
    common: dict[str, Any] = {"epochs": 2, "labels": "10pc", "evaluators": ["knn"], "tracking": "none", "control": False,
                              "set": {"num_threads": 1, "precision": "fp32"}}  # fmt: skip
    frames = [harness.run(name, "digits", workspace=tmp_path, **common) for name in ("sc", "sc_semi")]
    assert [set(frame.images_seen) for frame in frames] == [set(frames[0].images_seen)] * 2
    assert set(frames[1].labels) == {"10pc"}
    assert "retrieval_top1" in set(frames[1][frames[1].evaluator == "pretext"].metric)
