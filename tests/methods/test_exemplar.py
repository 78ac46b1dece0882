"""Exemplar: the softmax over surrogate classes against loops, the transformations' laws, one graph, that it learns."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from skimage.transform import EuclideanTransform
from skimage.transform import warp as skimage_warp

from harness.augment import hash_seeds, uniform
from harness.contracts import Batch, DatasetInfo
from harness.encoders import build
from harness.methods.exemplar import Exemplar, exemplar_loss, recolour, warp

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(16, 16), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3, counts={},
    licence="", citation="", default_encoder="convnet_small", pretrain_split="train", mirror_keeps_label=False,
)  # fmt: skip


def batch_of(count: int = 8, epoch: int = 0) -> Batch:
    noise = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = (torch.nn.functional.interpolate(noise, size=16, mode="bilinear") * 255).to(torch.uint8)
    return Batch(images, None, torch.arange(count), hash_seeds(0, epoch, torch.arange(count)))


def unit(vector: list[float]) -> list[float]:
    norm = math.hypot(*vector)
    return [value / norm for value in vector]


def test_loss_against_loops() -> None:
    """-log softmax over the classes; a class's row is the direction of its copies' sum, the copy itself left out."""
    copies = torch.randn(3, 5, 7, dtype=torch.float64)
    points = [[unit(vector) for vector in each] for each in copies.tolist()]
    terms = []
    for v in range(3):
        for i in range(5):
            scores = []
            for j in range(5):
                members = [points[u][j] for u in range(3) if not (j == i and u == v)]
                row = unit([math.fsum(values) for values in zip(*members, strict=True)])
                scores.append(math.fsum(a * b for a, b in zip(points[v][i], row, strict=True)) / 0.3)
            terms.append(math.log(math.fsum(map(math.exp, scores))) - scores[i])
    assert exemplar_loss(copies, 0.3).item() == pytest.approx(math.fsum(terms) / len(terms), rel=1e-12)


def test_chance_is_log_of_the_classes() -> None:
    assert exemplar_loss(torch.ones(4, 9, 6), 0.2).item() == pytest.approx(math.log(9), rel=1e-6)


def test_warp_is_the_similarity_it_says() -> None:
    """Against scikit-image, with the same drawn numbers, on a smooth image and away from its border."""
    rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(32.0), indexing="ij")
    image = (0.5 + 0.4 * torch.sin(rows / 5) * torch.cos(columns / 6)).float()
    seeds = hash_seeds(0, 0, torch.arange(4))
    found = warp(image.expand(4, 1, 24, 32), seeds, "test", 0.1, 1.3, 20)[:, 0]
    drawn = (2 * uniform(seeds, "test", (4,)) - 1).double()
    centre = np.array([15.5, 11.5])  # x, y
    for sample in range(4):
        zoom, angle = 1.3 ** float(drawn[sample, 0]), math.radians(20) * float(drawn[sample, 1])
        turn = EuclideanTransform(rotation=angle).params[:2, :2] / zoom
        offset = np.array([32 * 0.1 * float(drawn[sample, 2]), 24 * 0.1 * float(drawn[sample, 3])])

        def source(points: np.ndarray, turn: np.ndarray = turn, offset: np.ndarray = offset) -> np.ndarray:
            return (points - centre) @ turn.T + centre + offset

        expected = skimage_warp(image.numpy(), source, order=1, mode="edge")
        assert np.abs(found[sample].numpy() - expected)[6:-6, 8:-8].max() < 2e-3


def test_warp_and_colours_stay_within_their_bounds() -> None:
    seeds = hash_seeds(0, 0, torch.arange(256))
    grey = recolour(torch.full((256, 1, 2, 2), 0.5), seeds, "test", 1.0)[:, 0, 0, 0]
    assert grey.min() >= 0 and grey.max() <= 1
    assert grey.max() > 0.9 and grey.min() < 0.05  # 0.5^0.25 * 1.4 + 0.1 and 0.5^4 * 0.7 - 0.1 are out of range
    image = torch.rand(256, 3, 8, 8)
    assert torch.allclose(recolour(image, seeds, "test", 0.0), image, atol=1e-6)
    assert torch.allclose(warp(image, seeds, "test", 0.0, 1.0, 0.0), image, atol=1e-5)


def test_copies_differ_and_depend_on_their_seed() -> None:
    method = Exemplar(build("convnet_small", INFO), Exemplar.Config(), INFO)
    copies = list(method.preview(batch_of()).values())
    assert len(copies) == 4
    for first, second in pairwise(copies):
        assert not torch.allclose(first, second, atol=1e-2)
    assert torch.equal(copies[0], method.preview(batch_of())["copy 1"])
    assert not torch.equal(copies[0], method.preview(batch_of(epoch=1))["copy 1"])


def test_step_is_one_graph() -> None:
    torch.manual_seed(0)
    method, batch, step = Exemplar(build("convnet_small", INFO), Exemplar.Config(), INFO), batch_of(), torch.tensor(0)
    compiled = torch.compile(method.loss, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for loss in (method.loss, compiled):
        value = loss(batch, step)["loss"]
        found.append((value, *torch.autograd.grad(value, list(method.parameters()))))
    # a CPU adjusts only the colours that change, a compiled step all of them: the same to rounding
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(*found, strict=True))


def test_it_tells_its_images_apart() -> None:
    torch.manual_seed(0)
    method = Exemplar(build("convnet_small", INFO), Exemplar.Config(colours=0.2), INFO)
    optimiser = torch.optim.Adam(method.parameters(), lr=3e-3)
    history = []
    for epoch in range(12):
        out = method.loss(batch_of(16, epoch), torch.tensor(epoch))
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        history.append(float(out["loss"].detach()))
    assert history[-1] < 0.7 * history[0]
