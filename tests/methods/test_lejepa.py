"""LeJEPA: SIGReg against the integral, lightly and known distributions; the prediction loss; directions."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo
from harness.encoders import build
from harness.methods.lejepa import LeJEPA, prediction_loss, sigreg, unit_directions

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(28, 28), channels=1, mean=(0.5,), std=(0.25,),
    counts={}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train", mirror_keeps_label=False,
)  # fmt: skip


def method_of(**settings: Any) -> LeJEPA:
    torch.manual_seed(0)
    config = LeJEPA.Config(**{"hidden": 16, "out": 8, "num_local": 2, "directions": 12, **settings})
    return LeJEPA(build("convnet_small", INFO), config, INFO)


def batch_of(count: int = 6) -> Batch:
    indices = torch.arange(count)
    images = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Batch(images, None, indices, hash_seeds(0, 0, indices))


def embeddings_of(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("shape", [(5, 3), (2, 40, 8), (6, 16, 16)])
@pytest.mark.parametrize(("knots", "furthest"), [(17, 3.0), (5, 1.5)])
def test_sigreg_and_its_gradient_equal_lightlys(
    shape: tuple[int, ...], knots: int, furthest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "LIGHTLY_DID_VERSION_CHECK", "True")
    loss_module = pytest.importorskip("lightly.loss")
    directions = unit_directions(torch.tensor(3), shape[-1], 10).double()
    oracle = loss_module.SIGReg(knots=knots, t_max=furthest, num_vectors=10).double()
    monkeypatch.setattr(oracle, "_generate_unit_vectors", lambda *_: directions)
    embeddings = embeddings_of(*shape)
    ours, theirs = sigreg(embeddings, directions, knots, furthest), oracle(embeddings)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)  # their knots are float32 numbers
    gradients = [torch.autograd.grad(loss, embeddings)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_whole_loss_equals_lightlys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "LIGHTLY_DID_VERSION_CHECK", "True")
    loss_module = pytest.importorskip("lightly.loss")
    directions = unit_directions(torch.tensor(0), 8, 20).double()
    embeddings = embeddings_of(5, 12, 8)
    oracle = loss_module.LeJEPALoss(lambda_param=0.05).double()
    monkeypatch.setattr(oracle.sigreg, "_generate_unit_vectors", lambda *_: directions)
    ours = 0.05 * sigreg(embeddings, directions) + 0.95 * prediction_loss(embeddings, 2)
    theirs = oracle(global_proj=embeddings[:2], local_proj=embeddings[2:])
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, embeddings)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_sigreg_is_the_epps_pulley_integral() -> None:
    """Complex numbers and a fine integral over both signs of t, one direction after the other."""
    points = embeddings_of(9, 3).detach().numpy()
    directions = unit_directions(torch.tensor(1), 3, 4).double()
    at = np.linspace(-3, 3, 20_001)
    total = 0.0
    for direction in directions.numpy().T:
        empirical = np.exp(1j * at[:, None] * (points @ direction)).mean(1)
        total += 9 * np.trapezoid(abs(empirical - np.exp(-(at**2) / 2)) ** 2 * np.exp(-(at**2) / 2), at)
    found = float(sigreg(torch.from_numpy(points), directions, knots=10_001))
    assert found == pytest.approx(total / 4, rel=1e-6)
    assert float(sigreg(torch.from_numpy(points), directions)) == pytest.approx(total / 4, rel=1e-2)  # 17 knots


def test_sigreg_prefers_the_standard_normal() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2000, 8, generator=generator)
    directions = unit_directions(torch.tensor(0), 8, 50)
    skewed = normal.clone()
    skewed[:, 0] = normal[:, 0].exp()
    others = {"collapsed": normal * 0, "small": normal / 2, "wide": normal * 2, "shifted": normal + 0.5,
              "on a line": normal[:, :1].expand(-1, 8), "two heaps": normal.sign(), "skewed": skewed}  # fmt: skip
    best = float(sigreg(normal, directions))
    # of a normal sample N times the integral has the mean sqrt(2 pi) (1 - 1 / sqrt(3)), over all t
    assert best == pytest.approx(math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3)), rel=0.2)
    for name, points in others.items():
        assert float(sigreg(points, directions)) > 1.5 * best, name
    small = (normal / 2).requires_grad_()
    sigreg(small, directions).backward()
    assert small.grad is not None and (small.grad * small).sum() < 0  # descent makes it wider


def test_prediction_loss_in_a_loop() -> None:
    z = embeddings_of(4, 3, 5)
    terms = [(z[v, n, d] - (z[0, n, d] + z[1, n, d]) / 2) ** 2 for v in range(4) for n in range(3) for d in range(5)]
    assert prediction_loss(z, 2).item() == pytest.approx(sum(terms).item() / len(terms))
    z = embeddings_of(3, 4, 2)  # both sides move: no stop-gradient
    (gradient,) = torch.autograd.grad(prediction_loss(z, 1), z)
    assert gradient[0].abs().sum() > 0 and gradient[1:].abs().sum() > 0
    assert torch.allclose(gradient.sum(0), torch.zeros(4, 2, dtype=torch.float64))


def test_directions_are_of_the_step_and_uniform() -> None:
    first, again, other = (unit_directions(torch.tensor(step), 3, 4000) for step in (5, 5, 6))
    assert torch.equal(first, again) and not torch.isclose(first, other).any()
    torch.testing.assert_close(first.norm(dim=0), torch.ones(4000))
    torch.testing.assert_close(first.mean(1), torch.zeros(3), atol=0.03, rtol=0)
    torch.testing.assert_close(first @ first.T / 4000, torch.eye(3) / 3, atol=0.02, rtol=0)
    assert torch.linalg.matrix_rank(unit_directions(torch.tensor(0), 8, 64)) == 8


def test_loss_is_made_of_all_views_and_has_no_dead_part() -> None:
    method, batch, step = method_of(), batch_of(), torch.tensor(7)
    views = list(method.preview(batch).values())
    z = [method.projector(method.encoder.pool(method.encoder(torch.cat(part)))) for part in (views[:2], views[2:])]
    embeddings = torch.cat(z).reshape(4, 6, 8)
    found = method.loss(batch, step)
    expected = 0.05 * sigreg(embeddings, unit_directions(step, 8, 12)) + 0.95 * prediction_loss(embeddings, 2)
    torch.testing.assert_close(found["loss"], expected)
    torch.testing.assert_close(0.05 * found["sigreg"] + 0.95 * found["prediction"], expected)
    assert not torch.equal(method.loss(batch, step + 1)["sigreg"], found["sigreg"])


def test_step_is_one_graph() -> None:
    """The views are traced in tests/test_views.py, so most of what they do is off."""
    method, batch, step = method_of(num_local=1, jitter=0.0, grayscale=0.0, mirror=False), batch_of(), torch.tensor(3)
    compiled = torch.compile(method.loss, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for loss in (method.loss, compiled):
        value = loss(batch, step)["loss"]
        found.append((value, *torch.autograd.grad(value, list(method.projector.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
