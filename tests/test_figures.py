"""The figures: every shape of input gives a picture, whole and the same each time. (They were also looked at.)"""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from harness import figures
from harness.contracts import HarnessError

DIGITS = load_digits()
IMAGES = (DIGITS.images / 16)[:, None].astype(np.float32)
LABELS = DIGITS.target
NAMES = [f"class {index}" for index in range(100)]


def picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def is_whole(data: bytes) -> bool:
    """Nothing touches the border: no text is cut off, and something is drawn."""
    pixels = picture(data)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return bool((border == 255).all() and (pixels < 200).any())


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_one_and_three_channels(channels: int) -> None:
    images = np.repeat(IMAGES[:40], channels, axis=1)
    boxes = np.tile([0.0, 0.0, 3.0, 3.0], (40, 2, 1))
    assert is_whole(figures.views_grid({"view 1": images, "view 2": images[:5]}, {"view 1": boxes}))
    assert is_whole(figures.views_grid({"a rather long name of a view": (images * 255).astype(np.uint8)[:1]}))
    assert is_whole(figures.nearest_neighbours(images, DIGITS.data[:40], [0, 7], labels=LABELS[:40]))
    assert is_whole(figures.first_layer_filters(np.random.default_rng(0).normal(size=(12, channels, 3, 3))))


def test_patches_are_drawn_where_they_are() -> None:
    dark = np.zeros((1, 1, 32, 32), dtype=np.float32)
    without = picture(figures.views_grid({"v": dark}, title=""))
    pixels = picture(figures.views_grid({"v": dark}, {"v": np.array([[[0.0, 16.0, 8.0, 8.0]]])}, title=""))
    changed = np.argwhere((pixels != without).any(axis=2))
    black = (without < 20).all(axis=2)  # the image itself, and a little text
    inside = [np.flatnonzero(black.mean(axis=1) > 0.2), np.flatnonzero(black.mean(axis=0) > 0.2)]
    low, high = np.array([line[0] for line in inside]), np.array([line[-1] for line in inside])
    top, left = (changed.min(axis=0) - low) / (high - low) * 32
    bottom, right = (changed.max(axis=0) - low) / (high - low) * 32
    assert np.allclose([top, left, bottom, right], [16, 0, 24, 8], atol=0.8)


@pytest.mark.parametrize("size", [2, 10, 35, 100])
def test_confusion_of_few_and_many_classes(size: int) -> None:
    true = np.arange(3 * size) % size
    assert is_whole(figures.confusion_matrix(true, (true + (true % 3 == 0)) % size, NAMES[:size]))


@pytest.mark.parametrize("size", [1, 10, 100])
def test_feature_map_of_few_and_many_classes(size: int) -> None:
    features = np.random.default_rng(0).normal(size=(300, 12))
    assert is_whole(figures.feature_map_2d(features, np.arange(300) % size, classes=NAMES))


def test_feature_map_by_tsne_is_the_same_twice() -> None:
    drawn = [figures.feature_map_2d(DIGITS.data[:120], LABELS[:120], "tsne") for _ in range(2)]
    assert is_whole(drawn[0]) and drawn[0] == drawn[1]


def test_degenerate_features_do_not_stop_a_run() -> None:
    flat = np.zeros((20, 1))
    assert is_whole(figures.feature_map_2d(flat, None))
    assert is_whole(figures.nearest_neighbours(IMAGES[:20], np.full((20, 4), np.nan), [3], num_neighbours=50))
    assert is_whole(figures.first_layer_filters(np.zeros((3, 2, 1, 1))))


def test_loss_curves() -> None:
    points = [(0, 3.0), (10, float("nan")), (20, 1.0)]
    assert is_whole(figures.loss_curve(points, "a title " * 30))
    assert is_whole(figures.loss_curve({f"rate {index}": points for index in range(12)}, "many"))
    assert is_whole(figures.loss_curve([], "nothing yet"))


def test_svg_is_the_same_twice_and_names_no_date() -> None:
    drawn = [figures.loss_curve([(0, 1), (1, 0.5)], "x", image_format="svg") for _ in range(2)]
    assert drawn[0] == drawn[1] and drawn[0].startswith(b"<?xml") and b"<dc:date>" not in drawn[0]


def test_nothing_to_draw_is_a_clear_error() -> None:
    with pytest.raises(HarnessError, match="no views"):
        figures.views_grid({})
