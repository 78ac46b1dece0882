"""The floor of a step: counts against numbers worked out by hand and published ones, and that counting leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import harness
from harness import floor, registry
from harness.arms import build_method
from harness.config import Layers, resolve
from harness.contracts import Batch, DatasetInfo, Encoder, Method

CPU = torch.device("cpu")
METHODS = [name for name in registry.names("method") if registry.load_method(name).role != "outside"]


def info(side: int, channels: int) -> DatasetInfo:
    return DatasetInfo(
        name="toy", title="Toy", classes=tuple("abcdefghij"), image_size=(side, side), channels=channels,
        mean=(0.3,) * channels, std=(0.2,) * channels, counts={"train": 8}, licence="", citation="",
        default_encoder="convnet_small", pretrain_split="train", mirror_keeps_label=channels == 3,
    )  # fmt: skip


def make(name: str, encoder: str, of: DatasetInfo) -> Method:
    return build_method(
        name, resolve(name, "toy", Layers(flags={"encoder.name": encoder}), default_encoder=encoder), of
    )


class Small(Method):
    """3 -> 4 channels, 3 x 3, on 8 x 8; max pooling by 2; 4 -> 5 channels, 1 x 1; a linear layer 80 -> 2."""

    year, source = 2026, "here"

    def __init__(self, teacher: bool) -> None:
        nn.Module.__init__(self)
        self.teacher = teacher
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 5, 1, bias=False), nn.Flatten(), nn.Dropout(0.5),
        )  # fmt: skip
        self.head = nn.Linear(80, 2, bias=False)

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        images = batch.images.float()
        if self.teacher:
            with torch.no_grad():
                self.body(images)
        return {"loss": self.head(self.body(images)).square().mean()}


@pytest.mark.parametrize("teacher", [False, True])
def test_counts_by_hand(teacher: bool) -> None:
    image, first, pooled, second = 3 * 64, 4 * 64, 4 * 16, 5 * 16
    conv1, conv2, linear = 2 * 9 * 3 * first, 2 * 4 * second, 2 * 80 * 2
    flops = 2 * conv1 + 3 * conv2 + 3 * linear  # nobody asks for the image's gradient
    elements = 10 * first + 2 * image + 2 * (first + pooled) + 10 * second + 3 * pooled
    if teacher:
        flops += conv1 + conv2
        elements += 2 * first + image + (first + pooled) + 2 * second + pooled
    # three products of the linear layer: out = in W, dW = in dout, din = dout W; its weights are shared by the batch
    products = 3 * (80 + 2) + 3 * 160 / 16
    found = floor.count(Small(teacher), info(8, 3), 16, CPU)
    assert found.flops == flops
    assert found.elements == pytest.approx(elements + products, rel=1e-12)


@pytest.mark.parametrize(
    ("method", "encoder", "side", "batch", "gflop", "megabytes"),
    [
        ("sc", "paper_cifar10", 32, 128, 2.30, 11.5),
        ("sc", "paper_stl10", 96, 16, 10.4, 119.9),
        ("simclr", "resnet18_small", 32, 64, 6.66, 32.6),
        ("simclr", "resnet18", 96, 64, 3.91, 24.5),
    ],
)
def test_published_costs(method: str, encoder: str, side: int, batch: int, gflop: float, megabytes: float) -> None:
    """The design's figures, counted there from layer shapes. Ours have heads of their own and distances: < 0.6%."""
    found = floor.count(make(method, encoder, info(side, 3)), info(side, 3), batch, CPU)
    assert found.flops / 1e9 == pytest.approx(gflop, rel=6e-3)
    assert 2 * found.elements / 1e6 == pytest.approx(megabytes, rel=7e-3)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_counted_and_none_notices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "rates", lambda *_: floor.Rates(1e9, 1e9))
    of = info(28, 1)
    method = make(name, "convnet_small", of).eval()
    before = {key: value.clone() for key, value in method.state_dict().items()}
    attributes, generator = set(vars(method)), torch.get_rng_state()
    found = floor.find(method, of, 64, CPU, bf16=True)
    assert (found is not None) == method.trains
    if found is not None:
        assert found.flops > 1e6 and found.bytes > 1e5
        assert found.seconds == max(found.flops, found.bytes) / 1e9
        assert found.seconds_without_overlap == pytest.approx((found.flops + found.bytes) / 1e9)
        wide = floor.find(method, of, 64, CPU, bf16=False)
        assert wide is not None and wide.bytes == 2 * found.bytes and wide.flops == found.flops
    for key, value in method.state_dict().items():
        assert type(value) is Tensor and torch.equal(value, before[key]), key
    assert all(p.grad is None for p in method.parameters()) and set(vars(method)) == attributes
    assert not method.training and torch.equal(torch.get_rng_state(), generator)


def test_a_method_that_looks_at_values_has_no_floor() -> None:
    class Looks(Small):
        def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
            losses = super().loss(batch, step)
            assert losses["loss"].item() >= 0
            return losses

    assert floor.find(Looks(False), info(8, 3), 4, CPU, bf16=False) is None


def test_rates_are_measured_once_per_device_precision_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def measure(call: Any, device: torch.device) -> float:
        calls.append(call())
        return 0.5

    monkeypatch.setattr(floor, "_best_seconds", measure)
    monkeypatch.setattr(floor, "_SIDE", {"cpu": 64})
    monkeypatch.setattr(floor, "_CONVOLUTION", (2, 16, 8))
    monkeypatch.setattr(floor, "_COPIED", {"cpu": 1000})
    floor._measured.cache_clear()
    try:
        # the better of a product and a convolution, here 2 x 8 x 8 places of 9 x 16 x 16 weights
        expected = floor.Rates(max(2 * 64**3, 2 * 2 * 64 * 9 * 16**2) / 0.5, 2 * 1000 / 0.5)
        assert [floor.rates(CPU, True), floor.rates(CPU, True)] == [expected] * 2 and len(calls) == 3
        assert calls[0].dtype == torch.bfloat16 and floor.rates(CPU, False) == expected
        monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
        floor.rates(CPU, False)
        assert len(calls) == 9
    finally:
        floor._measured.cache_clear()


def test_rates_are_sane() -> None:
    """A core that multiplies slower than 100 MFLOP/s or copies slower than 50 MB/s is not what was measured."""
    found = floor.rates(CPU, bf16=False)
    assert found.flops > 1e8 and found.bytes > 5e7


def test_rows_carry_the_share(tmp_path: Path) -> None:
    rows = harness.run("sc", "digits", workspace=tmp_path, epochs=1, evaluators=["representation"], control=False,
                       tracking="none", data_dir=tmp_path)  # fmt: skip
    assert rows.share_of_floor.between(1e-4, 2).all() and rows.share_of_floor.nunique() == 1


def test_a_teacher_inside_a_method_is_counted_once_forward() -> None:
    """BYOL's teacher is a third of an encoder's training, or half where the image's gradient is not asked for."""
    of = info(32, 3)
    simclr, byol = (floor.count(make(name, "paper_cifar10", of), of, 32, CPU).flops for name in ("simclr", "byol"))
    encoder: Encoder = make("sc", "paper_cifar10", of).encoder
    forward = 2 * harness.encoders.multiply_adds(encoder, of)
    assert (byol - simclr) == pytest.approx(2 * forward, rel=1e-2)


def test_what_checkpointing_computes_twice_is_not_the_least() -> None:
    plain, saving = make("sc", "convnet_small", info(28, 1)), make("sc", "convnet_small", info(28, 1))
    saving.encoder.activation_checkpointing = True
    one, two = (floor.count(method, info(28, 1), 8, CPU) for method in (plain, saving))
    assert one == two and saving.encoder.activation_checkpointing
