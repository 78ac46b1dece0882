"""MoCo v3: the criterion against a slow loop over algorithm 1, and what must not reach the keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.methods.moco_v3 import MoCoV3, key_contrast_loss

STEP = torch.tensor(0)


def pair(count: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(count, width, generator=generator).to(dtype).requires_grad_() for _ in range(2)]


def literal_algorithm_1(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """`ctr` of algorithm 1 word by word, in float64, keys without gradient."""
    total = torch.zeros((), dtype=torch.float64)
    keys = keys.detach().double()
    for i, query in enumerate(queries.double()):
        scores = [(query @ key / query.norm() / key.norm() / temperature).exp() for key in keys]
        total = total - torch.log(scores[i] / sum(scores))
    return 2 * temperature * total / len(queries)


@pytest.mark.parametrize("temperature", [0.1, 0.2, 1.0])
@pytest.mark.parametrize(("count", "width"), [(3, 4), (7, 9)])
def test_value_and_gradient_of_algorithm_1(count: int, width: int, temperature: float, assert_agree: Any) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        points = pair(count, width, dtype)
        found = key_contrast_loss(points[0], points[1], temperature)
        assert found.dtype == dtype
        assert_agree(found, literal_algorithm_1(points[0], points[1], temperature), points, tolerance)


def test_chance_and_autocast() -> None:
    equal = torch.ones(8, 4)
    assert float(key_contrast_loss(equal, equal, 0.2)) == pytest.approx(0.4 * math.log(8))
    queries, keys = (p.detach() for p in pair(16, 32))
    with torch.autocast("cpu", torch.bfloat16):
        inside = key_contrast_loss(queries, keys, 0.1)
    assert torch.equal(inside, key_contrast_loss(queries, keys, 0.1))


def test_each_view_is_contrasted_with_the_other_s_keys(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method(MoCoV3), make_batch(range(6))
    views = torch.cat(tuple(method.preview(batch).values()))
    queries = method.predictor(method.projector(method.encoder.pool(method.encoder(views))))
    keys = method.teacher(views)
    expected = key_contrast_loss(queries[:6], keys[6:], 0.2) + key_contrast_loss(queries[6:], keys[:6], 0.2)
    assert torch.allclose(method.loss(batch, STEP)["loss"], expected, atol=1e-5)


def test_teacher_gets_no_gradient_and_follows(make_method: Any, make_batch: Any) -> None:
    method = make_method(MoCoV3, momentum=0.9)
    method.loss(make_batch(range(6)), STEP)["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.encoder.parameters())
    optimised = {id(p) for group in method.parameter_groups() for p in group["params"]}
    online = [*method.encoder.parameters(), *method.projector.parameters(), *method.predictor.parameters()]
    assert optimised == {id(p) for p in online}
    with torch.no_grad():
        for parameter in (*method.encoder.parameters(), *method.projector.parameters()):
            parameter.add_(1.0)
    start = [p.clone() for p in method.teacher.parameters()]
    method.after_step(torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(start, method.teacher.parameters(), strict=True))
    method.after_step(torch.tensor(0.0))
    for old, now in zip(start, method.teacher.parameters(), strict=True):
        assert torch.allclose(now - old, torch.full_like(now, 0.1), atol=1e-6)


def test_gradient_into_the_keys_would_be_another_one() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    first, second = torch.randn(2, 8, 5, generator=generator, dtype=torch.float64)
    (stopped,) = torch.autograd.grad(key_contrast_loss(first @ weight, second @ weight, 0.2), weight)
    (constant,) = torch.autograd.grad(key_contrast_loss(first @ weight, (second @ weight).detach(), 0.2), weight)
    q, k = (torch.nn.functional.normalize(x @ weight, dim=1) for x in (first, second))
    flowing_loss = 0.4 * torch.nn.functional.cross_entropy(q @ k.T / 0.2, torch.arange(8))
    (flowing,) = torch.autograd.grad(flowing_loss, weight)
    assert torch.equal(stopped, constant)
    assert (stopped - flowing).norm() > 0.1 * stopped.norm()


def test_step_is_one_graph(make_method: Any, make_batch: Any, assert_one_graph: Any) -> None:
    assert_one_graph(make_method(MoCoV3), make_batch(range(6)))
