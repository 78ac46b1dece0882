"""Spatial contrasting against slow float64 loops, its degenerate cases, its draws, its refusals, and that it learns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.augment import hash_seeds, mix
from harness.contracts import Batch, DatasetInfo, Encoder, HarnessError
from harness.encoders import build, set_batch_norm_statistics
from harness.heads import all_distances, pair_distances
from harness.methods import sc
from harness.methods.sc import (
    SpatialContrasting,
    contrast,
    pair_contrasting_loss,
    patches_at,
    sample_patches,
    spatial_contrasting_loss,
)
from harness.methods.sc_null import SpatialContrastingNull

INFO = DatasetInfo(
    name="toy", title="Toy", classes=tuple("abcdefg"), image_size=(28, 28), channels=1, mean=(0.3,), std=(0.2,),
    counts={"train": 8}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train",
    mirror_keeps_label=False,
)  # fmt: skip
DISTANCES = ("l2", "squared", "cosine")
STEP = torch.tensor(0)


def batch_of(count: int = 8, info: DatasetInfo = INFO, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, info.channels, *info.image_size), generator=generator, dtype=torch.uint8)
    indices = torch.arange(count)
    images = images.contiguous(memory_format=torch.channels_last)
    return Batch(images, None, indices, hash_seeds(seed, 0, indices))


def method_of(info: DatasetInfo = INFO, encoder: str = "convnet_small", **config: Any) -> SpatialContrasting:
    torch.manual_seed(0)
    return SpatialContrasting(build(encoder, info), SpatialContrasting.Config(**config), info)


# --------------------------------------------------------------------------------------------- slow float64 references


def slow_distance(a: list[float], b: list[float], distance: str) -> float:
    if distance == "cosine":
        dot, norms = math.fsum(x * y for x, y in zip(a, b, strict=True)), math.hypot(*a) * math.hypot(*b)
        return 1 - dot / norms
    squared = math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    return squared if distance == "squared" else math.sqrt(squared)


def slow_softmax_loss(row: list[float], target: int) -> float:
    top = max(row)
    return top + math.log(math.fsum(math.exp(value - top) for value in row)) - row[target]


def slow_contrast(matrix: list[list[float]], symmetric: bool, temperature: float) -> float:
    scores = [[-value / temperature for value in row] for row in matrix]
    rows = [slow_softmax_loss(row, i) for i, row in enumerate(scores)]
    columns = [slow_softmax_loss([row[j] for row in scores], j) for j in range(len(scores))]
    return math.fsum(rows + columns) / (2 * len(rows)) if symmetric else math.fsum(rows) / len(rows)


def slow_loss(a: Tensor, b: Tensor, symmetric: bool, distance: str, temperature: float) -> float:
    first, second = a.double().tolist(), b.double().tolist()
    matrix = [[slow_distance(x, y, distance) for y in second] for x in first]
    return slow_contrast(matrix, symmetric, temperature)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_batch_form_against_loops(symmetric: bool, distance: Any, temperature: float) -> None:
    torch.manual_seed(1)
    a, b = torch.randn(9, 40, dtype=torch.float64), torch.randn(9, 40, dtype=torch.float64)
    b = (a + 0.1 * b) if symmetric else b
    slow = slow_loss(a, b, symmetric, distance, temperature)
    options: dict[str, Any] = {"symmetric": symmetric, "distance": distance, "temperature": temperature}
    fast = spatial_contrasting_loss(a, b, **options)
    assert fast.dtype == torch.float64
    assert fast.item() == pytest.approx(slow, rel=1e-6)
    single = spatial_contrasting_loss(a.float(), b.float(), **options)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(slow, rel=2e-5, abs=1e-6)


def test_defaults_are_equation_4() -> None:
    a, b = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    assert spatial_contrasting_loss(a, b).item() == pytest.approx(slow_loss(a, b, False, "l2", 1.0), rel=1e-12)


@pytest.mark.parametrize("distance", DISTANCES)
def test_pair_form_against_equation_3(distance: Any) -> None:
    torch.manual_seed(2)
    a1, a2, b1, b2 = torch.randn(4, 7, 12, dtype=torch.float64)
    expected = []
    for m in range(7):
        for (x1, x2), y1 in (((a1, a2), b1), ((b1, b2), a1)):
            own = math.exp(-slow_distance(x1[m].tolist(), x2[m].tolist(), distance))
            other = math.exp(-slow_distance(x1[m].tolist(), y1[m].tolist(), distance))
            expected.append(-math.log(own / (own + other)))
    fast = pair_contrasting_loss((a1, a2), (b1, b2), distance=distance)
    assert fast.item() == pytest.approx(math.fsum(expected) / len(expected), rel=1e-9)


# -------------------------------------------------------------------------------------------------- degenerate inputs


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradient_where_patches_coincide(distance: Any) -> None:
    """Finite; and the positive's own distance pulls nothing: with N = 1 + far negatives the gradient is zero there."""
    torch.manual_seed(3)
    a = torch.randn(8, 32).requires_grad_()
    b = a.detach().clone().requires_grad_()
    loss = spatial_contrasting_loss(a, b, distance=distance, symmetric=True)
    loss.backward()
    assert a.grad is not None and b.grad is not None
    assert torch.isfinite(loss) and torch.isfinite(a.grad).all() and torch.isfinite(b.grad).all()
    x = torch.randn(5, 32).requires_grad_()
    y = x.detach().clone().requires_grad_()
    pair_distances(x, y, distance).sum().backward()
    assert x.grad is not None and x.grad.abs().max() <= 1e-6
    if distance != "cosine":
        assert not x.grad.any()
        assert not all_distances(x, y, distance).diagonal().any()


def test_gradient_is_zero_when_everything_coincides() -> None:
    for dtype in (torch.float32, torch.float64):
        features = torch.ones(6, 16, dtype=dtype).requires_grad_()
        spatial_contrasting_loss(features, features.detach(), symmetric=True).backward()
        assert features.grad is not None and not features.grad.any()


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("value", [0.0, 1.0, 30.0])
def test_identical_features_give_log_n(distance: Any, value: float) -> None:
    features = torch.full((64, 10), value)
    loss = spatial_contrasting_loss(features, features, distance=distance)
    assert loss.item() == pytest.approx(math.log(64), rel=1e-6)


def test_no_underflow_far_apart() -> None:
    """Distances near 1,000: e^-D is 0 in any precision, the loss and its gradient are not."""
    torch.manual_seed(4)
    a, b = (40 * torch.randn(2, 16, 3072)).unbind()
    a.requires_grad_()
    loss = spatial_contrasting_loss(a, b)
    loss.backward()
    assert loss.item() == pytest.approx(slow_loss(a.detach(), b, False, "l2", 1.0), rel=1e-4)
    assert a.grad is not None and a.grad.norm() > 0.1


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradient_against_finite_differences(distance: Any, symmetric: bool) -> None:
    torch.manual_seed(5)
    a, b = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    options: dict[str, Any] = {"distance": distance, "symmetric": symmetric, "temperature": 0.7}
    assert torch.autograd.gradcheck(lambda x, y: spatial_contrasting_loss(x, y, **options), (a, b))
    assert torch.autograd.gradcheck(lambda x, y: pair_contrasting_loss((x, y), (y.flip(0), x.flip(0))), (a, b))


@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("offset", [0.0, 0.6])
def test_float32_gradient_error(noise: float, offset: float) -> None:
    """Measured: at most 1.6e-7 of the gradient's norm, N = 128, D = 3,072 (the plain matmul form: up to 6e-3).

    Features as LeakyReLU leaves them, scaled to distances near 1.5 so that the softmax is not saturated: there float32
    cannot tell its 1 - p from 0, whatever the distances."""
    torch.manual_seed(6)
    first, second = 0.02 * torch.nn.functional.leaky_relu(torch.randn(2, 128, 3072), 0.1)
    a32, b32 = first + offset, (second if noise == 1 else first + noise * second) + offset
    gradients = []
    for dtype in (torch.float32, torch.float64):
        a, b = (part.detach().to(dtype, copy=True).requires_grad_() for part in (a32, b32))
        spatial_contrasting_loss(a, b).backward()
        assert a.grad is not None and b.grad is not None
        gradients.append(torch.cat((a.grad, b.grad)).double())
    scale = gradients[1].norm()
    error = (gradients[0] - gradients[1]).norm() / scale.clamp_min(1e-30)
    assert error < 1e-6, (error, scale)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradient_of_a_solved_task(symmetric: bool) -> None:
    """Every own p is 1 to eight digits: 1 - p as the sum of the others keeps its digits in float32."""
    torch.manual_seed(8)
    first, near = torch.randn(2, 32, 3072)
    a32, b32 = 0.25 * first, 0.25 * first + 1e-3 * near
    gradients = []
    for dtype in (torch.float32, torch.float64):
        a, b = (part.to(dtype, copy=True).requires_grad_() for part in (a32, b32))
        spatial_contrasting_loss(a, b, symmetric=symmetric).backward()
        assert a.grad is not None and b.grad is not None
        gradients.append(torch.cat((a.grad, b.grad)).double())
    assert 0 < gradients[1].norm() < 1e-6
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[1].norm()


def test_own_gradient_where_some_patches_coincide() -> None:
    """Against autograd through the textbook form, which is defined where no two points are the same."""
    torch.manual_seed(9)
    a, b = torch.randn(2, 6, 9, dtype=torch.float64)
    b[2] = a[2]  # its own distance: no pull of its own, but every other one
    b[4] = a[1]  # of another image
    a, b = a.requires_grad_(), b.requires_grad_()
    spatial_contrasting_loss(a, b, symmetric=True).backward()
    squared = (a[:, None] - b).square().sum(2)
    distances = torch.where(squared == 0, 0, torch.where(squared == 0, 1, squared).sqrt())
    expected = torch.autograd.grad(contrast(distances, symmetric=True), (a, b))
    for mine, theirs in zip((a.grad, b.grad), expected, strict=True):
        assert mine is not None and torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    a, b = torch.randn(2, 4, 5, requires_grad=True)
    (slope,) = torch.autograd.grad(spatial_contrasting_loss(a, b.detach()), a, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        slope.sum().backward()


def test_several_seeds_in_one_call() -> None:
    """torch.func.vmap, which trains several seeds as one network."""
    points = torch.randn(2, 3, 6, 5, requires_grad=True)
    losses = torch.func.vmap(lambda a, b: spatial_contrasting_loss(a, b, symmetric=True))(*points)
    alone = torch.stack([spatial_contrasting_loss(a, b, symmetric=True) for a, b in points.unbind(1)])
    assert torch.allclose(losses, alone)
    gradients = [torch.autograd.grad(each.sum(), points, retain_graph=True)[0] for each in (losses, alone)]
    assert torch.allclose(*gradients, atol=1e-6)


class Largest(TorchDispatchMode):
    """The most values that any tensor made meanwhile holds."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.values = max(self.values, leaf.numel())
        return out


@pytest.mark.parametrize("pool", ["mean", "flatten"])
@pytest.mark.parametrize("form", ["batch", "pair"])
def test_large_batches_make_no_tensor_of_n_n_d(pool: Any, form: Any) -> None:
    """N = 4,096 and D = 3,072, by shapes alone: nothing is larger than the map or the matrix of distances."""
    info = dataclasses.replace(INFO, image_size=(32, 32), channels=3, mean=(0.3,) * 3, std=(0.2,) * 3)
    method = method_of(info, "paper_cifar10", pool=pool, form=form, symmetric=form == "batch")
    with FakeTensorMode(allow_non_fake_inputs=True), Largest() as largest:
        maps = torch.empty(4096, 192, 8, 8, requires_grad=True)
        ((loss, _),) = method.criterion(maps.contiguous(memory_format=torch.channels_last), torch.arange(4096))
        loss.backward()
    assert largest.values == max(4096 * 192 * 64, 4096**2)


def test_redraw_says_how_much_it_would_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sc, "REDRAW_BYTES", 8 * 8 * 3 * 3 * 64 * 4)
    method = method_of(redraw=True)
    assert torch.isfinite(method.loss(batch_of(8), STEP)["loss"])
    with pytest.raises(HarnessError, match=r"each of 9 x 9 pairs of images, .* batch_size=N"):
        method.loss(batch_of(9), STEP)


@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_bfloat16_features(distance: Any) -> None:
    torch.manual_seed(7)
    a = torch.randn(64, 192)
    b = a + 0.5 * torch.randn(64, 192)
    exact = spatial_contrasting_loss(a, b, distance=distance)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = spatial_contrasting_loss(a.bfloat16(), b.bfloat16(), distance=distance)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-2, abs=1e-2)


# --------------------------------------------------------------------------------------------------------- the method


def slow_vectors(method: SpatialContrasting, feature_map: Tensor, corners: Tensor, place: int = 0) -> list[list[float]]:
    cells = method.geometries[place].cells
    rows = []
    for image, (row, column) in zip(feature_map, corners.tolist(), strict=True):
        patch = image[:, row : row + cells, column : column + cells].double()
        rows.append((patch.mean((1, 2)) if method.config.pool == "mean" else patch.permute(1, 2, 0).flatten()).tolist())
    return rows


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"symmetric": False, "pool": "flatten", "patch": 4},
        {"distance": "cosine", "temperature": 0.2},
        {"distance": "squared", "patches_per_image": 4},
        {"symmetric": False, "patches_per_image": 3},
        {"layers": ("conv3", "conv4")},
    ],
)
def test_loss_against_loops(config: dict[str, Any]) -> None:
    method, batch = method_of(**config).double(), batch_of()
    value = method.loss(batch, STEP)["loss"]
    maps = method.maps(method.view(batch))
    expected = []
    for place, feature_map in enumerate(maps):
        vectors = [slow_vectors(method, feature_map, at, place) for at in method.corners(batch.seeds, place)]
        for p, first in enumerate(vectors):
            for second in vectors[p + 1 :]:
                matrix = [[slow_distance(x, y, method.config.distance) for y in second] for x in first]
                expected.append(slow_contrast(matrix, method.config.symmetric, method.config.temperature))
    assert value.item() == pytest.approx(math.fsum(expected) / len(expected), rel=1e-6)


def test_redraw_against_loops() -> None:
    """Algorithm 1 as printed: N^2 patches, that of image j drawn anew for each i, from the seeds of both alone."""
    method, batch = method_of(redraw=True, symmetric=False).double(), batch_of()
    feature_map = method.encoder(method.view(batch))
    draws = method.samplers[0].draw(batch.seeds, "sc.patch.0", 2)[:, 0]
    anchors = slow_vectors(method, feature_map, method.samplers[0].corners[draws])
    matrix, seen = [], set()
    for i in range(len(batch)):
        row = []
        for j in range(len(batch)):
            seed = mix(mix(batch.seeds[i : i + 1]) + batch.seeds[j : j + 1])
            at = method.samplers[0].corners[method.samplers[0].partner(draws[i : i + 1], seed, "sc.redraw.0.0.1")]
            seen.add((j, *at[0].tolist()))
            row.append(slow_distance(anchors[i], slow_vectors(method, feature_map[j : j + 1], at)[0], "l2"))
        matrix.append(row)
    assert method.loss(batch, STEP)["loss"].item() == pytest.approx(slow_contrast(matrix, False, 1.0), rel=1e-6)
    assert len(seen) > 2 * len(batch)


def test_pair_form_of_the_method() -> None:
    method, batch = method_of(form="pair", symmetric=False).double(), batch_of()
    feature_map = method.encoder(method.view(batch))
    first, second = (slow_vectors(method, feature_map, at) for at in method.corners(batch.seeds))
    total = 0.0
    for i in range(len(batch)):
        j = (i + 1) % len(batch)
        between = slow_distance(first[i], first[j], "l2")
        for k in (i, j):
            total += math.log1p(math.exp(slow_distance(first[k], second[k], "l2") - between))
    assert method.loss(batch, STEP)["loss"].item() == pytest.approx(total / (2 * len(batch)), rel=1e-6)


@pytest.mark.parametrize("config", [{}, {"redraw": True}, {"form": "pair"}, {"projector": 16, "pool": "flatten"}])
def test_gradient_reaches_every_parameter(config: dict[str, Any]) -> None:
    method = method_of(**config)
    method.loss(batch_of(), STEP)["loss"].backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


def test_draws_do_not_depend_on_the_batch() -> None:
    method, batch = method_of(patches_per_image=3), batch_of(16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))[:7]
    part = Batch(batch.images[order].contiguous(), None, batch.indices[order], batch.seeds[order])
    assert torch.equal(method.corners(batch.seeds)[:, order], method.corners(part.seeds))
    assert torch.equal(method.view(batch)[order], method.view(part))
    assert not torch.equal(method.corners(batch.seeds)[0], method.corners(batch.seeds)[1])


def test_step_asks_nothing_of_the_host() -> None:
    """Fake tensors have shapes and no values: `.item()` or a shape that depends on data would raise."""
    for config in ({}, {"redraw": True}, {"pairs": "shuffled"}, {"form": "pair"}, {"patches_per_image": 3}):
        method, batch = method_of(**config), batch_of()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            images, indices, seeds = map(mode.from_tensor, (batch.images, batch.indices, batch.seeds))
            out = method.loss(Batch(images, None, indices, seeds), mode.from_tensor(STEP))
            with pytest.raises(DataDependentOutputException):
                out["loss"].item()
        assert {key: value.shape for key, value in out.items()} == {"loss": (), "retrieval": ()}


CONFIGS: tuple[dict[str, Any], ...] = (
    {}, {"redraw": True}, {"pairs": "shuffled", "pool": "flatten"}, {"form": "pair"},
    {"patches_per_image": 3, "projector": 8, "distance": "cosine"},
)  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_step_is_one_graph(config: dict[str, Any]) -> None:
    """torch.compile finds nothing in a step that it must leave to Python, and the same numbers, under autocast."""
    method, batch = method_of(**config), batch_of()
    compiled = torch.compile(method.loss, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for loss in (method.loss, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(batch, STEP)["loss"]
        found.append((value, *torch.autograd.grad(value, list(method.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_null_control_never_takes_its_own_image() -> None:
    config = SpatialContrastingNull.Config()
    assert config.pairs == "shuffled" and SpatialContrasting.null_control == "sc_null"
    method = SpatialContrastingNull(build("convnet_small", INFO), config, INFO)
    shifts = set()
    for seed in range(40):
        seeds = batch_of(6, seed=seed).seeds
        partner = method._partner_images(seeds)
        assert sorted(partner.tolist()) == list(range(6)) and (partner != torch.arange(6)).all()
        assert torch.equal(partner, method._partner_images(seeds))
        shifts.add(int(partner[0]))
    assert shifts == {1, 2, 3, 4, 5}
    assert method._partner_images(batch_of(2).seeds).tolist() == [1, 0]


def test_share_is_rounded_half_up() -> None:
    for encoder, patch, cells in (
        ("convnet_small", 0.5, 3), ("paper_mnist", 0.5, 4), ("paper_mnist", 0.01, 1), ("paper_mnist", 5, 5)
    ):  # fmt: skip
        assert method_of(INFO, encoder, patch=patch).geometries[0].cells == cells


def test_refusals_name_the_numbers() -> None:
    cases: dict[str, dict[str, Any]] = {
        r"7 x 7 cells .* larger than the 6 x 6 map of convnet_small": {"patch": 7},
        r"6 x 6 cells .* is the whole of the 6 x 6 map": {"patch": 1.0},
        r"patch=1\.5 is a share above 1": {"patch": 1.5},
        r"input side of 32 px, the image is 28 x 28 px: P\(input-disjoint\) = 0": {"overlap": "disjoint"},
        r"redraw belongs to the batch form": {"redraw": True, "form": "pair"},
        r"no layer 'conv9'; it has conv1": {"layers": ("conv9",)},
    }
    for words, config in cases.items():
        with pytest.raises(HarnessError, match=words) as caught:
            method_of(**config)
        assert "\n" not in str(caught.value)
    stl = dataclasses.replace(INFO, image_size=(96, 96))
    with pytest.raises(HarnessError, match="input side of 75 px, the image is 96 x 96 px"):
        method_of(stl, "paper_stl10", patch=13, overlap="disjoint")
    with pytest.raises(HarnessError, match="draws 2 patches per image, not 3"):
        method_of(stl, "paper_stl10", patch=7, overlap="disjoint", patches_per_image=3)


@pytest.mark.parametrize("redraw", [False, True])
def test_disjoint_patches(redraw: bool) -> None:
    info = dataclasses.replace(INFO, image_size=(64, 64))
    method, batch = method_of(info, "convnet_small", patch=1, overlap="disjoint", redraw=redraw), batch_of(8, info)
    first, second = method.corners(batch.seeds)
    assert ((first - second).abs().amax(1) * 4 >= 24).all()
    assert torch.isfinite(method.loss(batch, STEP)["loss"])


def test_mirror_follows_the_data_set() -> None:
    keeps = dataclasses.replace(INFO, mirror_keeps_label=True)
    assert [method_of(info, mirror=m).mirror for info in (INFO, keeps) for m in ("auto", True, False)] == [
        False, True, False, True, True, False
    ]  # fmt: skip


def test_preview() -> None:
    shown = method_of().preview(batch_of())
    assert list(shown) == ["view", "patch 1", "patch 2"]
    for picture in shown.values():
        assert picture.shape == (8, 1, 28, 28) and picture.dtype == torch.float32
        assert picture.min() >= 0 and picture.max() <= 1


# ------------------------------------------------------------------------------------------------------------ learning


class Digits:
    """scikit-learn's digits as pretraining data."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        images = torch.from_numpy(load_digits().images[:1024]).float()[:, None] * 255 / 16
        images = torch.nn.functional.interpolate(images, (28, 28), mode="bilinear").round().to(torch.uint8)
        self.images = images.contiguous(memory_format=torch.channels_last)

    def batches(self, limit: int | None = None) -> Iterator[Batch]:
        yield from self.epoch(0, limit)

    def epoch(self, epoch: int, limit: int | None = None) -> Iterator[Batch]:
        for indices in torch.arange(len(self.images))[:limit].split(64):
            yield Batch(self.images[indices], None, indices, hash_seeds(0, epoch, indices))

    def embed(self, function: Any, limit: int | None = None) -> Tensor:
        return torch.cat([function(batch.images) for batch in self.batches(limit)])


def test_it_learns_and_reports_what_it_learnt() -> None:
    data, method = Digits(), method_of()
    untrained: Encoder = build("convnet_small", INFO)
    untrained.load_state_dict(method.encoder.state_dict())
    set_batch_norm_statistics(untrained, data.batches())
    optimiser = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    history = []
    for epoch in range(3):
        for batch in data.epoch(epoch):
            out = method.loss(batch, STEP)
            optimiser.zero_grad()
            out["loss"].backward()
            optimiser.step()
            history.append((out["loss"].item(), out["retrieval"].item()))
    (first_loss, first_retrieval), (last_loss, last_retrieval) = history[0], history[-1]
    assert last_loss < 0.6 * first_loss and last_retrieval > first_retrieval
    facts = method.diagnostics(data, untrained)
    assert facts["patch_cells"] == 3 and facts["map_side"] == 6
    assert facts["patch_input_side"] == 32 and facts["p_input_disjoint"] == 0
    assert facts["retrieval_top1"] > facts["retrieval_top1_untrained"] > 2 / 128
    assert 0 <= facts["retrieval_top1_hand_statistics"] <= 1
    assert method.encoder.training and untrained.training


def test_public_sampler_is_importable_from_the_method() -> None:
    maps = torch.randn(2, 3, 6, 6)
    assert sample_patches(maps, 3, seeds=batch_of(2).seeds).shape == (2, 3, 3, 3)
    assert patches_at(maps, 2, torch.zeros(2, 2).long()).shape == (2, 2, 2, 3)
