"""What every registered method must do, on digits, tiny STL-10 files, a grey and a colour folder: each cell runs, or is
refused by one line before any work. Batches of 8 and few steps: this is about the contract, nothing is learnt.

The encoder is the data set's default one or the method's own; `paper_stl10` takes seconds a step on a CPU at 96 px, so
those cells are built with it, which is where a method refuses, and take their steps with `convnet_small`, whose map has
23 x 23 cells there for the 24 x 24 of the other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from harness import registry
from harness.arms import build_method
from harness.augment import hash_seeds
from harness.batches import Batches
from harness.config import Layers, RunConfig, describe, dotted, resolve
from harness.contracts import Batch, Choice, DatasetInfo, HarnessError, Method, Range, Split
from harness.optim import OptimConfig, ScheduleConfig
from harness.pretrain import Plan, train

CPU = torch.device("cpu")
METHODS = [name for name in registry.names("method") if registry.load_method(name).role != "outside"]
TRAINED = [name for name in METHODS if registry.load_method(name).trains]
DATA = ("digits", "stl10", "grey folder", "colour folder")
SIZE, COUNT = 8, 20  # a batch, and the images: two steps an epoch, so that the third begins another
JOINT_POINTS = 4


@dataclass(frozen=True, eq=False)
class Material:
    """One data set, opened. encoder: its default; small: what the steps are taken with."""

    name: str
    info: DatasetInfo
    split: Split
    encoder: str
    small: str

    def batches(self, method: str, seed: int = 1) -> Batches:
        labelled = registry.load_method(method).supervised
        labels = self.split.labels[:COUNT] if labelled and self.split.labels is not None else None
        return Batches(self.split.images[:COUNT], labels, batch_size=SIZE, seed=seed, device=CPU)

    def config(self, method: str, encoder: str | None = None, **overrides: Any) -> RunConfig:
        return resolve(method, self.name, Layers(overrides=overrides), default_encoder=encoder or self.small)

    def make(self, method: str, **overrides: Any) -> Method:
        return build_method(method, self.config(method, **overrides), self.info)


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory, published_formats: ModuleType) -> dict[str, Material]:
    top, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    published_formats.write_stl10(top, rng)
    published_formats.write_image_folder(top / "grey", rng, num_train=COUNT, size=(32, 32), grey=True)
    published_formats.write_image_folder(top / "colour", rng, num_train=COUNT, size=(32, 32))
    out = {}
    for name in DATA:
        spec = f"folder:{top / name.split()[0]}" if name.endswith("folder") else name
        plugin, argument = registry.load_dataset(spec)
        data = plugin(top, None, argument)
        small = "convnet_small" if name == "stl10" else plugin.default_encoder
        out[name] = Material(name, data.info, data.split("train"), plugin.default_encoder, small)
    assert [m.info.channels for m in out.values()] == [1, 3, 1, 3]
    return out


@cache
def _refusal(method: str, material: Material) -> str:
    """Why this cell cannot be run at all; empty when it can."""
    try:
        build_method(method, material.config(method, material.encoder), material.info)
    except HarnessError as error:
        return str(error)
    return ""


@pytest.fixture
def cell(request: pytest.FixtureRequest, materials: dict[str, Material]) -> tuple[str, Material]:
    method, data = request.param
    material = materials[data]
    if reason := _refusal(method, material):
        pytest.skip(f"refused before any work: {reason}")
    return method, material


def cells(methods: list[str], data: tuple[str, ...] = DATA) -> Any:
    found = [(method, where) for where in data for method in methods]
    return pytest.mark.parametrize("cell", found, ids=[f"{m}-{d.replace(' ', '_')}" for m, d in found], indirect=True)


def test_every_cell_runs_or_is_refused_with_a_reason(materials: dict[str, Material]) -> None:
    refused = {(m, d): reason for d in DATA for m in METHODS if (reason := _refusal(m, materials[d]))}
    assert len(refused) < 0.1 * len(METHODS) * len(DATA), refused
    assert all("\n" not in reason and len(reason) > 20 for reason in refused.values())
    listed = (Path(__file__).parents[1] / "methods" / "README.md").read_text()
    for method, data in refused:
        assert f"`{method}` on {data}" in listed, f"{method} on {data} is refused: rerun benchmarks/methods_table.py"


# ------------------------------------------------------------------------------------------------------------ training


def _frozen(method: Method) -> dict[str, Tensor]:
    """Momentum teachers, and whatever else is outside the optimiser."""
    trained = {id(p) for group in method.parameter_groups() for p in group["params"]}
    return {key: p for key, p in method.named_parameters() if id(p) not in trained}


@cells(TRAINED)
def test_two_steps_finite_gradients_where_they_belong(cell: tuple[str, Material]) -> None:
    """Every trainable parameter of the encoder gets a gradient, nothing outside the optimiser does; the first loss is
    repeated by a second method of the same seed, and nearly so in bf16."""
    name, material = cell
    method, data = material.make(name), material.batches(name)
    method.prepare(data)
    twin = copy.deepcopy(method)
    with torch.autocast("cpu", torch.bfloat16):
        rough = copy.deepcopy(method).loss(data.at(0), torch.tensor(0))["loss"].detach()
    assert not any(p.requires_grad for key, p in method.named_parameters() if key.startswith("teacher"))
    optimizer = torch.optim.SGD([p for g in method.parameter_groups() for p in g["params"]], lr=0.01)
    for step in range(2):
        losses = method.loss(data.at(step), torch.tensor(step))
        loss = losses["loss"]
        assert loss.ndim == 0
        assert all(torch.isfinite(value) for value in losses.values())
        if step == 0:
            assert torch.isfinite(rough)
            assert float(rough) == pytest.approx(float(loss.detach()), rel=0.1, abs=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for key, parameter in method.encoder.named_parameters():
            if parameter.requires_grad:  # all but what the method says it leaves as it is
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, f"no gradient reaches {key}"
        frozen = _frozen(method)
        assert all(parameter.grad is None for parameter in frozen.values()), "a gradient outside the optimiser"
        before = {key: value.clone() for key, value in frozen.items()}
        optimizer.step()
        assert all(torch.equal(value, before[key]) for key, value in frozen.items())
        method.after_step(torch.tensor((step + 1) / 2))
    # a state dict is everything: the twin, given it, goes on alike
    twin.load_state_dict(method.state_dict())
    again = [m.loss(data.at(1), torch.tensor(1))["loss"].detach() for m in (method, twin)]
    assert torch.equal(again[0], again[1])


@cells(TRAINED)
def test_same_seed_same_loss_and_another_seed_another_one(cell: tuple[str, Material]) -> None:
    name, material = cell
    batch = material.batches(name).at(0)
    first, same, other = (
        material.make(name, seed=seed).loss(batch, torch.tensor(0))["loss"].detach() for seed in (0, 0, 5)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


class EveryStep(Plan):
    """A plan that logs, and so may save, after each step."""

    log_every = 1  # type: ignore[assignment]


class Killed(Exception):
    """Stands for a SIGKILL right after a save."""


@cells(TRAINED)
def test_resume_is_bit_identical(cell: tuple[str, Material], tmp_path: Path) -> None:
    """Killed after the second step; the third is the first of another epoch."""
    name, material = cell

    def killed_at_2(step: int, means: dict[str, float], executed: int) -> None:
        if step >= 2:
            raise Killed

    plan = EveryStep(3, 1, OptimConfig(lr=0.01), ScheduleConfig(), bf16=False, checkpoint_seconds=0.0)
    straight, killed, resumed = (material.make(name) for _ in range(3))
    for method in (straight, killed, resumed):  # as the runner does, also when it goes on
        method.prepare(material.batches(name))
    train(straight, material.batches(name), plan, None, lambda *_: None)
    with pytest.raises(Killed):
        train(killed, material.batches(name), plan, tmp_path, killed_at_2)
    done = train(resumed, material.batches(name), plan, tmp_path, lambda *_: None)
    assert done.executed == 1
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@cells([name for name in METHODS if name not in TRAINED])
def test_what_trains_nothing_gives_features(cell: tuple[str, Material]) -> None:
    name, material = cell
    method, small = material.make(name), material.batches(name)
    try:
        method.prepare(small)
    except HarnessError as error:  # too few images for what it counts: named with the numbers
        assert any(character.isdigit() for character in str(error))
        return
    with torch.no_grad():
        feature_map = method.encoder.eval()(small.at(0).images)
        for readout in method.encoder.readouts:
            features = method.encoder.read(feature_map, readout)
            assert features.ndim == 2 and len(features) == SIZE and torch.isfinite(features).all()


# ------------------------------------------------------------------------------------------------------------- settings


def joint_points(model: Any, count: int) -> Iterator[dict[str, Any]]:
    """The lowest and the highest of every range, then `count` random points, all searched settings at once."""
    rng = np.random.default_rng(0)
    searched = {
        key: (extra["search"], field.annotation)
        for key, field in model.model_fields.items()
        if isinstance(extra := field.json_schema_extra, dict) and extra.get("search") is not None
    }

    def one(search: Any, kind: Any, share: float) -> Any:
        if isinstance(search, Choice):
            return search.values[min(int(share * len(search.values)), len(search.values) - 1)]
        assert isinstance(search, Range)
        low, high = (np.log([search.low, search.high]) if search.log else np.array([search.low, search.high])).tolist()
        value = low + share * (high - low)
        value = min(max(float(np.exp(value)) if search.log else value, search.low), search.high)
        return round(value) if kind is int or kind == int | None else value

    for shares in [dict.fromkeys(searched, 0.0), dict.fromkeys(searched, 1.0)] + [
        {key: float(rng.random()) for key in searched} for _ in range(count)
    ]:
        yield {f"method.{key}": one(*searched[key], shares[key]) for key in searched}


@cells(METHODS)
def test_points_of_the_search_space_are_valid(cell: tuple[str, Material]) -> None:
    """Each is of the right type and within its limits; where the numbers do not fit this data, one line says so."""
    name, material = cell
    fitting = 0
    for point in joint_points(registry.load_method(name).Config, JOINT_POINTS):
        config = material.config(name, **point)
        try:
            build_method(name, config, material.info)
            fitting += 1
        except HarnessError as error:
            assert len(str(error)) > 20 and "\n" not in str(error)
    assert fitting > 0


@pytest.mark.parametrize("name", METHODS)
def test_settings_have_meaning_and_one_spelling(name: str, materials: dict[str, Material]) -> None:
    for key, field in registry.load_method(name).Config.model_fields.items():
        assert field.description, f"{key} has no meaning"
    for key in dotted(materials["digits"].config(name)):
        assert all(part.isidentifier() for part in key.split(".")), key


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_setting_lists_near_ones(name: str, materials: dict[str, Material]) -> None:
    known = [record["key"].removeprefix("method.") for record in describe(registry.load_method(name).Config, "method.")]
    for key in known or ["temperature"]:
        with pytest.raises(HarnessError) as error:
            materials["digits"].config(name, **{f"method.{key}x": 1})
        text = str(error.value)
        assert text.startswith(f"unknown setting 'method.{key}x' of method '{name}'; ") and "\n" not in text
        if known:
            assert f"method.{key}" in text.partition("did you mean ")[2].rstrip("?").split(", ")


# ---------------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("name", METHODS)
def test_views_depend_on_the_sample_alone(name: str, materials: dict[str, Material]) -> None:
    """Another batch layout gives the same views per sample."""
    material = materials["digits"]
    method, everything = (
        material.make(name),
        Batches(material.split.images[:40], None, batch_size=8, seed=1, device=CPU),
    )
    indices = torch.tensor([3, 9, 17, 4, 30, 2])
    whole = method.preview(everything.gather(indices, 5))
    parts = [method.preview(everything.gather(part, 5)) for part in (indices[:1], indices[1:4], indices[4:])]
    for view, value in whole.items():
        assert torch.equal(value, torch.cat([part[view] for part in parts]))
        assert value.is_floating_point() and value.min() >= 0 and value.max() <= 1


@pytest.mark.parametrize("count", [0, 2, 6])
@pytest.mark.parametrize("name", [m for m in TRAINED if "num_local" in registry.load_method(m).Config.model_fields])
def test_local_views_are_counted(name: str, count: int, materials: dict[str, Material]) -> None:
    material = materials["digits"]
    method = material.make(name, **{"method.num_local": count})
    assert method.num_views == 2 + count == len(method.preview(material.batches(name).at(0)))
    assert material.make(name).num_views == registry.load_method(name).views_per_image


@pytest.mark.parametrize("name", [name for name in TRAINED if not registry.load_method(name).supervised])
def test_a_method_is_not_shown_labels_unless_supervised(name: str, materials: dict[str, Material]) -> None:
    material = materials["digits"]
    indices = torch.arange(8)
    batch = Batch(material.split.images[indices], None, indices, hash_seeds(0, 0, indices))
    assert torch.isfinite(material.make(name).loss(batch, torch.tensor(0))["loss"])
