"""harness.views against torchvision's transforms, formula by formula and law by law."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from harness import registry, views
from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo
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


@pytest.mark.parametrize("side", [8, 32, 96])
def test_resampling_is_torchvisions(side: int) -> None:
    images = torch.rand(48, 3, side, side, generator=torch.Generator().manual_seed(1))
    boxes = views.crop_boxes(seeds_of(48), "resample", (side, side), (0.08, 1.0))
    flip = torch.arange(48) % 2 == 1
    expected = torch.stack(
        [
            reference.resized_crop(image, *(int(part[i]) for part in boxes), [side, side], antialias=False)
            for i, image in enumerate(images)
        ]
    )
    assert (views.resize_boxes(images, boxes) - expected).abs().max() < 1e-4
    mirrored = torch.where(flip[:, None, None, None], expected.flip(3), expected)
    assert (views.resize_boxes(images, boxes, flip) - mirrored).abs().max() < 1e-4


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_are_torchvisions_in_every_order(channels: int) -> None:
    images = smooth(96, channels=channels)
    images[:4] = images[:4, :1]  # greys, where hue is undefined
    images[4, :, :8], images[5] = 0.0, 1.0
    drawn = torch.rand(96, 4, generator=torch.Generator().manual_seed(2))
    factors, turn = 0.2 + 1.6 * drawn[:, :3], drawn[:, 3] - 0.5
    order = torch.rand(96, 4, generator=torch.Generator().manual_seed(3)).argsort(1)
    steps = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue)
    amounts = torch.cat((factors, turn[:, None]), 1)
    expected = []
    for i, image in enumerate(images):
        for kind in order[i].tolist():
            image = steps[kind](image, float(amounts[i, kind]))
        expected.append(image)
    assert (views.adjust_colours(images, factors, turn, order) - torch.stack(expected)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", range(4))
def test_each_colour_operation_alone(kind: int) -> None:
    images = smooth(16)
    amount = torch.linspace(-0.5, 0.5, 16) if kind == 3 else torch.linspace(0, 2, 16)
    factors, turn = torch.ones(16, 3), torch.zeros(16)
    if kind == 3:
        turn = amount
    else:
        factors[:, kind] = amount
    step = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue)
    expected = torch.stack([step[kind](image, float(a)) for image, a in zip(images, amount, strict=True)])
    found = views.adjust_colours(images, factors, turn, torch.arange(4).expand(16, 4))
    assert (found - expected).abs().max() < 1e-5


def test_jitter_is_drawn_over_the_whole_range_and_in_every_order() -> None:
    seen: list[tuple[Tensor, ...]] = []
    original = views.adjust_colours

    def spy(images: Tensor, *drawn: Tensor) -> Tensor:
        seen.append(drawn)
        return original(images, *drawn)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "adjust_colours", spy)
        views.colour_jitter(torch.rand(4000, 3, 2, 2), seeds_of(4000), "jitter", 0.5, 0.8)
    factors, turn, order = seen[0]
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


@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0, 2.0])
def test_blur_is_torchvisions(sigma: float) -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    expected = reference.gaussian_blur(images, [9, 9], [sigma, sigma])
    assert (views.blur(images, torch.full((4,), sigma), 9) - expected).abs().max() < 1e-6


def test_blur_leaves_the_unchosen_alone_and_fits_tiny_images() -> None:
    images = torch.rand(1000, 1, 3, 3)
    found = views.gaussian_blur(images, seeds_of(1000), "blur", 0.5)
    same = (found == images).flatten(1).all(1)
    assert 0.4 < float(same.float().mean()) < 0.6


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [12, 96])
def test_a_view_depends_on_its_sample_alone(side: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (23, channels, side, side), dtype=torch.uint8, generator=generator)
    images = images.to(memory_format=torch.channels_last)
    maker, seeds = views.ViewMaker.of(views.ViewConfig(blur=0.5), info_of(side, True, channels)), seeds_of(23)
    whole = maker(images, seeds, "one")
    for part in (slice(0, 1), slice(1, 8), slice(8, 23)):
        assert torch.equal(whole[part], maker(images[part], seeds[part], "one"))
    assert not torch.equal(whole, maker(images, seeds, "two"))
    assert whole.dtype == torch.float32 and whole.shape == images.shape and whole.min() >= 0 and whole.max() <= 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whole, maker(images, seeds, "one"))


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


@pytest.mark.parametrize("name", ["simclr", "byol", "rotation", "denoising_autoencoder"])
def test_no_step_asks_anything_of_the_host(name: str) -> None:
    """Fake tensors have shapes and no values; 96 px, so that the blur is on."""
    info, plugin = info_of(96), registry.load_method(name)
    method, indices = plugin(build("convnet_small", info), plugin.Config(), info), torch.arange(4)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        images = mode.from_tensor(torch.zeros(4, 3, 96, 96, dtype=torch.uint8))
        batch = Batch(images, None, mode.from_tensor(indices), mode.from_tensor(seeds_of(4)))
        out = method.loss(batch, mode.from_tensor(torch.tensor(0)))
        with pytest.raises(DataDependentOutputException):
            out["loss"].item()
    assert all(value.shape == () for value in out.values())
