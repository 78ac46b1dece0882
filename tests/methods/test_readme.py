"""methods/README.md: its example is a working method, its table is what the classes say."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from harness import registry
from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo, Method
from harness.encoders import build

ROOT = Path(__file__).parents[2]
README = ROOT / "methods" / "README.md"


def test_the_example_trains(tmp_path: Path) -> None:
    source = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert source is not None
    (tmp_path / "quadrant.py").write_text(source[1])
    spec = importlib.util.spec_from_file_location("example_quadrant", tmp_path / "quadrant.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    classes = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == spec.name]
    assert [issubclass(found, Method) for found in classes] == [True]

    info = DatasetInfo(
        name="toy", title="Toy", classes=None, image_size=(28, 28), channels=1, mean=(0.3,), std=(0.2,), counts={},
        licence="", citation="", default_encoder="convnet_small", pretrain_split="train", mirror_keeps_label=False,
    )  # fmt: skip
    torch.manual_seed(0)
    method = module.Quadrant(build("convnet_small", info), module.Quadrant.Config(), info)
    ramp = (torch.arange(28)[:, None] * 6 + torch.arange(28) * 3).to(torch.uint8)  # quarters differ in brightness
    indices = torch.arange(32)
    optimiser = torch.optim.SGD(method.parameters(), lr=0.05)
    history = []
    for epoch in range(30):
        batch = Batch(ramp.expand(32, 1, 28, 28), None, indices, hash_seeds(0, epoch, indices))
        out = method.loss(batch, torch.tensor(epoch))
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        history.append(out["loss"].item())
    assert history[-1] < 0.5 * history[0]
    assert all(parameter.grad is not None for parameter in method.parameters())


@pytest.fixture(scope="module")
def methods_table() -> ModuleType:
    """The script that writes the table, which is no module of the package."""
    spec = importlib.util.spec_from_file_location("methods_table", ROOT / "benchmarks" / "methods_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_the_classes_say(methods_table: ModuleType) -> None:
    written = README.read_text().split(methods_table.BEGIN)[1].split(methods_table.END)[0]
    assert written == methods_table.section(), "stale: run python benchmarks/methods_table.py"
    for name in registry.names("method"):
        assert (f"| `{name}.py` |" in written) == (registry.load_method(name).role != "outside")


def test_parts_of_a_method_are_told_apart(methods_table: ModuleType) -> None:
    info = methods_table.opened("digits")
    assert methods_table.parts(methods_table.built("byol", info)) == (
        ["projector", "predictor"],
        ["teacher_encoder", "teacher_projector"],
    )
    assert methods_table.parts(methods_table.built("mae", info)) == ([], ["decoder"])
    moco = methods_table.built("moco_v2", info)
    assert methods_table.parts(moco) == (["projector"], ["teacher", "queue"])
    moco.added = nn.Linear(2, 2)
    assert methods_table.parts(moco)[0] == ["projector", "added"]
