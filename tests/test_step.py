"""The step: what it sums, how it accumulates, and that compiling, capturing and falling back change nothing."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import pretrain, registry
from harness.arms import Request, build_method, make_plan
from harness.augment import hash_seeds, stream_key
from harness.batches import Batches
from harness.config import Layers, resolve
from harness.contracts import Batch, DatasetInfo, Encoder
from harness.encoders import build
from harness.fingerprint import CUDA_REVISION
from harness.optim import OptimConfig, ScheduleConfig
from harness.step import dropout_seed, resolve_mode

CPU = torch.device("cpu")


def test_a_finished_training_keeps_nothing_alive() -> None:
    """Without the garbage collector: a captured graph would hold its memory until that happens to run."""
    alive: list[weakref.ref[Any]] = []
    real = pretrain.Step

    class Watched(real):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            alive.append(weakref.ref(self))

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pretrain, "Step", Watched)
            module, batches = Separable(), data()
            batches = Batches(batches.images, None, batch_size=10, seed=1, device=CPU, placement="streamed")
            pretrain.train(module, batches, plan(), None, lambda *_: None)
        assert len(alive) == 1 and alive[0]() is None
        deadline = time.monotonic() + 20
        while any(t.name.startswith("read-ahead") for t in threading.enumerate()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(t.name.startswith("read-ahead") for t in threading.enumerate())
    finally:
        gc.enable()


class Separable(nn.Module):
    """A loss that is a mean over images, with dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Dropout(dropout), nn.Linear(144, 3))

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        out = self.net(batch.images.float() / 255)
        return {"loss": out.square().mean(), "size": torch.full((), float(len(batch)))}


def data(device: torch.device = CPU) -> Batches:
    images = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return Batches(images, None, batch_size=10, seed=1, device=device)


def plan(**changes: Any) -> pretrain.Plan:
    optim = changes.pop("optim", OptimConfig(lr=0.05))
    return pretrain.Plan(20, 1, optim, ScheduleConfig(), bf16=changes.pop("bf16", False), **changes)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([t.flatten().double().cpu() for t in module.state_dict().values()])


@pytest.mark.parametrize("parts", [2, 3, 10])
def test_accumulating_a_mean_over_images_is_the_whole_batch(parts: int) -> None:
    whole, accumulated = Separable(), Separable()
    one = pretrain.train(whole, data(), plan(), None, lambda *_: None)
    many = pretrain.train(accumulated, data(), plan(accumulate=parts), None, lambda *_: None)
    torch.testing.assert_close(weights(whole), weights(accumulated), rtol=1e-5, atol=1e-7)
    assert [p["loss"] for p in many.curve] == pytest.approx([p["loss"] for p in one.curve], rel=1e-5)
    assert many.curve[0]["size"] < one.curve[0]["size"] == 10  # the parts were really smaller


def test_dropout_seed_is_the_hash_of_seed_and_step() -> None:
    for seed in (0, 5, 2**62):
        for step in (0, 1, 12345):
            expected = int(hash_seeds(seed, step, torch.tensor([stream_key("dropout")]))[0]) & 0x7FFF_FFFF_FFFF_FFFF
            assert dropout_seed(seed, step) == expected


@pytest.mark.parametrize("optim", ["sgd", "adamw", "lars"])
def test_what_cannot_be_captured_is_announced_and_leaves_no_trace(optim: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a torch that cannot capture")
    plain, failing, said = Separable(0.5), Separable(0.5), []
    settings = OptimConfig(name=optim, lr=0.05)  # type: ignore[arg-type]
    pretrain.train(plain, data(), plan(optim=settings), None, lambda *_: None)
    done = pretrain.train(failing, data(), plan(optim=settings, mode="graph"), None, lambda *_: None, said.append)
    assert done.mode == "off"
    assert len(said) == 1 and said[0].startswith("--compile graph failed (") and said[0].endswith("going on with off")
    assert torch.equal(weights(plain), weights(failing))


def test_a_failing_compiler_is_announced_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("no compiler here")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **words: real(f, backend=broken, **words))
    plain, failing, said = Separable(), Separable(), []
    pretrain.train(plain, data(), plan(), None, lambda *_: None)
    done = pretrain.train(failing, data(), plan(mode="compile"), None, lambda *_: None, said.append)
    assert done.mode == "off" and len(said) == 1 and "no compiler here" in said[0]
    assert torch.equal(weights(plain), weights(failing))


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_the_warm_up_of_a_compiled_step_leaves_no_trace(optim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **words: real(f, backend="eager", **words))
    plain, compiled = Separable(0.5), Separable(0.5)
    settings = OptimConfig(name=optim, lr=0.05)  # type: ignore[arg-type]
    one = pretrain.train(plain, data(), plan(optim=settings), None, lambda *_: None)
    two = pretrain.train(compiled, data(), plan(optim=settings, mode="compile"), None, lambda *_: None)
    assert two.mode == "compile" and two.curve == one.curve
    assert torch.equal(weights(plain), weights(compiled))


def test_auto_captures_on_cuda_only_and_respects_the_method() -> None:
    cuda = torch.device("cuda")
    assert resolve_mode("auto", CPU) == "off"
    assert resolve_mode("auto", cuda) == "graph"
    assert resolve_mode("auto", cuda, "clusters change between epochs") == "off"
    assert resolve_mode("graph", cuda, "clusters change between epochs") == "off"
    assert resolve_mode("compile+graph", cuda, "clusters change between epochs") == "compile"
    assert resolve_mode("compile", CPU) == "compile"


def test_a_small_label_budget_makes_fewer_parts() -> None:
    layers = Layers(flags={"encoder.name": "convnet_small"}, overrides={"accumulate": 32})
    arms = make_plan(Request("sc", "digits", layers, labels="10", evaluators=("knn",))).arms
    parts = {arm.method: (arm.config.accumulate, arm.batch_size) for arm in arms if arm.plugin.trains}
    assert parts["sc"] == (32, 128)
    assert parts["supervised"][0] == max(1, parts["supervised"][1] // 2) < 32


def encoders(info: DatasetInfo) -> tuple[Encoder, Encoder]:
    out = []
    for flag in (False, True):
        torch.manual_seed(0)
        encoder = build("convnet_small", info)
        encoder.activation_checkpointing = flag
        out.append(encoder.train())
    return out[0], out[1]


def test_activation_checkpointing_changes_memory_only() -> None:
    plugin, _ = registry.load_dataset("digits")
    dataset = plugin(Path(), None, None)
    plain, saving = encoders(dataset.info)
    images = dataset.split("train").images[:16]
    kept: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    numbers = []
    for encoder in (plain, saving):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            encoder(images).square().mean().backward()
        numbers.append(sum(kept))
    assert numbers[1] < numbers[0] / 2
    for (name, one), two in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad), name  # type: ignore[arg-type]
    for (name, one), two in zip(plain.named_buffers(), saving.buffers(), strict=True):
        assert torch.equal(one, two), f"{name}: the second pass was counted"


# ------------------------------------------------------------------------------------------------------------ on CUDA


def cuda_method(name: str) -> tuple[Any, Batches]:
    plugin, _ = registry.load_dataset("digits")
    dataset = plugin(Path(), None, None)
    config = resolve(name, "digits", Layers(), default_encoder="convnet_small")
    device = torch.device("cuda")
    split = dataset.split("train")
    labels = split.labels if registry.load_method(name).supervised else None
    batches = Batches(split.images, labels, batch_size=32, seed=3, device=device)
    method = build_method(name, config, dataset.info).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return method, batches


def trained_methods() -> list[str]:
    return [name for name in registry.names("method") if registry.load_method(name).trains]


@pytest.fixture
def same_arithmetic() -> Iterator[None]:
    """Both times the same kernels, sums in the same order: thirty steps make much of a rounding."""
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = tf32


OPTIMISERS: list[dict[str, Any]] = [
    {}, {"name": "adamw"}, {"name": "lars"}, {"momentum": 0.0, "nesterov": False}, {"clip_norm": 1.0},
]  # fmt: skip
# every method as it comes; the step's own options on one
CAPTURED = [(name, {}, 1) for name in trained_methods() if registry.load_method(name).graphable]
CAPTURED += [("sc", more, parts) for more in OPTIMISERS for parts in (1, 2) if (more, parts) != ({}, 1)]


def test_what_cannot_be_captured_says_why() -> None:
    plugins = [registry.load_method(name) for name in trained_methods()]
    assert all(plugin.graphable or plugin.why_not_graphable for plugin in plugins)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "more", "accumulate"), CAPTURED, ids=str)
@pytest.mark.parametrize("bf16", [False, True])
def test_a_captured_step_is_the_eager_step(
    name: str, more: dict[str, Any], accumulate: int, bf16: bool, same_arithmetic: None
) -> None:
    settings, curves, final = OptimConfig(lr=0.01, **more), [], []
    modes: tuple[Any, ...] = ("off", "graph")
    for mode in modes:
        method, batches = cuda_method(name)
        said: list[str] = []
        p = pretrain.Plan(30, 3, settings, ScheduleConfig(), bf16=bf16, mode=mode, accumulate=accumulate)
        done = pretrain.train(method, batches, p, None, lambda *_: None, said.append)
        assert done.mode == mode, said
        curves.append([point["loss"] for point in done.curve])
        final.append(weights(method))
    assert curves[1] == pytest.approx(curves[0], rel=5e-2 if bf16 else 1e-3)
    if not bf16:
        torch.testing.assert_close(final[0], final[1], rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", trained_methods())
@pytest.mark.parametrize("mode", ["off", "graph"])
def test_no_step_waits_for_the_device(name: str, mode: Any) -> None:
    """Between two reads of the losses nothing synchronises: CUDA itself is asked to raise."""
    method, batches = cuda_method(name)
    session = pretrain._Session(method, batches, pretrain.Plan(
        400, 3, OptimConfig(lr=0.01), ScheduleConfig(), bf16=True, mode=mode), None, lambda *_: None)  # fmt: skip
    session.run(10)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(10, 20):
            session.step(batches.at(number), number, number / 400, 0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_killed_captured_training_resumes(tmp_path: Any) -> None:
    class Stop(Exception):
        pass

    def stop(step: int, means: dict[str, float], executed: int) -> None:
        if step >= 20:
            raise Stop

    p = pretrain.Plan(40, 3, OptimConfig(lr=0.01), ScheduleConfig(), bf16=False, checkpoint_seconds=0.0, mode="graph")
    straight, batches = cuda_method("sc")
    one = pretrain.train(straight, batches, p, None, lambda *_: None)
    with pytest.raises(Stop):
        pretrain.train(cuda_method("sc")[0], batches, p, tmp_path, stop)
    resumed = cuda_method("sc")[0]
    two = pretrain.train(resumed, batches, p, tmp_path, lambda *_: None)
    assert two.executed < 40
    assert [q["loss"] for q in two.curve] == pytest.approx([q["loss"] for q in one.curve], rel=1e-3)


def test_runs_on_cuda_carry_a_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = Layers(flags={"encoder.name": "convnet_small"}, overrides={"precision": "fp32"})
    on_cpu = make_plan(Request("sc", "digits", layers, evaluators=("knn",), device="cpu")).arms[0].identity
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    on_cuda = make_plan(Request("sc", "digits", layers, evaluators=("knn",), device="cuda")).arms[0].identity
    assert "cuda_revision" not in on_cpu and on_cuda["cuda_revision"] == CUDA_REVISION
