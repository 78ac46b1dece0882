"""On a CUDA device: what is drawn, made and fitted there is what the CPU has, and a whole command works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import harness
from harness import pretrain, registry, stacked
from harness.arms import build_method
from harness.augment import hash_seeds, permutation, shift_and_mirror, uniform
from harness.batches import Batches
from harness.config import Layers, resolve
from harness.contracts import DatasetInfo
from harness.evaluators.linear_probe import fit_path
from harness.optim import OptimConfig, ScheduleConfig
from harness.views import ViewConfig, ViewMaker

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda")


def info(side: int) -> DatasetInfo:
    return DatasetInfo(
        name="drawn", title="", classes=None, image_size=(side, side), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3,
        counts={}, licence="", citation="", default_encoder="", pretrain_split="", mirror_keeps_label=True,
    )  # fmt: skip


def smooth(count: int, side: int) -> Tensor:
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(coarse, size=side, mode="bicubic").clamp(0, 1).mul(255)
    return images.to(torch.uint8).contiguous(memory_format=torch.channels_last)


def test_draws_and_orders_are_the_same_bits(cuda: torch.device) -> None:
    indices = torch.arange(5000)
    here, there = hash_seeds(7, 3, indices), hash_seeds(7, 3, indices.to(cuda))
    assert torch.equal(here, there.cpu())
    assert torch.equal(uniform(here, "view.crop", (10,)), uniform(there, "view.crop", (10,)).cpu())
    assert torch.equal(permutation(7, 3, 5000, CPU), permutation(7, 3, 5000, cuda).cpu())
    images = smooth(64, 32)
    mild = shift_and_mirror(images, here[:64], "view", 2, True)
    assert torch.equal(mild, shift_and_mirror(images.to(cuda), there[:64], "view", 2, True).cpu())


@pytest.mark.parametrize("side", [32, 96])
def test_strong_views_are_those_of_the_cpu(side: int, cuda: torch.device) -> None:
    """To rounding, but for a box or a threshold that rounding decides otherwise: at most one image in a hundred."""
    images, seeds = smooth(400, side), hash_seeds(7, 3, torch.arange(400))
    maker = ViewMaker.of(ViewConfig(crop_scale=0.08, blur=0.5, solarise=0.2), info(side))
    here, there = maker(images, seeds, "view"), maker(images.to(cuda), seeds.to(cuda), "view").cpu()
    different = (here - there).abs().flatten(1).amax(1) > 2e-3
    assert different.double().mean() <= 0.01


@pytest.mark.parametrize("strength", [1e-6, 1e-4, 1e-2, 10.0])
def test_the_probe_is_the_one_of_the_cpu(strength: float, cuda: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat(60)
    features = torch.randn(10, 40, generator=generator)[labels] + 2 * torch.randn(600, 40, generator=generator)
    here = fit_path(features, labels, 10, [strength])[0]
    there = fit_path(features.to(cuda), labels.to(cuda), 10, [strength])[0]
    assert there.converged and there.objective == pytest.approx(here.objective, rel=1e-6)
    agreed = there.logits(features.to(cuda)).argmax(1).cpu() == here.logits(features).argmax(1)
    assert agreed.double().mean() >= 0.998


@pytest.mark.parametrize("name", ["sc", "simclr"])
def test_seeds_trained_together_are_their_separate_runs(name: str, cuda: torch.device) -> None:
    dataset = registry.load_dataset("digits")[0](Path(), None, None)
    images = dataset.split("train").images[:256]
    plan = pretrain.Plan(8, 3, OptimConfig(lr=0.02), ScheduleConfig(), bf16=False, mode="graph")

    def parts() -> tuple[list[Any], list[Batches]]:
        methods = [
            build_method(name, resolve(name, "digits", Layers(flags={"seed": seed}), default_encoder="convnet_small"),
                         dataset.info).to(cuda)
            for seed in (3, 8)
        ]  # fmt: skip
        return methods, [Batches(images, None, batch_size=32, seed=seed, device=cuda) for seed in (3, 8)]

    separate, data = parts()
    expected = [pretrain.train(m, d, plan, None, lambda *_: None) for m, d in zip(separate, data, strict=True)]
    together, data = parts()
    said: list[str] = []
    found = stacked.train(together, data, plan, None, lambda *_: None, said.append)
    assert not said
    for one, other in zip(expected, found, strict=True):
        assert [p["loss"] for p in other.curve] == pytest.approx([p["loss"] for p in one.curve], rel=1e-2)


SMALL = {"data.num_pretrain_images": 1024}
EVALUATORS = ["linear_probe", "knn", "svm", "fine_tune", "representation", "robustness", "calibration"]


def run(workspace: Path, method: str, **changes: Any) -> pd.DataFrame:
    return harness.run(
        method, "digits", workspace=workspace, recipe="quick", labels=100, tracking="none", device="cuda", epochs=4,
        **{"evaluators": ["linear_probe", "knn"], "control": False, "set": SMALL, **changes},
    )  # fmt: skip


def steps_executed(workspace: Path) -> int:
    lines = [json.loads(line) for p in (workspace / ".harness" / "journals").glob("*.jsonl") for line in p.open()]
    return sum(record["executed"] for record in lines if record["kind"] == "steps")


@pytest.mark.parametrize("method", ["sc", "mae", "dino", "deep_cluster", "coates_kmeans", "supervised"])
def test_a_whole_run(method: str, tmp_path: Path, cuda: torch.device) -> None:
    many = method == "sc"
    rows = run(tmp_path, method, evaluators=EVALUATORS if many else ["linear_probe", "knn"], control=many)
    trained = rows[rows.method == method]
    assert set(rows.status) == {"FINISHED"} and all("cuda" in device for device in trained.device)
    probe = trained[(trained.evaluator == "linear_probe") & (trained.metric == "top1") & (trained.split == "test")]
    assert (probe.value > 0.3).all()  # ten classes


def test_a_second_command_takes_what_the_first_one_made(tmp_path: Path, cuda: torch.device) -> None:
    first = run(tmp_path, "sc")
    executed = steps_executed(tmp_path)
    again = run(tmp_path, "sc")
    assert executed > 0 and steps_executed(tmp_path) == executed
    assert set(again.eval_id) == set(first.eval_id)


def test_the_same_bits_on_request(tmp_path: Path, cuda: torch.device) -> None:
    values = [run(tmp_path / name, "sc", deterministic=True, compile="off").value.tolist() for name in "ab"]
    assert values[0] == values[1]


def test_a_compiled_and_captured_run(tmp_path: Path, cuda: torch.device) -> None:
    pytest.importorskip("triton")
    rows = run(tmp_path, "simclr", compile="compile+graph")
    plain = run(tmp_path, "simclr", compile="off")
    pick = "evaluator == 'linear_probe' and metric == 'top1' and split == 'test' and readout == 'gap'"
    assert float(rows.query(pick).value.iloc[0]) == pytest.approx(float(plain.query(pick).value.iloc[0]), abs=0.15)


def test_workers_of_a_search_share_the_device(tmp_path: Path, cuda: torch.device) -> None:
    pytest.importorskip("optuna")
    words = [
        "tune", "--method", "sc", "--dataset", "digits", "--recipe", "quick", "--trials", "4", "--workers", "2",
        "--labels", "100", "--workspace", str(tmp_path), "--device", "cuda", "--tracking", "none", "--confirm-seeds", "1",
        "--set", "epochs=1", "--set", "data.num_pretrain_images=1024", "--study", "shared",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "from harness.cli import main; main()", *words],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "results" / "studies" / "shared").iterdir())) > 0
