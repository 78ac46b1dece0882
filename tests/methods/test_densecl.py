"""DenseCL: both losses in a loop, partners, queues, teacher."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo
from harness.encoders import build
from harness.methods.densecl import DenseCL, averaging, dense_loss, partners

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(28, 28), channels=1, mean=(0.5,), std=(0.25,),
    counts={"train": 60}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train",
    mirror_keeps_label=False,
)  # fmt: skip
STEP = torch.tensor(0)


def method_of(**settings: Any) -> DenseCL:
    torch.manual_seed(0)
    config = DenseCL.Config(**{"hidden": 16, "out": 8, "queue": 10, "jitter": 0.0, **settings})
    return DenseCL(build("convnet_small", INFO), config, INFO)


def batch_of(count: int = 4, first: int = 0) -> Batch:
    indices = torch.arange(first, first + count)
    images = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Batch(images, None, indices, hash_seeds(0, 0, indices))


def points_of(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_dense_loss_is_eq_2_in_a_loop(temperature: float) -> None:
    queries, keys, negatives = points_of(3, 4, 5).requires_grad_(), points_of(3, 4, 5, seed=1), points_of(6, 5)
    excluded = torch.zeros(3, 6, dtype=torch.bool)
    excluded[1, 2] = excluded[1, 5] = True
    terms = []
    for image in range(3):
        for cell in range(4):
            cosines = [torch.cosine_similarity(queries[image, cell], keys[image, cell], dim=0)]
            cosines += [
                torch.cosine_similarity(queries[image, cell], negatives[k], dim=0)
                for k in range(6)
                if not excluded[image, k]
            ]
            terms.append(-(torch.stack(cosines) / temperature).log_softmax(0)[0])
    expected = torch.stack(terms).mean()
    found = dense_loss(queries, keys, negatives, temperature, excluded)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    gradients = [torch.autograd.grad(loss, queries)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-8)


def test_partners_are_the_most_similar_cells() -> None:
    first, second = points_of(2, 5, 3), points_of(2, 4, 3, seed=1)
    found = partners(first, second)
    for image in range(2):
        for cell in range(5):
            cosines = torch.stack(
                [torch.cosine_similarity(first[image, cell], other, dim=0) for other in second[image]]
            )
            assert int(found[image, cell]) == int(cosines.argmax())
    shuffled = torch.tensor([3, 0, 4, 2, 1])
    assert torch.equal(partners(first, 7 * first[:, shuffled]), shuffled.argsort().expand(2, -1))


@pytest.mark.parametrize(("side", "out"), [(6, 6), (12, 7), (24, 7), (9, 4)])
def test_averaging_is_adaptive_pooling(side: int, out: int) -> None:
    feature_map = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    matrix = averaging(side, out)
    torch.testing.assert_close(matrix @ feature_map @ matrix.T, functional.adaptive_avg_pool2d(feature_map, out))


def test_loss_is_made_of_views_and_cells() -> None:
    method, batch = method_of(dense_share=0.3), batch_of()
    first, second = method.preview(batch).values()
    views, cells = method.view_queue.embeddings.clone(), method.cell_queue.embeddings.clone()
    found = method.loss(batch, STEP)
    feature_map, key_map = method.encoder(first), method.teacher_encoder(second)
    query, key = (
        heads.whole(m.mean((2, 3))) for heads, m in ((method.heads, feature_map), (method.teacher_heads, key_map))
    )
    tables = [m.flatten(2).transpose(1, 2) for m in (feature_map, key_map)]
    queries, keys = method.heads.cell(tables[0]), method.teacher_heads.cell(tables[1])
    partner = partners(*tables)
    matched = torch.stack([keys[b, partner[b]] for b in range(4)])
    whole = dense_loss(query[:, None], key[:, None], views, 0.2)
    dense = dense_loss(queries, matched, cells, 0.2)
    torch.testing.assert_close(found["loss"], 0.7 * whole + 0.3 * dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        method.cell_queue.embeddings[:4], functional.normalize(keys.mean(1), dim=1), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(method.view_queue.embeddings[:4], functional.normalize(key, dim=1), atol=1e-5, rtol=1e-4)
    assert torch.equal(method.cell_queue.embeddings[4:], cells[4:])
    assert method.cell_queue.images.tolist() == [0, 1, 2, 3] + [-1] * 6


def test_own_keys_are_no_negatives() -> None:
    method, batch = method_of(), batch_of(1)
    method.loss(batch, STEP)  # its key is in the queues now
    losses = []
    for rows in ((), (0,), (5,)):  # none, that of this image, one of nobody's
        changed = copy.deepcopy(method)
        for queue in (changed.view_queue, changed.cell_queue):
            queue.embeddings[list(rows)] = functional.normalize(torch.ones(8), dim=0)
        losses.append(changed.loss(batch, STEP)["loss"].item())
    assert losses[0] == losses[1] != losses[2]


def test_teacher_has_no_gradient_and_follows() -> None:
    method = method_of(momentum=0.9)
    method.loss(batch_of(), STEP)["loss"].backward()
    teacher = [*method.teacher_encoder.parameters(), *method.teacher_heads.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in teacher)
    online = [*method.encoder.parameters(), *method.heads.parameters()]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in online)
    assert {id(p) for group in method.parameter_groups() for p in group["params"]} == {id(p) for p in online}
    with torch.no_grad():
        method.heads.cell[0].bias.add_(1.0)
    start = method.teacher_heads.cell[0].bias.clone()
    method.after_step(torch.tensor(1.0))
    assert torch.equal(method.teacher_heads.cell[0].bias, start)
    method.after_step(torch.tensor(0.0))
    torch.testing.assert_close(method.teacher_heads.cell[0].bias, start + 0.1)


def test_gradient_into_the_keys_would_be_another_one() -> None:
    """Of both losses, with keys by the network itself, which the teacher still equals."""
    for share in (0.0, 1.0):
        method, batch = method_of(dense_share=share), batch_of()
        first, second = method.preview(batch).values()
        queue = (method.cell_queue if share else method.view_queue).embeddings.clone()
        weight = method.encoder.body["conv1"][0].weight

        def loss(
            stop: bool, method: DenseCL = method, views: Any = (first, second), share: float = share, queue: Any = queue
        ) -> Tensor:
            maps = [method.encoder(view) for view in views]
            query, key = (method.heads.whole(m.mean((2, 3)))[:, None] for m in maps)
            if share:
                tables = [m.flatten(2).transpose(1, 2) for m in maps]
                query, key = (method.heads.cell(table) for table in tables)
                partner = partners(tables[0].detach(), tables[1].detach())
                key = key.gather(1, partner[:, :, None].expand(-1, -1, key.shape[2]))
            return dense_loss(query, key.detach() if stop else key, queue, 0.2)

        trained, stopped, flowing = (
            torch.autograd.grad(value, weight)[0]
            for value in (method.loss(batch, STEP)["loss"], loss(True), loss(False))
        )
        assert (trained - stopped).norm() < 1e-3 * stopped.norm()
        assert (trained - flowing).norm() > 0.1 * stopped.norm()


def test_step_is_one_graph() -> None:
    method, other, batch = method_of(), method_of(), batch_of()
    compiled = torch.compile(other.loss, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for each, loss in ((method, method.loss), (other, compiled)):
        value = loss(batch, STEP)["loss"]
        found.append((value, *torch.autograd.grad(value, list(each.heads.parameters()))))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert torch.equal(method.cell_queue.embeddings, other.cell_queue.embeddings)
