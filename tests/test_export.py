"""export: what leaves is the trained encoder to the bit, and for torchvision a network with the probe's predictions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torchvision import models

from harness import durable, encoders, records, runs
from harness.contracts import DatasetInfo, Encoder, HarnessError
from harness.evaluators.linear_probe import LinearModel, Standardiser
from harness.export import TORCHVISION, export, fold, load
from harness.runner import evaluate, run

SIDE = 40  # two cells a side at the end of a ResNet, so that averaging the map matters
OPTIONS: dict[str, Any] = {"evaluators": ["linear_probe"], "control": False, "tracking": "none"}


def write_images(top: Path) -> None:
    """Three classes of noisy colours that overlap, so that not every prediction is right."""
    chance = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 20)):
        for label, name in enumerate(("blue", "green", "red")):
            folder = top / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                colour = chance.integers(0, 200, 3)
                colour[2 - label] += 30
                pixels = (colour + chance.integers(0, 56, (SIDE, SIDE, 3))).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("images")
    write_images(top)
    return top


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """A ResNet-18 trained for one epoch on a folder of colour images, and probed."""
    workspace = tmp_path_factory.mktemp("workspace")
    settings = {"data.image_size": SIDE, "batch_size": 12, "optim.lr": 0.01, "precision": "fp32"}  # exact agreement
    dataset = f"folder:{images}"
    run("supervised", dataset, workspace=workspace, encoder="resnet18", epochs=1, set=settings, **OPTIONS)
    return runs.find(workspace, "latest")


@pytest.fixture
def copy(finished: runs.Run, tmp_path: Path) -> runs.Run:
    """The same run in a workspace of its own, to be damaged."""
    shutil.copytree(finished.workspace, tmp_path / "copy")
    return runs.find(tmp_path / "copy", finished.pretrain_id)


def stored_predictions(of: runs.Run) -> np.ndarray:
    [path] = (records.runs_folder(of.workspace) / of.pretrain_id).glob("*.predictions.npz")
    return np.load(path)["gap"]


def pixels_of(images: Path) -> Tensor:
    """The test images in the order of their paths, read by Pillow alone."""
    files = sorted((images / "test").rglob("*.png"), key=lambda path: path.as_posix())
    pixels = np.stack([np.asarray(Image.open(path)) for path in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def test_torchvision_gives_the_predictions_of_the_probe(finished: runs.Run, images: Path, tmp_path: Path) -> None:
    """As somebody without this package would do it, from the lines in encoder.json."""
    report = export(finished, tmp_path / "out")
    assert report.reason == "" and report.torchvision is not None
    facts = json.loads((tmp_path / "out" / "encoder.json").read_text())
    model = models.resnet18(num_classes=len(facts["torchvision"]["classes"]))
    state = torch.load(tmp_path / "out" / facts["torchvision"]["name"], weights_only=True)
    model.load_state_dict(state, strict=True)
    mean, std = (torch.tensor(facts[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        logits = model.eval()((pixels_of(images) / 255 - mean) / std)
    predicted, stored = logits.argmax(1).numpy(), stored_predictions(finished)
    assert (predicted == stored).all()
    assert len(set(stored.tolist())) > 1, "a constant prediction would prove nothing"
    assert (report.torchvision.num_equal, report.torchvision.num_test) == (60, 60)
    assert report.lines()[1].endswith("60 of 60 test predictions as stored")
    assert (report.torchvision.labels, report.torchvision.fold) == ("all", None)
    top1 = (predicted == np.repeat([0, 1, 2], 20)).mean()
    rows = records.frame(records.read_all(finished.workspace))
    row = rows[(rows.readout == "gap") & (rows.split == "test") & (rows.metric == "top1")].iloc[0]
    assert row.value == pytest.approx(top1)


def test_the_encoder_comes_back_to_the_bit(finished: runs.Run, images: Path, tmp_path: Path) -> None:
    report = export(finished, tmp_path / "out")
    assert report.weights_sha256 == finished.facts["weights_sha256"]
    tensors = load_file(tmp_path / "out" / "encoder.safetensors")
    encoder = finished.encoder()
    assert set(tensors) == set(encoder.state_dict())
    assert all(torch.equal(tensors[name], value) for name, value in encoder.state_dict().items())
    pixels = pixels_of(images)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(pixels), encoder(pixels))
    text = (tmp_path / "out" / "encoder.json").read_text()
    assert str(images) not in text and str(finished.workspace) not in text
    assert len(json.loads(text)["how_to_load"]) == 3


def test_the_lines_that_say_how_to_load_work(finished: runs.Run, images: Path, tmp_path: Path) -> None:
    export(finished, tmp_path)
    facts = json.loads((tmp_path / "encoder.json").read_text())
    mean, std = (torch.tensor(facts[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    names = {"torch": torch, "torchvision": torchvision, "images": pixels_of(images), "mean": mean, "std": std}
    own = "\n".join(facts["how_to_load"]).replace("THIS FOLDER", str(tmp_path))
    theirs = "\n".join(facts["torchvision"]["how_to_load"]).replace(
        facts["torchvision"]["name"], str(tmp_path / facts["torchvision"]["name"])
    )
    with torch.no_grad():
        exec(own, names)
        exec(theirs, names)
    features, logits = names["features"], names["logits"]
    assert isinstance(features, Tensor) and features.shape == (60, 512)
    assert isinstance(logits, Tensor) and (logits.argmax(1).numpy() == stored_predictions(finished)).all()


def test_the_probe_evaluated_last_is_exported(images: Path, tmp_path: Path) -> None:
    workspace, settings = tmp_path / "workspace", {"data.image_size": SIDE}
    run("random_init", f"folder:{images}", workspace=workspace, encoder="resnet18", set=settings, **OPTIONS)
    for path in workspace.glob("results/runs/*/*.json"):
        document = json.loads(path.read_text())
        rows = [row | {"finished_at": "2020-01-01T00:00:00+00:00"} for row in document["rows"]]
        durable.write_sealed(path, {"rows": rows, "chosen": document["chosen"]})
    evaluate("latest", workspace=workspace, labels="6pc", label_seed=5, **OPTIONS)
    report = export(runs.find(workspace, "latest"), tmp_path / "out")
    assert report.torchvision is not None, report.reason
    assert (report.torchvision.labels, report.torchvision.label_seed) == ("6pc", 5)
    assert report.torchvision.num_equal == report.torchvision.num_test == 60


# ----------------------------------------------------------------------------------------------------- by the part


def network_of(name: str) -> Encoder:
    """A network with batch-norm statistics that are not the initial ones."""
    info = DatasetInfo(
        name="toy", title="Toy", classes=tuple("abcdefg"), image_size=(SIDE, SIDE), channels=3, mean=(0.3, 0.5, 0.6),
        std=(0.2, 0.25, 0.3), counts={"train": 8}, licence="", citation="", default_encoder=name,
        pretrain_split="train", mirror_keeps_label=False,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = encoders.build(name, info).train()
    with torch.no_grad():
        for _ in range(3):
            encoder(torch.rand(16, 3, SIDE, SIDE))
    return encoder.eval()


@pytest.mark.parametrize("name", TORCHVISION)
def test_folding_is_exact(name: str) -> None:
    """Logits of torchvision's network equal those of the probe on pooled features, also where a feature is constant."""
    encoder = network_of(name)
    images = torch.randint(0, 256, (12, 3, SIDE, SIDE), dtype=torch.uint8)
    with torch.no_grad():
        features = encoder.pool(encoder(images))
        standardise = Standardiser.fit(features.double())
        width = features.shape[1]
        probe = LinearModel(standardise, torch.randn(width, 7).double() / width, torch.randn(7).double(), 0.0, True)
        model = models.get_model(name, weights=None, num_classes=7)
        model.load_state_dict(fold(encoder, probe), strict=True)
        logits = model.eval()(encoder.normalise(images)).double()
    torch.testing.assert_close(logits, probe.logits(features), rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_nothing_is_overwritten(finished: runs.Run, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "encoder.json").write_text("precious")
    else:
        out.write_text("precious")
    with pytest.raises(HarnessError, match="not an empty folder"):
        export(finished, out)
    assert (out / "encoder.json" if kind == "folder" else out).read_text() == "precious"


def test_other_networks_are_refused_with_the_reason(images: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    settings = {"data.image_size": 28}
    run("random_init", f"folder:{images}", workspace=workspace, set=settings, **OPTIONS)
    small = runs.find(workspace, "latest")
    with pytest.raises(HarnessError, match="convnet_small on 3 channels is not a network of torchvision's"):
        export(small, tmp_path / "asked", torchvision=True)
    assert not (tmp_path / "asked").exists()
    report = export(small, tmp_path / "out")
    assert report.torchvision is None and "convnet_small" in report.lines()[1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["encoder.json", "encoder.safetensors"]
    assert "torchvision" not in json.loads((tmp_path / "out" / "encoder.json").read_text())
    assert load(tmp_path / "out").name == "convnet_small"


def test_a_floor_has_no_network(images: Path, tmp_path: Path) -> None:
    run("pixels", f"folder:{images}", workspace=tmp_path / "workspace", set={"data.image_size": 28}, **OPTIONS)
    with pytest.raises(HarnessError, match="pixels, which has no network"):
        export(runs.find(tmp_path / "workspace", "latest"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_probe(copy: runs.Run, tmp_path: Path) -> None:
    shutil.rmtree(copy.workspace / "results")
    report = export(copy, tmp_path / "out")
    assert report.torchvision is None and "--eval linear_probe" in report.reason
    with pytest.raises(HarnessError, match="--eval linear_probe"):
        export(copy, tmp_path / "asked", torchvision=True)


def test_images_that_changed_since(copy: runs.Run, images: Path, tmp_path: Path) -> None:
    other = tmp_path / "images"
    shutil.copytree(images, other)
    path = other / "train" / "red" / "0.png"
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    moved = runs.Run(copy.workspace, copy.pretrain_id, {**copy.facts, "dataset": f"folder:{other}"})
    assert "are not those that run" in export(moved, tmp_path / "out").reason
    gone = runs.Run(copy.workspace, copy.pretrain_id, {**copy.facts, "dataset": "folder:nowhere"})
    assert "is not a folder" in export(gone, tmp_path / "out2").reason


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("others", "repeats only"), ("fewer", "repeats only 0 of 60"), ("cut", "no rows of the linear probe")],
)
def test_a_network_that_does_not_repeat_the_predictions_is_kept_back(
    copy: runs.Run, tmp_path: Path, fault: str, reason: str
) -> None:
    [path] = copy.workspace.glob("results/runs/*/*.predictions.npz")
    stored = np.load(path)["gap"]
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:40])
    else:
        np.savez(path, gap=(stored + 1) % 3 if fault == "others" else stored[:-1])
        rows = path.with_name(path.name.replace(".predictions.npz", ".json"))
        document = durable.read_sealed(rows)
        assert document is not None  # predictions that do not match their recorded digest make the rows void
        durable.write_sealed(rows, {**document, "predictions_sha256": durable.sha256_file(path)})
    report = export(copy, tmp_path / "out")
    assert report.torchvision is None and reason in report.reason


def test_a_damaged_checkpoint_is_not_exported(copy: runs.Run, tmp_path: Path) -> None:
    weights = copy.folder / "encoder.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 4
    weights.write_bytes(content)
    with pytest.raises(HarnessError, match="SHA-256"):
        export(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_loading_checks_every_byte(finished: runs.Run, tmp_path: Path) -> None:
    export(finished, tmp_path / "out")
    with pytest.raises(HarnessError, match="no exported encoder"):
        load(tmp_path)
    weights = tmp_path / "out" / "encoder.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(HarnessError, match="SHA-256"):
        load(tmp_path / "out")


def test_a_place_that_cannot_be_written(finished: runs.Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(HarnessError, match="cannot write into"):
        export(finished, tmp_path / "file" / "out")
