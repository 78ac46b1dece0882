"""Numbers that may change only with NUMBERS_VERSION: integers exactly, five fp32 steps on one thread to 1e-4.

After an intended change: bump NUMBERS_VERSION and write the file anew with `python tests/test_golden.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness import augment, budgets, registry
from harness.arms import build_method
from harness.batches import Batches
from harness.config import Layers, resolve
from harness.evaluation import sample_indices
from harness.fingerprint import NUMBERS_VERSION
from harness.optim import OptimConfig, ScheduleConfig
from harness.pretrain import Plan, train

FILE = Path(__file__).with_name("golden.json")


def integers() -> dict[str, Any]:
    """Orders, seeds, draws, subsets."""
    seeds = augment.hash_seeds(3, 2, torch.arange(4))
    labels = np.arange(200) % 10
    bought = budgets.make_budgets("50", labels, 10, 7)[0]
    return {
        "seeds": seeds.tolist(),
        "order": augment.permutation(3, 2, 12).tolist(),
        "draws": augment.integers(seeds, "golden", 1000, (3,)).tolist(),
        "subset": bought.indices.tolist(),
        "validation": bought.rounds[0][1].tolist(),
        "pretrain_subset": sample_indices(100, 10, 5, "pretrain subset").tolist(),
    }


def losses() -> list[float]:
    """Five steps of the quick recipe's method on digits, fp32, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plugin, _ = registry.load_dataset("digits")
        data = plugin(Path(), None, None)
        config = resolve("sc", "digits", Layers(flags={"seed": 3}), default_encoder="convnet_small")
        method = build_method("sc", config, data.info)
        images = data.split("train").images
        batches = Batches(images, None, batch_size=32, seed=3, device=torch.device("cpu"))
        values: list[float] = []
        real = method.loss

        def watched(batch: Any, step: Any) -> dict[str, Any]:
            out = real(batch, step)
            values.append(float(out["loss"].detach()))
            return out

        method.loss = watched  # type: ignore[method-assign]
        train(method, batches, Plan(5, 3, OptimConfig(), ScheduleConfig(), bf16=False), None, lambda *_: None)
        return values
    finally:
        torch.set_num_threads(threads)


def test_golden_numbers() -> None:
    golden = json.loads(FILE.read_text())
    assert golden["numbers_version"] == NUMBERS_VERSION, "write tests/golden.json anew (see this file's docstring)"
    assert integers() == golden["integers"], "the engine makes other integers: bump NUMBERS_VERSION"
    np.testing.assert_allclose(losses(), golden["losses"], rtol=1e-4, err_msg="other losses: bump NUMBERS_VERSION")


if __name__ == "__main__":
    FILE.write_text(
        json.dumps({"numbers_version": NUMBERS_VERSION, "integers": integers(), "losses": losses()}, indent=1) + "\n"
    )
