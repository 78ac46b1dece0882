"""VICRegL: the criterion against lightly, matches against a loop, cells found again in the image."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.augment import hash_seeds, to_float
from harness.contracts import Batch, DatasetInfo, HarnessError
from harness.encoders import build
from harness.methods.vicregl import VICRegL, _taken, best_matches, cell_centres, local_vicreg_loss
from harness.views import random_resized_crop

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(28, 28), channels=1, mean=(0.5,), std=(0.25,),
    counts={}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train", mirror_keeps_label=True,
)  # fmt: skip
STEP = torch.tensor(0)


def method_of(encoder: str = "convnet_small", **settings: Any) -> VICRegL:
    torch.manual_seed(0)
    config = VICRegL.Config(**{"hidden": 16, "out": 8, "local_out": 6, "jitter": 0.0, **settings})
    return VICRegL(build(encoder, INFO), config, INFO)


def batch_of(count: int = 6) -> Batch:
    indices = torch.arange(count)
    images = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Batch(images, None, indices, hash_seeds(0, 0, indices))


def points_of(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("shape", [(6, 4), (9, 5, 3)])
@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (1.0, 3.0, 7.0)])
def test_criterion_in_a_loop(shape: tuple[int, ...], weights: tuple[float, float, float]) -> None:
    first, second = points_of(*shape), points_of(*shape, seed=1)
    one, two = (p if p.ndim == 3 else p[:, None] for p in (first, second))
    terms = []
    for place in range(one.shape[1]):
        a, b = one[:, place], two[:, place]
        value = weights[0] * (a - b).square().sum() / a.numel()
        for z in (a, b):
            deviations = (z.var(0) + 1e-4).sqrt()
            covariance = torch.cov(z.T)
            outside = sum(
                covariance[i, j] ** 2 for i in range(len(covariance)) for j in range(len(covariance)) if i != j
            )
            value = (
                value
                + weights[1] * (1 - deviations).clamp(min=0).mean() / 2
                + weights[2] * outside / len(covariance) / 2
            )
        terms.append(value)
    expected = torch.stack(terms).mean()
    found = local_vicreg_loss(first, second, *weights)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    gradients = [torch.autograd.grad(loss, (first, second)) for loss in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(("batch", "side", "width"), [(5, 3, 4), (8, 4, 7)])
@pytest.mark.parametrize("share", [0.75, 0.3])
def test_loss_and_gradient_equal_lightlys(
    batch: int, side: int, width: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "LIGHTLY_DID_VERSION_CHECK", "True")
    module = pytest.importorskip("lightly.loss")
    whole = [points_of(batch, width + 2, seed=s) for s in (0, 1)]
    cells = [points_of(batch, side**2, width, seed=s) for s in (2, 3)]
    places = [10 * points_of(batch, side**2, 2, seed=s).detach() for s in (4, 5)]
    oracle = module.VICRegLLoss(alpha=share, num_matches=(3, 3))
    theirs = oracle(
        [(w, c.unflatten(1, (side, side))) for w, c in zip(whole, cells, strict=True)],
        [p.unflatten(1, (side, side)) for p in places],
    )
    method = method_of(global_share=share)
    method.num_matches = 3
    one, two = cells
    local = method._matched((one, two), (places[0], places[1])) + method._matched((one, two), (one, two))
    ours = share * local_vicreg_loss(*whole) + (1 - share) * local
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-8)
    gradients = [torch.autograd.grad(loss.sum(), (*whole, *cells)) for loss in (ours, theirs)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-8, rtol=1e-6)


def test_best_matches_in_a_loop() -> None:
    ours, theirs = points_of(3, 6, 2), points_of(3, 5, 2, seed=1)
    chosen, partner = best_matches(ours, theirs, 4)
    for image in range(3):
        pairs = []
        for p in range(6):
            distances = [(ours[image, p] - theirs[image, q]).norm().item() for q in range(5)]
            pairs.append((min(distances), p, distances.index(min(distances))))
        expected = sorted(pairs)[:4]
        assert [(p, q) for _, p, q in expected] == list(
            zip(chosen[image].tolist(), partner[image].tolist(), strict=True)
        )


@pytest.mark.parametrize("mirror", [False, True])
def test_cells_are_found_again_in_the_image(mirror: bool) -> None:
    """An image whose value is its own row (or column): a view shows at every cell where the cell lies."""
    seeds, scale = batch_of(30).seeds, (0.2, 1.0)
    ramp = torch.arange(28.0).expand(30, 1, 28, 28) / 28
    centres = cell_centres(seeds, "v", (28, 28), scale, mirror, (7, 7))
    for axis, image in enumerate((ramp.transpose(2, 3), ramp)):
        view = random_resized_crop(to_float(image), seeds, "v", scale, mirror)
        shown = view.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5))[:, 0] * 28 + 0.5
        inner = (slice(None), slice(1, 6), slice(1, 6))  # borders repeat
        torch.testing.assert_close(centres[..., axis].unflatten(1, (7, 7))[inner], shown[inner], atol=0.3, rtol=0)


def test_method_puts_the_parts_together() -> None:
    method, batch = method_of(global_share=0.6), batch_of()
    assert method.num_matches == round(0.4 * 36)
    views = torch.cat(list(method.preview(batch).values()))
    feature_map = method.encoder(views)
    first, second = method.projector(method.encoder.pool(feature_map)).chunk(2)
    cells = method.local_projector(feature_map.permute(0, 2, 3, 1).reshape(-1, 64)).reshape(2, 6, 36, 6)
    places = [cell_centres(batch.seeds, f"vicregl.{v}", (28, 28), (0.2, 1.0), True, (6, 6)) for v in (1, 2)]
    losses = []
    for points in (places, cells):
        for a, b in ((0, 1), (1, 0)):
            chosen, partner = best_matches(points[a], points[b], 14)
            losses.append(local_vicreg_loss(_taken(cells[a], chosen), _taken(cells[b], partner)))
    expected = 0.6 * local_vicreg_loss(first, second) + 0.4 * sum(losses) / 2
    torch.testing.assert_close(method.loss(batch, STEP)["loss"], expected, rtol=1e-4, atol=1e-4)


def test_step_is_one_graph() -> None:
    method, batch = method_of(), batch_of()
    compiled = torch.compile(method.loss, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for loss in (method.loss, compiled):
        value = loss(batch, STEP)["loss"]
        found.append((value, *torch.autograd.grad(value, list(method.local_projector.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_map_of_one_cell_is_refused() -> None:
    with pytest.raises(HarnessError, match="map of resnet18 has 1 x 1 cells"):
        method_of("resnet18")
