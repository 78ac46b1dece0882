"""embed: the file holds the features that the probe used, to the bit of a batch; what cannot be embedded is named."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from harness import arms, checkpoint, embed, records, runs
from harness.budgets import make_budgets
from harness.config import Layers, dotted, resolve
from harness.contracts import Dataset, HarnessError
from harness.evaluation import extract
from harness.evaluators.linear_probe import fit_path
from harness.runner import run

FEW = 300  # more than one batch


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return arms.open_dataset("digits", None, None, offline=True)


@pytest.fixture(scope="module")
def finished(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """A run on digits as the runner commits it, its encoder fresh from the generator."""
    return make_run(tmp_path_factory.mktemp("workspace"), digits)


def make_run(workspace: Path, dataset: Dataset) -> runs.Run:
    config = resolve("random_init", "digits", Layers(), default_encoder="convnet_small")
    folder = runs.checkpoint_folder(workspace, "e" * 16)
    network = arms.build_encoder("random_init", config, dataset.info)
    facts = {
        "method": "random_init", "dataset": "digits", "config": dotted(config), "info": asdict(dataset.info),
        "identity": {"device": "cpu"}, "finished_at": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    checkpoint.save_encoder(folder, network.state_dict(), facts)
    return runs.find(workspace, "e")


@pytest.fixture(scope="module")
def folder(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first test images of digits as PNG files, some of them in a folder below."""
    top = tmp_path_factory.mktemp("images")
    (top / "second half").mkdir()
    for index, image in enumerate(digits.split("test").images[:FEW]):
        name = f"{index:03d}.png" if index < FEW // 2 else f"second half/{index:03d}.png"
        Image.fromarray(image[0].numpy()).save(top / name)
    (top / "notes.txt").write_text("not an image")
    (top / ".hidden.png").write_text("neither")
    return top


def columns(path: Path) -> dict[str, np.ndarray]:
    table = parquet.read_table(path)
    return {name: np.array(table.column(name).to_pylist()) for name in table.column_names}


def expected(finished: runs.Run, digits: Dataset) -> dict[str, np.ndarray]:
    images = digits.split("test").images[:FEW]
    features = extract(finished.encoder(), images, torch.arange(FEW), torch.device("cpu"))
    return {name: values.numpy() for name, values in features.items()}


def test_files_give_the_features_of_the_probe(
    finished: runs.Run, digits: Dataset, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "features.parquet"
    assert embed.embed(finished, folder, out) == FEW
    found, wanted = columns(out), expected(finished, digits)
    assert list(found) == ["path", "gap", "spatial"]
    assert found["path"].tolist() == [
        *(f"{n:03d}.png" for n in range(FEW // 2)),
        *(f"second half/{n:03d}.png" for n in range(FEW // 2, FEW)),
    ]
    for name in ("gap", "spatial"):
        assert found[name].shape == wanted[name].shape
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-6)
    schema = parquet.read_schema(out)
    assert str(schema.field("gap").type) in ("list<element: float>", "list<item: float>")
    origin = json.loads(schema.metadata[b"harness"])
    assert origin["weights_sha256"] == finished.facts["weights_sha256"] and origin["encoder"] == "convnet_small"
    assert [path.name for path in out.parent.iterdir()] == ["features.parquet"]


@pytest.mark.parametrize("with_channel", [False, True])
def test_an_array_gives_them_too(finished: runs.Run, digits: Dataset, tmp_path: Path, with_channel: bool) -> None:
    pixels = digits.split("test").images[:FEW].permute(0, 2, 3, 1).numpy()
    np.save(tmp_path / "images.npy", pixels if with_channel else pixels[..., 0])
    assert embed.embed(finished, tmp_path / "images.npy", tmp_path / "out.parquet") == FEW
    found = columns(tmp_path / "out.parquet")
    assert list(found) == ["index", "gap", "spatial"] and found["index"].tolist() == list(range(FEW))
    np.testing.assert_allclose(found["gap"], expected(finished, digits)["gap"], rtol=0, atol=1e-6)


def test_other_sizes_and_colours_become_the_runs_own(finished: runs.Run, tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    wide = Image.fromarray(chance.integers(0, 256, (90, 160, 3), dtype=np.uint8))
    wide.save(tmp_path / "one.png")
    assert embed.embed(finished, tmp_path / "one.png", tmp_path / "out.parquet") == 1
    found = columns(tmp_path / "out.parquet")
    assert found["path"].tolist() == ["one.png"]
    square = wide.convert("L").resize((28, 28), Image.Resampling.BILINEAR, box=(35, 0, 125, 90))
    pixels = torch.from_numpy(np.array(square))[None, None]
    wanted = extract(finished.encoder(), pixels, torch.arange(1), torch.device("cpu"))["gap"]
    np.testing.assert_allclose(found["gap"], wanted.numpy(), rtol=0, atol=1e-6)


def test_broken_images_are_named_and_nothing_is_left(finished: runs.Run, folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "images", tmp_path / "out.parquet"
    source.mkdir()
    whole = (folder / "000.png").read_bytes()
    (source / "a.png").write_bytes(whole)
    (source / "cut.png").write_bytes(whole[: len(whole) // 2])
    (source / "empty.png").touch()
    (source / "text.jpg").write_text("<html>404</html>")
    (source / "new\nline.png").write_bytes(b"?")
    os.mkfifo(source / "pipe.png")
    (source / "out.png").symlink_to(folder / "000.png")
    with pytest.raises(HarnessError) as caught:
        embed.embed(finished, source, out)
    text = str(caught.value)
    assert text.startswith("6 images cannot be used: ") and "\n" not in text and " and 1 more" in text
    assert "cut.png (" in text and "empty.png (empty file)" in text and "a link out of the folder" in text
    assert str(tmp_path) not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_a_broken_image_behind_many_whole_ones(finished: runs.Run, folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "images"
    source.mkdir()
    for path in folder.rglob("[0-9]*.png"):
        (source / path.name).write_bytes(path.read_bytes())
    (source / "zzz.png").write_text("broken")
    with pytest.raises(HarnessError, match=r"1 images cannot be used: zzz\.png"):
        embed.embed(finished, source, tmp_path / "out.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_odd_names_are_kept_apart(finished: runs.Run, folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "images"
    source.mkdir()
    not_utf8 = b"caf\xe9.png" if sys.platform != "darwin" else b"cafe.png"  # which refuses such names itself
    for name in (b"caf\xc3\xa9.png", not_utf8, b"line\n.png"):
        with open(os.fsencode(source) + b"/" + name, "wb") as file:
            file.write((folder / "000.png").read_bytes())
    assert embed.embed(finished, source, tmp_path / "out.parquet") == 3
    assert len(set(columns(tmp_path / "out.parquet")["path"])) == 3


@pytest.mark.parametrize(
    ("name", "pixels", "message"),
    [
        ("float", np.zeros((2, 28, 28), np.float32), r"float32 \(2, 28, 28, 1\).*takes uint8 \(N, 28, 28, 1\)"),
        ("size", np.zeros((2, 32, 32), np.uint8), r"\(2, 32, 32, 1\).*\(N, 28, 28, 1\)"),
        ("colour", np.zeros((2, 28, 28, 3), np.uint8), r"takes uint8 \(N, 28, 28, 1\)"),
        ("flat", np.zeros((2, 784), np.uint8), "takes uint8"),
        ("none", np.zeros((0, 28, 28), np.uint8), "holds no images"),
        ("objects", np.array([{"a": 1}], dtype=object), "not a readable .npy array"),
    ],
)
def test_arrays_that_do_not_fit(
    finished: runs.Run, tmp_path: Path, name: str, pixels: np.ndarray, message: str
) -> None:
    np.save(tmp_path / f"{name}.npy", pixels, allow_pickle=True)
    with pytest.raises(HarnessError, match=message):
        embed.embed(finished, tmp_path / f"{name}.npy", tmp_path / "out.parquet")
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.npy"]


def test_a_cut_array(finished: runs.Run, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((50, 28, 28), np.uint8))
    content = (tmp_path / "images.npy").read_bytes()
    for length in (0, 5, 60, len(content) - 100):
        (tmp_path / "images.npy").write_bytes(content[:length])
        with pytest.raises(HarnessError, match="not a readable"):
            embed.embed(finished, tmp_path / "images.npy", tmp_path / "out.parquet")


def test_outputs_and_sources_that_are_refused(finished: runs.Run, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"ends in \.parquet"):
        embed.embed(finished, folder, tmp_path / "out.csv")
    with pytest.raises(HarnessError, match="no such file or folder"):
        embed.embed(finished, tmp_path / "nowhere", tmp_path / "out.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HarnessError, match="holds no images"):
        embed.embed(finished, tmp_path / "empty", tmp_path / "out.parquet")
    (tmp_path / "taken.parquet").write_text("precious")
    with pytest.raises(HarnessError, match="not overwritten"):
        embed.embed(finished, folder, tmp_path / "taken.parquet")
    assert (tmp_path / "taken.parquet").read_text() == "precious"
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(HarnessError, match="cannot write"):
        embed.embed(finished, folder, tmp_path / "file" / "out.parquet")


def test_a_damaged_encoder_embeds_nothing(digits: Dataset, folder: Path, tmp_path: Path) -> None:
    damaged = make_run(tmp_path, digits)
    weights = damaged.folder / "encoder.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(HarnessError, match="SHA-256"):
        embed.embed(damaged, folder, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_the_probe_fitted_on_embedded_features_predicts_as_stored(digits: Dataset, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    options: dict[str, Any] = {"evaluators": ["linear_probe"], "control": False, "tracking": "none"}
    row = run("random_init", "digits", workspace=workspace, labels=500, **options).iloc[0]
    committed = records.rows_path(workspace, row.pretrain_id, row.eval_id)
    train, test = digits.split("train"), digits.split("test")
    assert train.labels is not None
    features = []
    for name, split in (("train", train), ("test", test)):
        np.save(tmp_path / f"{name}.npy", split.images[:, 0].numpy())
        embed.embed(runs.find(workspace, "latest"), tmp_path / f"{name}.npy", tmp_path / f"{name}.parquet")
        features.append(torch.tensor(columns(tmp_path / f"{name}.parquet")["gap"]))
    [budget] = make_budgets("500", train.labels.numpy(), 10, 0)
    strength = json.loads(committed.read_text())["chosen"]["gap.strength"]
    model = fit_path(features[0][budget.indices], train.labels[budget.indices], 10, [strength])[0]
    stored = np.load(committed.with_suffix(".predictions.npz"))["gap"]
    assert (model.logits(features[1]).argmax(1).numpy() == stored).all()
