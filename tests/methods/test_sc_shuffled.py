"""sc_shuffled: the weights that sc makes, all there, in another order; batch-norm statistics of the new network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import harness
from harness import checkpoint
from harness.batches import Batches
from harness.contracts import Method
from harness.methods import random_init, sc_shuffled
from harness.methods.sc import SpatialContrasting
from harness.methods.sc_shuffled import ShuffledSpatialContrasting, shuffle_weights
from harness.runs import checkpoint_folder

FAST: dict[str, Any] = {"epochs": 1, "labels": "10pc", "evaluators": ["knn"], "control": False, "tracking": "none",
                        "encoder": "convnet_small"}  # fmt: skip
FIXED = {"num_threads": 1, "precision": "fp32"}


def sorted_entries(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().sort().values


def pretraining_data(seed: int = 3) -> Batches:
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Batches(images, None, batch_size=16, seed=seed, device=torch.device("cpu"))


def tensors(workspace: Path, frame: Any) -> dict[str, Tensor]:
    saved = checkpoint.load_encoder(checkpoint_folder(workspace, frame.pretrain_id.iloc[0]))
    assert saved is not None
    return saved[0]


def test_each_tensor_keeps_its_entries_and_loses_their_order() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3), nn.Linear(16, 4))
    nn.init.normal_(net[1].weight)
    net = net.to(memory_format=torch.channels_last)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    shuffle_weights(net, 7)
    for name, parameter in net.named_parameters():
        assert torch.equal(sorted_entries(parameter), sorted_entries(before[name]))
        if len(before[name].unique()) > 1:
            assert not torch.equal(parameter, before[name]), name
    # far apart, not only somewhere: hardly an entry of the large layer is where it was
    assert (net[2].weight == before["2.weight"]).float().mean() < 0.01


def test_the_seed_decides_and_layers_differ() -> None:
    def shuffled(seed: int) -> list[list[float]]:
        net = nn.Sequential(nn.Linear(50, 1, bias=False), nn.Linear(50, 1, bias=False))
        for layer in net:
            nn.init.constant_(layer.weight, 0).data.add_(torch.arange(50.0))
        shuffle_weights(net, seed)
        return [layer.weight.flatten().tolist() for layer in net]

    assert shuffled(1) == shuffled(1) != shuffled(2)
    assert shuffled(1)[0] != shuffled(1)[1]


def test_after_training_refits_the_statistics_of_the_shuffled_network(make_method: Callable[..., Any]) -> None:
    method, data = make_method(ShuffledSpatialContrasting), pretraining_data()
    for module in method.encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.running_mean, 99)
    trained = copy.deepcopy(method.encoder)
    method.train().after_training(data)
    assert method.encoder.training
    for one, other in zip(method.encoder.parameters(), trained.parameters(), strict=True):
        assert torch.equal(sorted_entries(one), sorted_entries(other))
    first = method.encoder.body["conv1"]
    with torch.no_grad():
        outputs = [nn.Sequential(*first[:-2])(method.encoder.normalise(b.images)) for b in data.batches()]
    expected = torch.stack([out.double().mean((0, 2, 3)) for out in outputs]).mean(0)
    torch.testing.assert_close(first[-2].running_mean.double(), expected, rtol=1e-4, atol=1e-5)


def test_other_seeds_other_orders(make_method: Callable[..., Any]) -> None:
    found = []
    for seed in (3, 3, 4):
        method = make_method(ShuffledSpatialContrasting)
        method.after_training(pretraining_data(seed))
        found.append(torch.cat([p.detach().flatten() for p in method.encoder.parameters()]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_it_is_sc_until_the_end(tmp_path: Path) -> None:
    """The weights that a run keeps are those of sc's run with the same seed, bit for bit, in another order."""
    plain, shuffled = (
        tensors(tmp_path, harness.run(name, "digits", workspace=tmp_path, set=FIXED, **FAST))
        for name in ("sc", "sc_shuffled")
    )
    assert plain.keys() == shuffled.keys()
    parameters = [name for name in plain if name.endswith(("weight", "bias"))]
    assert len(parameters) == 12
    for name in parameters:
        assert torch.equal(sorted_entries(plain[name]), sorted_entries(shuffled[name])), name
        assert not torch.equal(plain[name], shuffled[name]), name


def test_a_kill_after_the_last_step_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies when the weights were shuffled and not yet saved: they are shuffled once, not twice."""

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    expected = harness.run("sc_shuffled", "digits", workspace=tmp_path / "straight", set=FIXED, **FAST)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_encoder", killed)
        with pytest.raises(Killed):
            harness.run("sc_shuffled", "digits", workspace=tmp_path / "killed", set=FIXED, **FAST)
    assert list((tmp_path / "killed").rglob("state")), "nothing was left to resume from"
    resumed = harness.run("sc_shuffled", "digits", workspace=tmp_path / "killed", set=FIXED, **FAST)
    assert set(resumed.weights_sha256) == set(expected.weights_sha256)


def test_what_it_says_of_itself() -> None:
    assert ShuffledSpatialContrasting.role is None and ShuffledSpatialContrasting.trains
    assert SpatialContrasting.after_training is Method.after_training
    assert sc_shuffled.NUM_BATCHES == random_init.NUM_BATCHES
