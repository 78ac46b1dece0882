"""What-where autoencoder: pooling and unpooling against loops and torch's own, both errors, and that they fall."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo, HarnessError
from harness.encoders import build
from harness.methods.what_where_autoencoder import WhatWhereAutoencoder, pool_what_where, unpool

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(16, 16), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3,
    counts={"train": 64}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train",
    mirror_keeps_label=False,
)  # fmt: skip


def method_of(**config: Any) -> WhatWhereAutoencoder:
    torch.manual_seed(0)
    return WhatWhereAutoencoder(build("convnet_small", INFO), WhatWhereAutoencoder.Config(**config), INFO)


def batch_of(count: int = 8, epoch: int = 0) -> Batch:
    noise = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    images = (torch.nn.functional.interpolate(noise, size=16, mode="bilinear") * 255).to(torch.uint8)
    return Batch(images, None, torch.arange(count), hash_seeds(0, epoch, torch.arange(count)))


@pytest.mark.parametrize(("side", "shape"), [(2, (2, 3, 6, 8)), (3, (2, 3, 7, 8)), (2, (1, 1, 3, 5))])
def test_unpooling_is_torch_s(side: int, shape: tuple[int, ...]) -> None:
    feature_map = torch.randn(shape)
    what, where = pool_what_where(feature_map, side)
    expected, index = torch.nn.functional.max_pool2d(feature_map, side, return_indices=True)
    assert torch.equal(what, expected)
    restored = torch.nn.functional.max_unpool2d(expected, index, side, output_size=shape[2:])
    assert torch.equal(unpool(what, where, side), restored)


def test_one_place_in_each_window_even_where_all_are_equal() -> None:
    what, where = pool_what_where(torch.zeros(2, 3, 6, 7), 2)
    windows = where[..., :6].unfold(2, 2, 2).unfold(3, 2, 2)
    assert (windows.sum((4, 5)) == 1).all() and not where[..., 6].any()
    assert unpool(what + 5, where, 2).sum() == 5 * 2 * 3 * 9


def test_the_gradient_goes_where_the_maximum_was() -> None:
    feature_map = torch.randn(2, 3, 4, 4, requires_grad=True)
    what, where = pool_what_where(feature_map, 2)
    unpool(what, where, 2).sum().backward()
    assert feature_map.grad is not None and torch.equal(feature_map.grad, where.float())


def test_both_errors_against_their_definition() -> None:
    method, batch, seen = method_of(middle=0.3), batch_of(4), {}
    method.middle.register_forward_hook(lambda _, inputs, output: seen.update(rebuilt=output))
    method.decoder.register_forward_hook(lambda _, inputs, output: seen.update(picture=output))
    method.encoder.register_forward_hook(lambda _, inputs, output: seen.update(map=output))
    loss = method.loss(batch, torch.tensor(0))["loss"]
    seen = {name: value.detach().double() for name, value in seen.items()}
    image = ((seen["picture"].sigmoid() - batch.images / 255) ** 2).mean()
    middle = ((seen["rebuilt"] - seen["map"]) ** 2).mean()
    assert loss.item() == pytest.approx(float(image + 0.3 * middle), rel=1e-5)


def test_step_is_one_graph() -> None:
    method, batch, step = method_of(), batch_of(), torch.tensor(0)
    compiled = torch.compile(method.loss, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for loss in (method.loss, compiled):
        value = loss(batch, step)["loss"]
        found.append((value, *torch.autograd.grad(value, list(method.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def trained(method: WhatWhereAutoencoder, epochs: int, lr: float = 3e-3) -> list[dict[str, float]]:
    optimiser = torch.optim.Adam(method.parameters(), lr=lr)
    history = []
    for epoch in range(epochs):
        out = method.loss(batch_of(32, epoch), torch.tensor(epoch))
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        history.append({name: float(value.detach()) for name, value in out.items()})
    return history


def test_it_beats_the_mean_image() -> None:
    history = trained(method_of(hidden=16), 25)
    assert history[-1]["error_share"] < 0.9 and history[-1]["middle"] < 0.1 * history[0]["middle"]


def test_a_map_without_windows_is_refused() -> None:
    info = replace(INFO, image_size=(8, 8))
    with pytest.raises(HarnessError, match=r"a map of 1 x 1 cells has no window of 2 x 2"):
        WhatWhereAutoencoder(build("convnet_small", info), WhatWhereAutoencoder.Config(), info)
