"""Feature maps: the plane is PCA's, the sheet holds every image in its place, the document says where each point is."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from harness import feature_maps, figures

DIGITS = load_digits()


def test_the_plane_is_that_of_pca() -> None:
    features = DIGITS.data[:120]
    found = feature_maps.plane(features, "pca")
    expected = PCA(2).fit(features)
    theirs = expected.transform(features)
    assert np.allclose(np.abs(found.points), np.abs(theirs), atol=1e-6)
    assert found.shares == pytest.approx(tuple(expected.explained_variance_ratio_))
    assert list(found.kept) == list(range(120))


def test_a_plane_made_before_gives_the_same_picture() -> None:
    features, labels = DIGITS.data[:60], DIGITS.target[:60]
    made = feature_maps.plane(features, "tsne")
    assert figures.feature_map_2d(features, labels, "tsne", plane=made) == figures.feature_map_2d(
        features, labels, "tsne"
    )


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 8), (1, 60), (3, 61)])
def test_every_image_lies_in_its_place_of_the_sheet(channels: int, side: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, channels, side, side), dtype=np.uint8)
    picture = np.asarray(Image.open(io.BytesIO(feature_maps.sheet(images))).convert("RGB")).astype(float)
    step = -(-side // feature_maps.THUMBNAIL_SIDE)
    small = side // step
    assert small <= feature_maps.THUMBNAIL_SIDE
    assert picture.shape == (3 * small, 3 * small, 3)  # seven images on a grid of three by three
    for index, image in enumerate(images):
        row, column = divmod(index, 3)
        tile = picture[row * small : (row + 1) * small, column * small : (column + 1) * small]
        for y in range(small):
            for x in range(small):
                mean = image[:, y * step : (y + 1) * step, x * step : (x + 1) * step].mean(axis=(1, 2))
                assert tile[y, x] == pytest.approx(np.broadcast_to(mean, 3), abs=0.51)


def test_the_document_keeps_shape_and_order() -> None:
    points = np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 2.0]])
    plane = feature_maps.Plane(points, np.arange(3), (0.7, 0.2))
    found = json.loads(feature_maps.document({"pca": plane}, np.array([1, 0, 1]), ["a", "b"], {"readout": "gap"}))
    assert found["pca"] == [[0.0, 0.25], [1.0, 0.25], [1.0, 0.75]]  # the longer side fills the square
    assert found["labels"] == [1, 0, 1] and found["classes"] == ["a", "b"] and found["readout"] == "gap"
    assert found["columns"] == 2
