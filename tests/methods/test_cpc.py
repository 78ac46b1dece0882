"""CPC: InfoNCE against loops, contexts that never see what they predict, the grid, and that it learns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo, HarnessError
from harness.encoders import build
from harness.methods.cpc import CPC, info_nce_loss

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(28, 28), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3,
    counts={"train": 64}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train",
    mirror_keeps_label=False,
)  # fmt: skip


def method_of(**config: Any) -> CPC:
    torch.manual_seed(0)
    return CPC(build("convnet_small", INFO), CPC.Config(**config), INFO)


def batch_of(count: int = 8, epoch: int = 0) -> Batch:
    noise = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    images = (torch.nn.functional.interpolate(noise, size=28, mode="bilinear") * 255).to(torch.uint8)
    return Batch(images, None, torch.arange(count), hash_seeds(0, epoch, torch.arange(count)))


def test_loss_against_equation_4() -> None:
    predictions, candidates = torch.randn(2, 6, 9, dtype=torch.float64)
    terms = []
    for i, prediction in enumerate(predictions.tolist()):
        scores = [math.fsum(a * b for a, b in zip(prediction, row, strict=True)) / 3 for row in candidates.tolist()]
        terms.append(math.log(math.fsum(map(math.exp, scores))) - scores[i])
    assert info_nce_loss(predictions, candidates).item() == pytest.approx(math.fsum(terms) / 6, rel=1e-12)
    assert info_nce_loss(torch.ones(7, 4), torch.ones(7, 4)).item() == pytest.approx(math.log(7), rel=1e-6)


@pytest.mark.parametrize(("size", "rows", "side"), [(28, 6, 8), (96, 7, 24), (256, 7, 64)])
def test_grid_of_the_paper_and_of_small_images(size: int, rows: int, side: int) -> None:
    info = replace(INFO, image_size=(size, size))
    method = CPC(build("convnet_small", info), CPC.Config(), info)
    assert (method.rows, method.columns, method.side) == (rows, rows, side)
    assert method.grid.tolist()[-1] == [(rows - 1) * side // 2] * 2
    assert (method.grid + side <= size).all()


def test_contexts_see_nothing_of_the_rows_they_predict() -> None:
    """The gradient of a context with respect to the grid ends at its own row, whose patches end above the target's."""
    method = method_of().eval()
    grid = torch.randn(1, 128, 6, 6, requires_grad=True)
    for row in range(6):
        (slope,) = torch.autograd.grad(method.context(grid)[0, :, row].sum(), grid)
        seen = slope.abs().sum((0, 1, 3)) > 0
        assert seen[row] and not seen[row + 1 :].any()
        assert seen.sum() == min(row + 1, 4)
    tops = method.grid[:, 0].unique()
    for ahead in method.ahead:
        for row in range(method.rows - ahead):
            assert tops[row + ahead] >= tops[row] + method.side
    assert list(method.ahead) == [2, 3, 4]


def test_targets_lie_below_their_context_in_the_same_column_and_image() -> None:
    """Patch vectors are one-hot, contexts are the vectors themselves: a map from each cell to the one two rows below it
    solves the task, any other does not."""
    method, batch = method_of(distances=1, units=144), batch_of(4)
    method.embed.register_forward_hook(lambda *_: 100 * torch.eye(144))
    method.context.register_forward_hook(lambda _, inputs, output: inputs[0])
    with torch.no_grad():
        method.predict[0].bias.zero_()
        for rows_down, solved in ((2, True), (1, False), (3, False)):
            method.predict[0].weight.copy_(torch.eye(144).roll(6 * rows_down, 0))
            out = method.loss(batch, torch.tensor(0))
            assert (float(out["loss"]) < 1e-6) == solved and (float(out["retrieval"]) == 1) == solved


def test_step_is_one_graph() -> None:
    method, batch, step = method_of(), batch_of(), torch.tensor(0)
    compiled = torch.compile(method.loss, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for loss in (method.loss, compiled):
        value = loss(batch, step)["loss"]
        found.append((value, *torch.autograd.grad(value, list(method.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_it_predicts_the_colour_below() -> None:
    """Images of one colour each: 24 of 192 candidates are right, so that the loss falls from log 192 towards log 24."""
    method, indices = method_of(distances=1), torch.arange(8)
    colours = torch.randint(0, 256, (8, 3, 1, 1), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    optimiser = torch.optim.Adam(method.parameters(), lr=3e-3)
    for epoch in range(10):
        batch = Batch(colours.expand(8, 3, 28, 28), None, indices, hash_seeds(0, epoch, indices))
        loss = method.loss(batch, torch.tensor(epoch))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert math.log(24) < float(loss.detach()) < 4 < math.log(192)


def test_too_small_images_are_refused() -> None:
    info = replace(INFO, image_size=(14, 28))
    with pytest.raises(HarnessError, match=r"14 x 28 px hold 2 rows of patches of 8 px, .* \(3 rows are needed\)"):
        CPC(build("convnet_small", info), CPC.Config(), info)
