"""`harness profile`: phases in the right order, a trace that names them, and nothing else written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from harness import cli, optim, profiling
from harness.arms import build_method
from harness.batches import Batches
from harness.config import Layers, resolve
from harness.contracts import Method
from harness.registry import load_dataset
from harness.step import Step, StepConfig

CPU = torch.device("cpu")


def profile(*words: str) -> str:
    done = CliRunner().invoke(
        cli.app, ["profile", "--dataset", "digits", "--steps", "3", *words], catch_exceptions=False
    )
    assert done.exit_code == 0
    return done.stdout


def test_json_and_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    facts: dict[str, Any] = json.loads(
        profile(
            "--method",
            "sc",
            "--batch-size",
            "64",
            "--seed",
            "3",
            "--trace",
            "t.json",
            "--json",
            "--set",
            "precision=fp32",
        )
    )
    assert (facts["method"], facts["batch_size"], facts["precision"], facts["steps"]) == ("sc", 64, "fp32", 3)
    phases = facts["phases"]
    assert [phase["name"] for phase in phases] == list(profiling.PHASES)
    assert all(phase["milliseconds"] > 0 for phase in phases)
    assert sum(phase["share"] for phase in phases) == pytest.approx(1)
    assert facts["images_per_second"] == pytest.approx(64_000 / facts["step_milliseconds"])
    assert facts["share_of_floor"] == pytest.approx(facts["images_per_second"] * facts["floor_seconds_per_image"])
    assert facts["flops_per_image"] > 1e7 and facts["bytes_per_image"] > 1e5
    peaks = {phase["name"]: phase["peak_bytes"] for phase in phases}
    # of 64 images all maps of the first stage are kept for the backward pass: (16, 24, 24) floats each, and more
    assert peaks["backward"] > 64 * 16 * 24 * 24 * 4 and peaks["forward"] > peaks["views"]
    events = json.loads(Path("t.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert {name: names.count(name) for name in profiling.PHASES if name != "logging"} == dict.fromkeys(
        [name for name in profiling.PHASES if name != "logging"], profiling.TRACED
    ) | {"optimiser": 2 * profiling.TRACED}
    assert any("convolution" in event["name"] for event in events)
    assert os.listdir() == ["t.json"]


def test_table_names_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = profile("--method", "byol")
    assert all(phase in shown for phase in profiling.PHASES)
    assert "images/s" in shown and "% of the floor" in shown and "profile-byol-digits.json" in shown
    assert os.listdir() == ["profile-byol-digits.json"]


def phases_of(name: str, accumulate: int = 1, **overrides: Any) -> list[str]:
    """The borders that one step passes."""
    plugin, _ = load_dataset("digits")
    data = plugin(Path(), None, None)
    config = resolve(name, "digits", Layers(overrides=overrides), default_encoder="convnet_small")
    method: Method = build_method(name, config, data.info).train()
    split = data.split("train")
    batches = Batches(
        split.images[:32], split.labels[:32] if method.supervised else None, batch_size=16, seed=0, device=CPU
    )
    optimizer = optim.build(config.optim, method.parameter_groups())
    borders, passed = profiling._Borders(method, optimizer), []
    borders.enter = passed.append
    Step(method, optimizer, StepConfig(False, accumulate=accumulate), CPU, 0, passed.append)(batches.at(0), 0, 0.5, 0.1)
    return passed


def test_borders_of_a_step() -> None:
    ending = ["backward", "optimiser", "logging", "optimiser", "logging"]
    assert phases_of("sc") == ["views", "forward", "loss", *ending]
    assert phases_of("supervised") == ["views", "forward", "loss", *ending]
    # one pass for two layers, through forward_layers and not forward
    assert phases_of("sc", **{"method.layers": ("conv3", "conv4")}) == ["views", "forward", "loss", *ending]
    # the teacher's encoder is entered after the online one
    assert phases_of("byol") == ["views", "forward", "loss", "forward", "loss", *ending]
    part = ["views", "forward", "loss", "backward"]
    assert phases_of("sc", accumulate=2) == [*part, *part, *ending[1:]]


def test_peaks_of_host_memory() -> None:
    def memory(when: float, total: int, size: int, device: int = 0) -> dict[str, Any]:
        return {
            "name": "[memory]",
            "ts": when,
            "args": {"Total Allocated": total, "Bytes": size, "Device Type": device},
        }

    def phase(name: str, when: float, duration: float) -> dict[str, Any]:
        return {"name": name, "cat": "user_annotation", "ts": when, "dur": duration}

    events = [
        phase("forward", 0, 10), phase("backward", 10, 10), phase("forward", 20, 5), phase("elsewhere", 0, 30),
        memory(1, 1100, 100), memory(12, 1150, 50), memory(15, 1050, -100), memory(14, 9999, 1, device=1),
        memory(21, 1350, 300), {"name": "aten::conv2d", "ts": 3, "dur": 1},
    ]  # fmt: skip
    # 1000 bytes were there before; the backward pass begins with 100 and ends with 50
    assert profiling._host_peaks(events) == {"forward": 350, "backward": 150}
    assert profiling._host_peaks([phase("forward", 0, 10)]) == {}
