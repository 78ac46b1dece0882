"""Robustness: every corruption against a plain reference, exactness, and what counts as seen."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.color import hsv2rgb, rgb2hsv
from torch import Tensor

from harness.augment import hash_seeds, uniform
from harness.evaluators.linear_probe import LinearProbe
from harness.evaluators.robustness import CORRUPTIONS, SEVERITIES, Robustness, corrupt, seen_in_views


def _images(channels: int, side: int = 28, count: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    return torch.randint(0, 256, (count, channels, side, side), generator=generator, dtype=torch.uint8)


def _sign(corruption: str, severity: int, index: int) -> int:
    """The direction of one test image, hashed here once more."""
    seeds = hash_seeds(severity, 0, torch.tensor([index]))
    return -1 if float(uniform(seeds, f"robustness.{corruption}")) < 0.5 else 1


def _warped(image: np.ndarray, matrix: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """One channel, one pixel at a time: reads source = matrix @ (pixel - middle) + middle + offset, black outside."""
    out = np.zeros(image.shape)
    middle = (np.array(image.shape) - 1) / 2
    for pixel in np.ndindex(image.shape):
        source = matrix @ (np.array(pixel) - middle) + middle + offset
        low = np.floor(source).astype(int)
        for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
            place = low + corner
            if (place >= 0).all() and (place < image.shape).all():
                out[pixel] += np.prod(1 - np.abs(source - place)) * image[tuple(place)]
    return out


def _reference(corruption: str, severity: int, image: np.ndarray, index: int) -> np.ndarray:
    """(C, H, W) float in [0, 1] -> the same, from the description at the head of the module."""
    channels, height, width = image.shape
    eye, nowhere = np.eye(2), np.zeros(2)
    if corruption == "translate":
        pixels = severity * height / 28
        moved = -pixels * np.array([_sign("translate.2", severity, index), _sign("translate.3", severity, index)])
        return np.stack([_warped(plane, eye, moved) for plane in image])
    if corruption == "rotate":
        angle = 0.2 * severity * _sign("rotate", severity, index)
        turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        return np.stack([_warped(plane, turn, nowhere) for plane in image])
    if corruption == "scale":
        return np.stack([_warped(plane, eye / (1 - severity / 10), nowhere) for plane in image])
    if corruption == "brightness":
        if channels == 1:
            return np.clip(image + severity / 10, 0, 1)
        hsv = rgb2hsv(image.transpose(1, 2, 0))
        hsv[..., 2] = np.clip(hsv[..., 2] + severity / 10, 0, 1)
        return hsv2rgb(hsv).transpose(2, 0, 1)
    assert corruption == "stripe"
    wide = round([2, 3, 4, 5, 7][severity - 1] * width / 28)
    out = image.copy()
    for column in [*range(wide), *range(width - wide, width)]:
        out[:, :, column] = 1 - image[:, :, column]
    return out


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("corruption", ["translate", "rotate", "scale", "brightness", "stripe"])
def test_against_a_plain_reference(corruption: str, channels: int) -> None:
    images, indices = _images(channels, side=14, count=3), torch.tensor([5, 0, 77])
    for severity in (1, 3, 5):
        ours = corrupt(images, indices, corruption, severity).double().numpy()
        for place, index in enumerate(indices.tolist()):
            expected = _reference(corruption, severity, images[place].double().numpy() / 255, index) * 255
            assert np.abs(ours[place] - expected).max() < 0.51  # rounding to uint8


def test_a_translation_at_28_pixels_moves_whole_pixels() -> None:
    images = _images(1)
    moved = corrupt(images, torch.arange(6), "translate", 3)
    for index in range(6):
        down, right = 3 * _sign("translate.2", 3, index), 3 * _sign("translate.3", 3, index)
        rows, columns = (slice(max(0, s), 28 + min(0, s)) for s in (down, right))
        back = [slice(max(0, -s), 28 + min(0, -s)) for s in (down, right)]
        assert torch.equal(moved[index, 0, rows, columns], images[index, 0, back[0], back[1]])
        assert int((moved[index, 0] == 0).sum()) >= 28 * 28 - 25 * 25  # black came in


def test_blur_is_scipys_away_from_its_truncation() -> None:
    images = _images(1, side=28)
    ours = corrupt(images, torch.arange(6), "blur", 1).double().numpy()
    expected = gaussian_filter(images.double().numpy(), (0, 0, 1, 1), mode="mirror", truncate=3)
    assert np.abs(ours - expected).max() < 0.51


def test_noise_has_the_stated_deviation_and_no_pattern() -> None:
    grey = torch.full((200, 1, 28, 28), 128, dtype=torch.uint8)
    for severity, deviation in zip((1, 2, 3), (0.08, 0.12, 0.18), strict=True):
        noise = corrupt(grey, torch.arange(200), "noise", severity).double() / 255 - 128 / 255
        assert float(noise.std()) == pytest.approx(deviation, rel=0.02)
        assert abs(float(noise.mean())) < 0.002
        # neighbours and images are independent: correlations of 156,800 pairs stay below 4 / sqrt(n)
        assert abs(float((noise[..., 1:] * noise[..., :-1]).mean())) < 0.011 * deviation**2
        assert abs(float((noise[1:] * noise[:-1]).mean())) < 0.011 * deviation**2


def test_occlusion_hides_one_square_anywhere() -> None:
    black = torch.zeros(300, 1, 20, 20, dtype=torch.uint8)
    for severity, side in zip(SEVERITIES, (4, 6, 8, 10, 12), strict=True):
        hidden = corrupt(black, torch.arange(300), "occlusion", severity)[:, 0]
        assert set(hidden.unique().tolist()) == {0, 128}
        assert bool(((hidden == 128).sum((1, 2)) == side * side).all())
        rows = (hidden == 128).any(2)
        assert bool((rows.sum(1) == side).all())
        assert set(rows.int().argmax(1).tolist()) == set(range(20 - side + 1))  # every place is used


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_an_image_is_corrupted_the_same_whatever_else_is_in_the_batch(corruption: str, channels: int) -> None:
    images, indices = _images(channels, side=20), torch.tensor([3, 1, 4, 15, 9, 2])
    for severity in SEVERITIES:
        together = corrupt(images, indices, corruption, severity)
        assert together.shape == images.shape and together.dtype == torch.uint8
        assert torch.equal(together, corrupt(images, indices, corruption, severity))
        alone = torch.cat([corrupt(images[i : i + 1], indices[i : i + 1], corruption, severity) for i in range(6)])
        assert torch.equal(together, alone)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_higher_severity_is_further_from_the_image(corruption: str) -> None:
    shape = torch.arange(28, dtype=torch.float64) - 13.5
    blobs = 255 * torch.exp(-(shape[:, None].square() + shape[None, :].square() * 2) / 60)
    images = blobs.round().to(torch.uint8).expand(200, 1, 28, 28)
    distances = [
        float((corrupt(images, torch.arange(200), corruption, s).double() - images.double()).square().mean())
        for s in SEVERITIES
    ]
    assert distances == sorted(distances) and distances[0] > 0 and len(set(distances)) == len(SEVERITIES)


def test_severities_draw_their_own_directions() -> None:
    signs = {severity: [_sign("rotate", severity, index) for index in range(200)] for severity in SEVERITIES}
    for values in signs.values():
        assert 60 < values.count(1) < 140
    assert signs[1] != signs[2]


def test_rows_agree_with_the_probe_and_with_a_loop_over_images(make_task: Any) -> None:
    task = make_task("300")
    probe, ours = LinearProbe(LinearProbe.Config()).evaluate(task), Robustness(Robustness.Config()).evaluate(task)
    values = {(m.readout, m.split, m.metric): m.value for m in ours.measurements}
    assert len(values) == len(ours.measurements)
    for m in probe.measurements:
        if m.metric == "top1":
            assert values[m.readout, m.split, "top1_clean"] == m.value
    for readout in ("gap", "spatial", "spatial_pca"):
        assert probe.chosen[f"{readout}.strength"] == ours.chosen[f"{readout}.strength"]
        each = [values[readout, "test", f"top1_{c}_{s}"] for c in CORRUPTIONS for s in SEVERITIES]
        assert values[readout, "test", "top1_corrupted"] == pytest.approx(np.mean(each))
        assert values[readout, "test", "top1_unseen"] == values[readout, "test", "top1_corrupted"]
        for place, corruption in enumerate(CORRUPTIONS):
            assert values[readout, "test", f"top1_{corruption}"] == pytest.approx(
                np.mean(each[5 * place : 5 * place + 5])
            )
    # one cell by hand: the features of corrupted images, put in the place of the clean ones, read by the plain probe
    indices = torch.arange(len(task.test_images))
    task.test_images = corrupt(task.test_images, indices, "rotate", 4)
    again = LinearProbe(LinearProbe.Config()).evaluate(task)
    for m in again.measurements:
        if (m.split, m.metric) == ("test", "top1"):
            assert values[m.readout, "test", "top1_rotate_4"] == m.value
            assert m.value is not None and m.value < values[m.readout, "test", "top1_clean"]
    assert all(m.n_test == 500 for m in ours.measurements if m.split == "test")


def test_without_a_test_split_nothing_but_validation(make_task: Any) -> None:
    task = make_task("300", has_test=False, poison_test=True)
    found = Robustness(Robustness.Config()).evaluate(task)
    assert {(m.split, m.metric) for m in found.measurements} == {("validation", "top1_clean")}


def test_features_that_are_not_finite_are_said_once(make_task: Any) -> None:
    task = make_task("300")
    bad = task.features("test", "gap")
    bad[3, 0] = math.nan
    task.given["test", "gap"] = bad
    found = Robustness(Robustness.Config()).evaluate(task)
    gap = [(m.metric, m.status) for m in found.measurements if (m.readout, m.split) == ("gap", "test")]
    assert gap == [("status", "NONFINITE")]
    assert any(m.metric == "top1_corrupted" for m in found.measurements if m.readout == "spatial")


@pytest.mark.parametrize(
    ("settings", "side", "seen"),
    [
        ({"shift": 2, "mirror": "auto"}, 28, {"translate"}),
        ({"shift": 0}, 28, set()),
        ({"crop_scale": 0.2, "jitter": 0.5, "blur": "auto"}, 28, {"translate", "scale", "brightness"}),
        ({"crop_scale": 1.0, "jitter": 0.0, "blur": "auto"}, 96, {"blur"}),
        ({"crop_scale": 1, "jitter": 0, "blur": 0.0}, 96, set()),
        ({"shift": 0.2, "zoom": 1.4, "turn": 20.0, "colours": 1.0}, 28, {"translate", "scale", "rotate", "brightness"}),
        ({"noise": 100, "channels": 64}, 28, set()),
        ({"noise": "masking", "level": 0.4}, 28, {"noise"}),
        ({"mask": 0.75}, 28, {"occlusion"}),
    ],
)
def test_what_views_contain_is_told_by_the_settings(settings: dict[str, Any], side: int, seen: set[str]) -> None:
    assert seen_in_views(settings, (), (side, side)) == seen
    assert seen_in_views(settings, ("rotate",), (side, side)) == seen | {"rotate"}


def test_a_corruption_of_the_views_is_not_scored_as_unseen(make_task: Any) -> None:
    settings, declared = {"shift": 2, "jitter": 0.5}, ("rotate",)
    task = make_task("300", method_settings=settings, view_corruptions=declared)
    found = Robustness(Robustness.Config()).evaluate(task)
    assert found.chosen["seen_in_views"] == ["brightness", "rotate", "translate"]
    values = {(m.readout, m.metric): m.value for m in found.measurements if m.split == "test"}
    rest = ("scale", "noise", "blur", "stripe", "occlusion")
    assert values["gap", "top1_unseen"] == pytest.approx(np.mean([values["gap", f"top1_{c}"] for c in rest]))
    every = Robustness(Robustness.Config()).evaluate(make_task("300", view_corruptions=tuple(CORRUPTIONS)))
    assert not any(m.metric == "top1_unseen" for m in every.measurements)


def test_the_encoder_is_left_as_it_was(make_task: Any) -> None:
    task = make_task("300")
    before = {name: tensor.clone() for name, tensor in task.encoder.state_dict().items()}
    Robustness(Robustness.Config()).evaluate(task)
    assert all(torch.equal(before[name], tensor) for name, tensor in task.encoder.state_dict().items())
    first = next(i for i, event in enumerate(task.events) if "test" in event)
    assert all("test" in event for event in task.events[first:])
