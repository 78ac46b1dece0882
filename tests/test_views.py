"""harness.views against torchvision's transforms, law by law; and what a view may depend on."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from harness import registry, views
from harness.augment import hash_seeds, shift_and_mirror
from harness.contracts import Batch, DatasetInfo, HarnessError
from harness.encoders import build


def seeds_of(count: int, seed: int = 0) -> Tensor:
    return hash_seeds(seed, 0, torch.arange(count))


def smooth(count: int, side: int = 32, channels: int = 3) -> Tensor:
    """Colours that vary slowly, as in photographs."""
    coarse = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=side, mode="bicubic").clamp(0, 1)


def info_of(side: int, mirror: bool = False, channels: int = 3) -> DatasetInfo:
    return DatasetInfo(
        name="toy", title="Toy", classes=None, image_size=(side, side), channels=channels, mean=(0.5,) * channels,
        std=(0.2,) * channels, counts={}, licence="", citation="", default_encoder="convnet_small",
        pretrain_split="train", mirror_keeps_label=mirror,
    )  # fmt: skip


def kolmogorov(one: np.ndarray, two: np.ndarray) -> float:
    """Largest distance between two empirical distribution functions."""
    values = np.concatenate((one, two))
    ranks = [np.searchsorted(np.sort(sample), values, "right") / len(sample) for sample in (one, two)]
    return float(np.abs(ranks[0] - ranks[1]).max())


@pytest.mark.parametrize(("height", "width", "low"), [(32, 32, 0.08), (96, 96, 0.2), (20, 60, 0.08), (60, 20, 0.9)])
def test_crop_boxes_have_torchvisions_law(height: int, width: int, low: float) -> None:
    torch.manual_seed(0)
    count = 4000
    transform, blank = v2.RandomResizedCrop(32, scale=(low, 1.0)), torch.zeros(1, height, width)
    drawn = [transform.make_params([blank]) for _ in range(count)]
    theirs = [np.array([box[key] for box in drawn], dtype=float) for key in ("top", "left", "height", "width")]
    ours = [side.double().numpy() for side in views.crop_boxes(seeds_of(count), "law", (height, width), (low, 1.0))]
    noise = 1.95 * (2 / count) ** 0.5  # exceeded once in a thousand
    for name, one, two in zip(("top", "left", "height", "width"), ours, theirs, strict=True):
        assert kolmogorov(one, two) < noise, name
    assert kolmogorov(ours[2] * ours[3], theirs[2] * theirs[3]) < noise
    assert kolmogorov(ours[3] / ours[2], theirs[3] / theirs[2]) < noise
    assert ours[0].min() >= 0 and (ours[0] + ours[2]).max() <= height
    assert ours[1].min() >= 0 and (ours[1] + ours[3]).max() <= width


@pytest.mark.parametrize(("height", "width"), [(10, 40), (40, 10)])
def test_where_no_box_fits_the_centre_is_taken_as_torchvision_does(height: int, width: int) -> None:
    box = v2.RandomResizedCrop(8, scale=(1.0, 1.0)).make_params([torch.zeros(1, height, width)])
    ours = views.crop_boxes(seeds_of(5), "fallback", (height, width), (1.0, 1.0))
    assert [side.tolist() for side in ours] == [[box[key]] * 5 for key in ("top", "left", "height", "width")]


def test_jitter_is_drawn_over_the_whole_range_and_in_every_order() -> None:
    factors, turn, order = views.draw_jitter(seeds_of(4000), "jitter", 0.5, 0.8)
    unchanged = (factors == 1).all(1) & (turn == 0)
    assert float(unchanged.float().mean()) == pytest.approx(0.2, abs=0.03)
    changed = factors[~unchanged]
    assert changed.min() >= 0.6 and changed.max() <= 1.4
    assert changed.min(0).values.max() < 0.61 and changed.max(0).values.min() > 1.39
    assert turn.abs().max() <= 0.1 and turn.max() > 0.098 and turn.min() < -0.098
    assert len({tuple(row) for row in order.tolist()}) == 24


def test_grayscale() -> None:
    images = smooth(2000, side=5)
    found = views.grayscale(images, seeds_of(2000), "grey", 0.2)
    changed = (found != images).flatten(1).any(1)
    assert float(changed.float().mean()) == pytest.approx(0.2, abs=0.03)
    assert (found[changed] - reference.rgb_to_grayscale(images[changed], 3)).abs().max() < 1e-6
    single = images[:, :1]
    assert views.grayscale(single, seeds_of(2000), "grey", 1.0) is single


def test_blur_leaves_the_unchosen_alone_and_fits_tiny_images() -> None:
    images = torch.rand(1000, 1, 3, 3)
    found = views.gaussian_blur(images, seeds_of(1000), "blur", 0.5)
    same = (found == images).flatten(1).all(1)
    assert 0.4 < float(same.float().mean()) < 0.6


@pytest.mark.parametrize(("height", "width"), [(12, 12), (96, 96), (9, 11)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_view_depends_on_its_sample_alone(
    height: int, width: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit: whatever the batch, its order, its memory layout and the chunks it is taken in."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (23, channels, height, width), dtype=torch.uint8, generator=generator)
    images = images.to(memory_format=torch.channels_last)
    config = views.ViewConfig(blur=0.5, solarise=0.3, mirror=True)
    maker, seeds = views.ViewMaker.of(config, info_of(height, True, channels)), seeds_of(23)
    whole = maker(images, seeds, "one")
    for part in (slice(0, 1), slice(1, 8), slice(8, 23)):
        assert torch.equal(whole[part], maker(images[part], seeds[part], "one"))
    for pixels in (1, 4 * height * width):
        monkeypatch.setattr(views, "CHUNK", pixels)
        shuffled = torch.randperm(23, generator=generator)
        assert torch.equal(whole[shuffled], maker(images[shuffled].contiguous(), seeds[shuffled], "one"))
    assert not torch.equal(whole, maker(images, seeds, "two"))
    assert whole.dtype == torch.float32 and whole.shape == images.shape and whole.min() >= 0 and whole.max() <= 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whole, maker(images, seeds, "one"))


def every_choice_on(size: int | None = None) -> tuple[views.ViewMaker, Tensor, Tensor]:
    config = views.ViewConfig(blur=0.5, solarise=0.3, mirror=True)
    images = (smooth(40, side=21) * 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    images[:3], images[3] = images[:3, :1], 255
    return views.ViewMaker.of(config, info_of(21), size=size), images, seeds_of(40)


@pytest.mark.parametrize("size", [None, 13])
def test_views_are_the_same_bits_without_choosing(size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU and a compiled step carry out, on a CPU."""
    maker, images, seeds = every_choice_on(size)
    chosen = maker(images, seeds, "view")
    for module in (views, views.operations):
        monkeypatch.setattr(module, "chooses", lambda *_: False)
    assert torch.equal(chosen, maker(images, seeds, "view"))


def test_views_can_be_compiled_whole() -> None:
    maker, images, seeds = every_choice_on()
    call = torch.compile(maker.__call__, backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(call(images, seeds, "view"), maker(images, seeds, "view"))


def test_views_of_several_seeds_inside_vmap() -> None:
    maker, images, seeds = every_choice_on()
    stacked = torch.stack((images, images.flip(0))), torch.stack((seeds, seeds + 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says which operations it batches slowly
        both = torch.func.vmap(lambda some, their: maker(some, their, "view"))(*stacked)
    for one, some, their in zip(both, *stacked, strict=True):
        assert torch.equal(one, maker(some, their, "view"))


def test_small_views_of_large_images() -> None:
    """Multi-crop: another size and range of areas, one call."""
    maker = views.ViewMaker.of(views.ViewConfig(), info_of(96), scale=(0.05, 0.14), size=40)
    ramp = torch.arange(96, dtype=torch.uint8).expand(200, 1, 96, 96)
    local = maker(ramp, seeds_of(200), "local")
    assert local.shape == (200, 1, 40, 40)
    flat = views.ViewConfig(jitter=0.0, grayscale=0.0, blur=0.0)
    plain = views.ViewMaker.of(flat, info_of(96), scale=(0.05, 0.14), size=40)(ramp, seeds_of(200), "local") * 255
    across = (plain[:, 0, 0].amax(1) - plain[:, 0, 0].amin(1)) / (39 / 40)  # width of each crop, in pixels
    assert 0.05**0.5 * 96 * 0.8 < float(across.min()) < float(across.max()) < 0.14**0.5 * 96 * 1.25
    assert torch.equal(
        plain, views.random_resized_crop(ramp / 255, seeds_of(200), "local", (0.05, 0.14), size=40) * 255
    )


def test_auto_follows_the_data_set() -> None:
    small, large = (views.ViewMaker.of(views.ViewConfig(), info_of(side, side == 96)) for side in (32, 96))
    assert (small.blur, small.mirror) == (0.0, False)
    assert (large.blur, large.mirror) == (0.5, True)
    told = views.ViewMaker.of(views.ViewConfig(blur=0.3, mirror=True), info_of(32))
    assert (told.blur, told.mirror) == (0.3, True)


def test_everything_off_is_the_image() -> None:
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    config = views.ViewConfig(crop_scale=1.0, mirror=False, jitter=0.0, grayscale=0.0, blur=0.0)
    view = views.ViewMaker.of(config, info_of(16))(images, seeds_of(5), "off")
    boxes = views.crop_boxes(seeds_of(5), "off.crop", (16, 16), (1.0, 1.0))
    whole = (boxes[2] == 16) & (boxes[3] == 16)  # some aspect ratios of full area round to the whole square
    assert whole.any()
    assert (view - images.float() / 255)[whole].abs().max() < 1e-5


def test_solarise() -> None:
    images = torch.rand(2000, 3, 4, 4, generator=torch.Generator().manual_seed(9))
    found = views.solarise(images, seeds_of(2000), "sun", 0.2, 0.6)
    changed = (found != images).flatten(1).any(1)
    assert float(changed.float().mean()) == pytest.approx(0.2, abs=0.03)
    assert torch.equal(found[changed], reference.solarize(images[changed], 0.6))
    on, off = (
        views.ViewMaker.of(views.ViewConfig(jitter=0.0, solarise=share), info_of(4))(images, seeds_of(2000), "sun")
        for share in (0.2, 0.0)
    )
    expected = torch.where(changed[:, None, None, None], reference.solarize(off, 128 / 255), off)
    assert torch.equal(on, expected)


def test_random_turns_are_evenly_spread() -> None:
    corner = torch.zeros(4000, 1, 2, 2, dtype=torch.uint8)
    corner[:, 0, 0, 0] = 1
    turned = views.random_turns(corner, seeds_of(4000), "turn").flatten(1).argmax(1)
    assert stats.chisquare(torch.bincount(turned, minlength=4).numpy()).pvalue > 1e-3


def test_grid_corners_cover_their_cells_evenly_and_nothing_else() -> None:
    """96 x 98 px in 3 x 3 cells of 32: squares of 27 over 5 of the 6 places; 2 columns are left over."""
    corners = views.grid_corners(seeds_of(3000), "jigsaw", (96, 98), 3, 27, 4)
    assert corners.shape == (3000, 9, 2)
    for place in range(9):
        for axis, border in enumerate((0, 1)):
            start = corners[:, place, axis] - border - 32 * (place // 3 if axis == 0 else place % 3)
            counts = torch.bincount(start, minlength=6).numpy()
            assert counts[5] == 0 and stats.chisquare(counts[:5]).pvalue > 1e-4
    moves = (corners - corners.float().mean(0)).flatten(1).T.numpy()
    assert np.abs(np.corrcoef(moves) - np.eye(18)).max() < 0.09  # squares and axes move independently
    fixed = views.grid_corners(seeds_of(2), "jigsaw", (96, 96), 3, 28, 0)
    assert fixed[0].tolist() == [[2 + 32 * row, 2 + 32 * column] for row in range(3) for column in range(3)]
    with pytest.raises(HarnessError, match="squares of 30 px moved by 3 do not fit into cells of 32 px"):
        views.grid_corners(seeds_of(2), "jigsaw", (96, 96), 3, 30, 3)


class NothingFromTheHost(TorchDispatchMode):
    """Refuses what makes a GPU wait for the host or the host for it, as far as fake tensors do not: copies."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            assert not isinstance(value, Tensor) or value.device.type == "cuda", f"{func} has a tensor on the CPU"
        return out


@pytest.mark.parametrize("name", ["simclr", "byol", "rotation", "denoising_autoencoder", "sc"])
def test_no_step_asks_anything_of_the_host(name: str) -> None:
    """Fake tensors on a fake GPU have shapes and no values; 96 px, so that the blur is on."""
    info, plugin = info_of(96), registry.load_method(name)
    with FakeTensorMode() as mode, torch.device("cuda"):
        mode.__deepcopy__ = lambda _: mode  # type: ignore[attr-defined]  # a teacher lives in the same world
        method = plugin(build("convnet_small", info), plugin.Config(), info)
        images, indices = torch.zeros(4, 3, 96, 96, dtype=torch.uint8), torch.arange(4)
        step = torch.zeros((), dtype=torch.int64)
        with NothingFromTheHost():
            out = method.loss(Batch(images, None, indices, hash_seeds(3, 1, indices)), step)
        with pytest.raises(DataDependentOutputException):
            out["loss"].item()
    assert all(value.shape == () for value in out.values())


def test_no_view_asks_anything_of_the_host() -> None:
    config = views.ViewConfig(blur=0.5, solarise=0.3, mirror=True)
    maker = views.ViewMaker.of(config, info_of(30))
    with FakeTensorMode(), torch.device("cuda"), NothingFromTheHost():
        images, seeds = torch.zeros(4, 3, 30, 30, dtype=torch.uint8), hash_seeds(3, 1, torch.arange(4))
        assert maker(images, seeds, "view").device.type == "cuda"
        assert shift_and_mirror(images, seeds, "view", 2, True).device.type == "cuda"
        assert views.random_turns(images, seeds, "view").device.type == "cuda"
        corners = views.grid_corners(seeds, "view", (30, 30), 3, 8, 2)
        assert views.operations.cut_squares(images, corners, 8).shape == (4, 9, 3, 8, 8)
        with pytest.raises(AssertionError, match="on the CPU"):
            torch.tensor(3)
        with pytest.raises(DynamicOutputShapeException):
            images[images > 0]
