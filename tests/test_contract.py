"""What every registered method must do, on digits with `convnet_small` and batches of 8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness import registry
from harness.arms import build_method
from harness.augment import hash_seeds
from harness.batches import Batches
from harness.config import Layers, RunConfig, dotted, resolve
from harness.contracts import Batch, Choice, DatasetInfo, HarnessError, Method, Range, Split
from harness.optim import OptimConfig, ScheduleConfig
from harness.pretrain import Plan, train

CPU = torch.device("cpu")
METHODS = [name for name in registry.names("method") if registry.load_method(name).role != "outside"]
TRAINED = [name for name in METHODS if registry.load_method(name).trains]


@pytest.fixture(scope="module")
def digits() -> tuple[DatasetInfo, Split]:
    plugin, _ = registry.load_dataset("digits")
    data = plugin(Path(), None, None)
    return data.info, data.split("train")


def make(name: str, info: DatasetInfo, **overrides: Any) -> tuple[Method, RunConfig]:
    config = resolve(name, "digits", Layers(overrides=overrides), default_encoder="convnet_small")
    return build_method(name, config, info), config


def batches(split: Split, name: str, size: int = 8, count: int = 40) -> Batches:
    labels = split.labels[:count] if registry.load_method(name).supervised and split.labels is not None else None
    return Batches(split.images[:count], labels, batch_size=size, seed=1, device=CPU)


@pytest.mark.parametrize("name", TRAINED)
def test_two_steps_finite_and_gradient_everywhere(name: str, digits: tuple[DatasetInfo, Split]) -> None:
    info, split = digits
    method, _ = make(name, info)
    method.prepare(batches(split, name))
    optimizer = torch.optim.SGD([p for g in method.parameter_groups() for p in g["params"]], lr=0.01)
    for step in range(2):
        losses = method.loss(batches(split, name).at(step), torch.tensor(step))
        assert losses["loss"].ndim == 0
        assert all(torch.isfinite(value) for value in losses.values())
        optimizer.zero_grad()
        losses["loss"].backward()
        for key, parameter in method.encoder.named_parameters():
            if not parameter.requires_grad:  # what the method says it leaves as it is
                continue
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, f"no gradient reaches {key}"
        optimizer.step()
        method.after_step(torch.tensor((step + 1) / 2))


@pytest.mark.parametrize("name", TRAINED)
def test_same_seed_same_loss_and_state_dict_round_trip(name: str, digits: tuple[DatasetInfo, Split]) -> None:
    info, split = digits
    (one, _), (two, _) = make(name, info), make(name, info)
    batch = batches(split, name).at(0)
    first = one.loss(batch, torch.tensor(0))["loss"]
    assert torch.equal(first, two.loss(batch, torch.tensor(0))["loss"])
    other, _ = make(name, info, seed=5)
    assert not torch.equal(first, other.loss(batch, torch.tensor(0))["loss"])
    other.load_state_dict(two.state_dict())
    two_again, other_again = (m.loss(batch, torch.tensor(1))["loss"] for m in (two, other))
    assert torch.equal(two_again, other_again)


@pytest.mark.parametrize("name", TRAINED)
def test_resume_is_bit_identical(name: str, digits: tuple[DatasetInfo, Split], tmp_path: Path) -> None:
    info, split = digits

    class Killed(Exception):
        pass

    def killed_at_10(step: int, means: dict[str, float], executed: int) -> None:
        if step >= 10:
            raise Killed

    plan = Plan(15, 1, OptimConfig(lr=0.01), ScheduleConfig(), bf16=False, checkpoint_seconds=0.0)
    straight, killed, resumed = (make(name, info)[0] for _ in range(3))
    train(straight, batches(split, name), plan, None, lambda *_: None)
    with pytest.raises(Killed):
        train(killed, batches(split, name), plan, tmp_path, killed_at_10)
    done = train(resumed, batches(split, name), plan, tmp_path, lambda *_: None)
    assert done.executed < 15
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize("name", TRAINED)
def test_bf16_is_close(name: str, digits: tuple[DatasetInfo, Split]) -> None:
    info, split = digits
    batch = batches(split, name).at(0)
    exact = make(name, info)[0].loss(batch, torch.tensor(0))["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = make(name, info)[0].loss(batch, torch.tensor(0))["loss"]
    assert torch.isfinite(rough)
    assert float(rough.detach()) == pytest.approx(float(exact.detach()), rel=0.1, abs=0.05)


@pytest.mark.parametrize("name", METHODS)
def test_views_depend_on_the_sample_alone(name: str, digits: tuple[DatasetInfo, Split]) -> None:
    """Another batch layout gives the same views per sample."""
    info, split = digits
    method, _ = make(name, info)
    indices = torch.tensor([3, 9, 17, 4, 30, 2])
    everything = batches(split, name)
    whole = method.preview(everything.gather(indices, 5))
    parts = [method.preview(everything.gather(part, 5)) for part in (indices[:1], indices[1:4], indices[4:])]
    for view, value in whole.items():
        assert torch.equal(value, torch.cat([part[view] for part in parts]))
        assert value.is_floating_point() and value.min() >= 0 and value.max() <= 1


@pytest.mark.parametrize("name", METHODS)
def test_search_ranges_hold_valid_values(name: str, digits: tuple[DatasetInfo, Split]) -> None:
    info, _ = digits
    plugin = registry.load_method(name)
    for key, field in plugin.Config.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        search: Any = extra.get("search")
        assert field.description, f"{key} has no meaning"
        values = (
            search.values
            if isinstance(search, Choice)
            else (search.low, search.high)
            if isinstance(search, Range)
            else ()
        )
        for value in values:
            try:
                make(name, info, **{f"method.{key}": value})
            except HarnessError as error:  # refused with the numbers, not by the type
                assert "setting 'method." not in str(error)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_not_shown_labels_unless_supervised(name: str, digits: tuple[DatasetInfo, Split]) -> None:
    info, split = digits
    method, _ = make(name, info)
    if not method.trains or method.supervised:
        pytest.skip("trains nothing, or is declared supervised")
    indices = torch.arange(8)
    batch = Batch(split.images[indices], None, indices, hash_seeds(0, 0, indices))
    assert torch.isfinite(method.loss(batch, torch.tensor(0))["loss"])


@pytest.mark.parametrize("name", METHODS)
def test_settings_have_one_spelling(name: str, digits: tuple[DatasetInfo, Split]) -> None:
    _, config = make(name, digits[0])
    for key in dotted(config):
        assert all(part.isidentifier() for part in key.split(".")), key
