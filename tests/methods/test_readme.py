"""The example in methods/README.md is a working method."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import torch

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo, Method
from harness.encoders import build

README = Path(__file__).parents[2] / "methods" / "README.md"


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
