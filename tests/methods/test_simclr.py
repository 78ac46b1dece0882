"""SimCLR: the criterion against a slow loop over eq. 1, and what the method feeds it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo
from harness.encoders import build
from harness.methods.simclr import SimCLR, nt_xent_loss


def literal_eq_1(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Section 2.1 and Algorithm 1 word by word: views 2k-1 and 2k are the two of image k."""
    z = [view for pair in zip(first.double(), second.double(), strict=True) for view in pair]
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(z)):
        similarity = [z[i] @ other / (z[i].norm() * other.norm()) / temperature for other in z]
        below = sum((s.exp() for k, s in enumerate(similarity) if k != i), torch.zeros((), dtype=torch.float64))
        j = i + 1 if i % 2 == 0 else i - 1
        total = total - torch.log(similarity[j].exp() / below)
    return total / len(z)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [2, 7])
def test_value_and_gradient_of_eq_1(count: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(count)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        points = [torch.randn(count, 9, generator=generator).to(dtype).requires_grad_() for _ in range(2)]
        found, expected = (
            nt_xent_loss(points[0], points[1], temperature),
            literal_eq_1(points[0], points[1], temperature),
        )
        assert found.dtype == dtype
        assert found.item() == pytest.approx(expected.item(), rel=tolerance)
        for one, two in zip(torch.autograd.grad(found, points), torch.autograd.grad(expected, points), strict=True):
            assert (one - two).norm() <= tolerance * two.norm()


def test_chance_and_perfection() -> None:
    equal = torch.ones(8, 4)
    assert float(nt_xent_loss(equal, equal, 0.5)) == pytest.approx(math.log(15))
    apart = torch.eye(8)
    assert float(nt_xent_loss(apart, apart, 0.02)) < 1e-6


def test_float32_under_autocast() -> None:
    first, second = torch.randn(2, 16, 32)
    exact = nt_xent_loss(first, second, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nt_xent_loss(first, second, 0.1), exact)


@pytest.fixture
def info() -> DatasetInfo:
    return DatasetInfo(
        name="toy", title="Toy", classes=None, image_size=(16, 16), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3,
        counts={}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train",
        mirror_keeps_label=True,
    )  # fmt: skip


def test_both_views_pass_the_network_at_once(info: DatasetInfo) -> None:
    torch.manual_seed(0)
    method = SimCLR(build("convnet_small", info), SimCLR.Config(), info)
    indices = torch.arange(6)
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    batch = Batch(images, None, indices, hash_seeds(0, 0, indices))
    shapes = []
    method.encoder.register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape)))
    out = method.loss(batch, torch.tensor(0))
    assert shapes == [(12, 3, 16, 16)]
    assert 0 <= out["retrieval"].item() <= 1
    first, second = method.preview(batch).values()
    assert not torch.equal(first, second)
    views = method.projector(method.encoder.pool(method.encoder(torch.cat((first, second)))))
    assert torch.allclose(out["loss"], nt_xent_loss(views[:6], views[6:], 0.5))
