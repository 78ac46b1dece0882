"""Methods that bring an encoder: which one is trained, what may be asked for instead, what identity and export make of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from harness import encoders, export, fingerprint, registry, runs, vit
from harness.arms import Arm, Request, build_encoder, encoder_revision, make_plan
from harness.config import Layers, load_recipe
from harness.contracts import HarnessError
from harness.runner import run
from harness.vit import REVISION, Size

TRANSFORMERS = ("ijepa", "mae", "simmim")
FEW: dict[str, Any] = {"data.num_pretrain_images": 16, "batch_size": 8, "precision": "fp32"}


def arm(method: str, encoder: str | None = None, recipes: tuple[str, ...] = (), **overrides: Any) -> Arm:
    flags = {} if encoder is None else {"encoder.name": encoder}
    layers = Layers([load_recipe(name) for name in recipes], flags, {**FEW, **overrides})
    return make_plan(Request(method, "digits", layers, control=False, evaluators=("knn",))).arms[0]


@pytest.fixture
def small_vits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second size that is quick to make and to train."""
    monkeypatch.setitem(vit.SIZES, "vit_small", Size(32, 1, 2))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_another_size_is_used_and_is_another_pretraining(name: str, small_vits: None) -> None:
    default, asked = arm(name), arm(name, "vit_small")
    assert (default.encoder, default.config.encoder.name) == ("vit_tiny", "vit_tiny")
    assert (asked.encoder, asked.config.encoder.name) == ("vit_small", "vit_small")
    assert asked.identity["settings"]["encoder.name"] == "vit_small"
    assert asked.pretrain_id != default.pretrain_id


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_its_own_encoder_has_one_identity_however_it_comes_about(name: str) -> None:
    """As before there was a choice: the data set's default and a recipe's are not meant for it, its own need no name."""
    plain = arm(name)
    assert not any(key.startswith("encoder.") for key in plain.identity["settings"])
    assert arm(name, "vit_tiny").pretrain_id == plain.pretrain_id
    assert plain.identity["encoder_revision"] == REVISION
    assert "encoder_revision" not in arm("simclr").identity
    quick = arm(name, recipes=("quick",), epochs=1)
    assert quick.encoder == "vit_tiny" and not any(key.startswith("encoder.") for key in quick.identity["settings"])


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("asked", ["convnet_small", "resnet18"])
def test_a_convolutional_encoder_is_refused_by_name(name: str, asked: str) -> None:
    expected = (
        f"--encoder {asked}: method '{name}' needs one of vit_tiny, vit_small; name one of these, or leave it out"
    )
    with pytest.raises(HarnessError) as error:
        arm(name, asked)
    assert str(error.value) == expected
    with pytest.raises(HarnessError, match=f"--encoder {asked}: method"):
        arm(name, **{"encoder.name": asked})


def test_a_floor_lets_the_encoder_be_named_for_the_controls() -> None:
    assert arm("pixels", "resnet18").encoder == "pixels"
    assert arm("coates_kmeans", "resnet18").pretrain_id == arm("coates_kmeans").pretrain_id


def test_the_revision_is_that_of_the_network_that_is_used() -> None:
    """Not of the one that is named for the controls: a transfer asks for it again."""
    info = registry.load_dataset("digits")[0](Path(), None, None).info
    for name, revision in (("pixels", None), ("sc", encoders.REVISIONS["resnet18_small"])):
        made = arm(name, "resnet18_small")
        assert encoder_revision(name, made.config, info) == revision
        assert made.identity.get("encoder_revision") == revision


def test_a_named_encoder_starts_as_the_controls_one(small_vits: None) -> None:
    plugin, _ = registry.load_dataset("digits")
    info = plugin(Path()).info
    config = arm("mae", "vit_small").config
    first, second = (fingerprint.weights_sha256(build_encoder(m, config, info)) for m in ("mae", "simclr"))
    assert first == second


@pytest.fixture
def finished(tmp_path: Path, published_formats: ModuleType, small_vits: None) -> dict[str, runs.Run]:
    """`mae` trained on a few images with its own encoder, and with one that was named."""
    published_formats.write_image_folder(tmp_path / "images", np.random.default_rng(0), size=(28, 28))
    out = {}
    for encoder in ("vit_tiny", "vit_small"):
        run("mae", f"folder:{tmp_path / 'images'}", workspace=tmp_path, encoder=encoder if encoder == "vit_small" else None,
            epochs=1, set={"batch_size": 4}, evaluators=["knn"], control=False, tracking="none")  # fmt: skip
        out[encoder] = runs.find(tmp_path, "latest")
    return out


def test_export_gives_out_what_was_trained(finished: dict[str, runs.Run], tmp_path: Path) -> None:
    for name, done in finished.items():
        report = export.export(done, tmp_path / name)
        assert report.torchvision is None and name in report.reason
        loaded = export.load(tmp_path / name)
        assert loaded.name == name
        assert fingerprint.weights_sha256(loaded) == done.facts["weights_sha256"]
    # a run from before the encoder was recorded has the data set's default one in its record
    config = finished["vit_tiny"].facts["config"] | {"encoder.name": "convnet_small"}
    old = replace(finished["vit_tiny"], facts=finished["vit_tiny"].facts | {"config": config})
    export.export(old, tmp_path / "old")
    assert export.load(tmp_path / "old").name == "vit_tiny"
    # to load an encoder leaves the caller's random numbers as they were
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    runs.load_encoder("latest", tmp_path)
    assert torch.equal(torch.rand(4), expected)
