"""Statistics and digests against plain references; image files of every kind, good and hostile."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from harness import images
from harness.images import UnreadableImage, read_image


def split_of(pixels: np.ndarray, labels: np.ndarray | None = None) -> images.Split:
    return images.as_split(pixels, labels)


# ----------------------------------------------------------------------------------------- statistics and digests


@pytest.mark.parametrize("channels", [1, 3])
def test_as_split_shares_memory_and_is_channels_last(channels: int) -> None:
    pixels = np.zeros((5, 6, 7, channels), dtype=np.uint8)
    split = split_of(pixels, np.arange(5, dtype=np.uint8))
    assert split.images.shape == (5, channels, 6, 7)
    assert split.images.is_contiguous(memory_format=torch.channels_last)
    assert split.labels is not None and split.labels.dtype == torch.int64
    pixels[3, 2, 1, channels - 1] = 9
    assert split.images[3, channels - 1, 2, 1] == 9


@given(st.integers(1, 4), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
def test_statistics_equal_float64_ones(count: int, channels: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3, 5, channels), dtype=np.uint8)
    mean, std = images.channel_statistics(split_of(pixels).images)
    fractions = pixels.astype(np.float64) / 255
    np.testing.assert_allclose(mean, fractions.mean(axis=(0, 1, 2)), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(std, fractions.std(axis=(0, 1, 2)), rtol=1e-9)


def test_statistics_of_flat_channels_and_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.full((2000, 32, 32, 3), 51, dtype=np.uint8)
    pixels[0, 0, 0, 1] = 52  # a true std of 2.7e-6
    pixels[..., 2] = np.arange(2000, dtype=np.uint8)[:, None, None]
    mean, std = images.channel_statistics(split_of(pixels).images)
    assert mean[0] == 0.2 and std[:2] == (1.0, 1e-3)
    whole = images.digest_split(split_of(pixels))
    monkeypatch.setattr(images, "CHUNK_BYTES", 10_000)
    assert images.channel_statistics(split_of(pixels).images) == (mean, std)
    assert images.digest_split(split_of(pixels)) == whole


def test_digest_sees_shape_pixels_and_labels() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
    other = pixels.copy()
    other[0, 3, 3, 2] ^= 1
    variants = [
        split_of(pixels), split_of(pixels, np.array([1])), split_of(pixels, np.array([2])), split_of(other),
        split_of(pixels.reshape(1, 2, 8, 3)), split_of(pixels.reshape(3, 4, 4, 1)),
    ]  # fmt: skip
    assert len({images.digest_split(split) for split in variants}) == len(variants)
    contiguous = images.Split(split_of(pixels).images.contiguous(), None)  # other strides, same data
    assert images.digest_split(contiguous) == images.digest_split(variants[0])
    by_hand = b"split uint8 NHWC 1 4 4 3 labels int64\n" + pixels.tobytes() + struct.pack("<q", 1)
    assert images.digest_split(variants[1]) == hashlib.sha256(by_hand).hexdigest()


def test_shown_keeps_every_name_on_one_line() -> None:
    assert images.shown("plain ä.png") == "plain ä.png"
    for hostile in ("a\nb", "\x1b[31mred", "\udcff", "a\u202eb"):
        assert images.shown(hostile).isprintable() and images.shown(Path(hostile)).isprintable()


# -------------------------------------------------------------------------------------------------- good files


def gradient(width: int, height: int) -> np.ndarray:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), 0 * x], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("suffix", sorted(images.FORMAT_OF_SUFFIX))
def test_every_suffix_can_be_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix.upper()}"
    mode = {".pgm": "L", ".pbm": "1"}.get(suffix, "RGB")
    Image.fromarray(gradient(20, 20)).convert(mode).save(path, format=images.FORMAT_OF_SUFFIX[suffix])
    assert images.inspect_image(path) == images.ImageFacts(20, mode != "RGB")
    assert read_image(path, 20, False).shape == (20, 20, 3)


def test_right_size_is_kept_bit_for_bit(tmp_path: Path) -> None:
    Image.fromarray(gradient(24, 24)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 24, False), gradient(24, 24))


@pytest.mark.parametrize(("width", "height"), [(64, 32), (32, 64), (33, 32), (1000, 8)])
def test_the_centre_square_is_kept(tmp_path: Path, width: int, height: int) -> None:
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    pixels[top : top + short, left : left + short] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    got = read_image(tmp_path / "a.png", short // 2, False)
    assert got.shape == (short // 2, short // 2, 3)
    assert (got[1:-1, 1:-1] == 200).all() and (got >= 90).all()


def test_cropping_equals_scaling_the_whole_and_cutting(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png")
    whole = np.asarray(picture.resize((24, 12), Image.Resampling.BILINEAR)).astype(int)
    assert abs(read_image(tmp_path / "a.png", 12, False).astype(int) - whole[:, 6:18]).max() <= 1


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    got = read_image(tmp_path / "a.png", 8, True).astype(int)
    assert abs(got - 127).max() <= 20, "the mean of the stripes, not one of them"


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    picture = Image.fromarray(gradient(32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to view
    picture.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 32, False), np.rot90(gradient(32, 32), -1))


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, 4:, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    got = read_image(tmp_path / "a.png", 8, False)
    assert (got[:, :4] == 255).all() and (got[:, 4:] == 0).all()
    Image.fromarray(pixels[..., [0, 3]]).save(tmp_path / "grey.png")
    assert (read_image(tmp_path / "grey.png", 8, True)[:, :4] == 255).all()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)
    for suffix in ("png", "tif"):
        Image.fromarray(values).save(tmp_path / f"a.{suffix}")
        assert images.inspect_image(tmp_path / f"a.{suffix}").grey
        got = read_image(tmp_path / f"a.{suffix}", 8, True)[..., 0]
        np.testing.assert_allclose(got, values / 257, atol=0.5)


def test_palette_and_animation(tmp_path: Path) -> None:
    red, blue = Image.new("P", (8, 8)), Image.new("RGB", (8, 8), "blue")
    red.putpalette([255, 0, 0] * 256)
    red.save(tmp_path / "p.png")
    assert not images.inspect_image(tmp_path / "p.png").grey
    assert (read_image(tmp_path / "p.png", 8, False) == (255, 0, 0)).all()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.gif", save_all=True, append_images=[blue])
    assert (read_image(tmp_path / "a.gif", 8, False)[0, 0] == (255, 0, 0)).all()


# ------------------------------------------------------------------------------------------------ hostile files


def png_header(width: int, height: int) -> bytes:
    """A well-formed PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def reasons(path: Path) -> tuple[str | None, str | None]:
    """What inspecting and reading a file complain about."""
    found: list[str | None] = []
    for read in (images.inspect_image, lambda file: read_image(file, 8, False)):
        try:
            read(path)
            found.append(None)
        except UnreadableImage as error:
            assert str(error).isprintable()
            found.append(str(error))
    return found[0], found[1]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("name", "content", "reason"), [
    ("a.png", b"", "empty file"), ("a.png", b"not an image at all", "not an image"),
    ("a.jpg", b"<?php echo 1;", "not an image"), ("a.png", png_header(60_000, 60_000), "pixels"),
    ("a.png", png_header(9_000, 9_000), "9000 x 9000 pixels"), ("a.png", png_header(2**31 - 1, 2**31 - 1), ""),
    ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
])  # fmt: skip
def test_hostile_contents_are_refused_from_the_header(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    inspected, read = reasons(path)
    assert inspected is not None and read is not None and reason in inspected


def test_a_wrong_suffix_is_refused_with_the_right_one(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", format="PNG")
    assert reasons(tmp_path / "a.jpg")[0] == "a PNG file named .jpg: rename it"


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "tif", "ppm", "webp"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    assert reasons(path) == (None, None)
    for share in (0.1, 0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        assert reasons(path)[1] is not None, f"{share} of the file"


def test_what_is_no_regular_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png"):
        assert reasons(tmp_path / name) == ("not a regular file",) * 2
    assert reasons(tmp_path / "absent.png") == ("no such file",) * 2


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(images.Image, "open", refused)  # file modes do not stop the superuser, whom CI often runs as
    assert reasons(tmp_path / "a.png") == ("permission denied",) * 2


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(tmp_path / "a.tif")
    assert "floating-point" in str(reasons(tmp_path / "a.tif")[0])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), suffix=st.sampled_from(["png", "jpg", "gif", "tif", "bmp"]))
def test_flipped_bytes_give_an_image_or_a_reason(tmp_path: Path, data: st.DataObject, suffix: str) -> None:
    path = tmp_path / f"good.{suffix}"
    if not path.exists():
        Image.fromarray(gradient(16, 12)).save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / f"damaged.{suffix}"
    damaged.write_bytes(content)
    try:
        assert read_image(damaged, 8, False).shape == (8, 8, 3)
    except UnreadableImage as error:
        assert str(error).isprintable()


def test_many_files_are_all_tried(tmp_path: Path) -> None:
    for number in range(30):
        Image.fromarray(np.full((9, 9, 3), number, dtype=np.uint8)).save(tmp_path / f"{number:02d}.png")
    for number in (3, 17):
        (tmp_path / f"{number:02d}.png").write_bytes(b"x")
    files = sorted(tmp_path.iterdir())
    facts, wrong = images.inspect_images(files)
    pixels, unreadable = images.read_images(files, 9, True)
    assert set(wrong) == set(unreadable) == {files[3], files[17]} and len(facts) == 28
    expected = [0 if number in (3, 17) else number for number in range(30)]
    assert pixels.shape == (30, 9, 9, 1) and pixels[:, 4, 4, 0].tolist() == expected
