"""DINO: the loss against lightly and a loop, stop-gradient, centre, teacher, multi-crop."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.augment import hash_seeds
from harness.contracts import Batch, DatasetInfo, HarnessError
from harness.encoders import build
from harness.methods.dino import DINO, PrototypeHead, dino_loss

INFO = DatasetInfo(
    name="toy", title="Toy", classes=None, image_size=(28, 28), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3,
    counts={}, licence="", citation="", default_encoder="convnet_small", pretrain_split="train", mirror_keeps_label=True,
)  # fmt: skip
STEP = torch.tensor(0)


def method_of(**settings: Any) -> DINO:
    torch.manual_seed(0)
    config = DINO.Config(**{"prototypes": 24, "hidden": 16, "out": 8, "num_local": 2, **settings})
    return DINO(build("convnet_small", INFO), config, INFO)


def batch_of(count: int = 6) -> Batch:
    indices = torch.arange(count)
    images = torch.randint(0, 256, (count, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Batch(images, None, indices, hash_seeds(0, 0, indices))


def random_scores(views: int, teacher: int, batch: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(views * 100 + batch)
    shapes = ((views, batch, width), (teacher, batch, width), (width,))
    student, targets, centre = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return student.requires_grad_(), targets, centre / 3


@pytest.mark.parametrize(("views", "teacher", "batch", "width"), [(2, 2, 5, 7), (6, 2, 3, 33), (4, 1, 8, 4)])
@pytest.mark.parametrize("temperatures", [(0.1, 0.04), (0.5, 0.07), (1.0, 1.0)])
def test_loss_and_gradient_equal_lightlys(
    views: int, teacher: int, batch: int, width: int, temperatures: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "LIGHTLY_DID_VERSION_CHECK", "True")
    loss_module = pytest.importorskip("lightly.loss")
    student, targets, centre = random_scores(views, teacher, batch, width)
    oracle = loss_module.DINOLoss(output_dim=width, student_temp=temperatures[0]).double()
    oracle.center.data.copy_(centre)
    ours = dino_loss(student, targets, centre, student_temperature=temperatures[0], teacher_temperature=temperatures[1])
    theirs = oracle(list(targets), list(student), teacher_temp=temperatures[1])
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)  # their temperature is a float32 number
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_loss_is_eq_3_in_a_loop() -> None:
    student, targets, centre = random_scores(3, 2, 4, 5)
    terms = []
    for t in range(2):
        for s in range(3):
            for image in range(4):
                if s != t:
                    p = ((targets[t, image] - centre) / 0.04).softmax(0)
                    q = (student[s, image] / 0.1).softmax(0)
                    terms.append(-sum(p[k] * q[k].log() for k in range(5)))
    assert dino_loss(student, targets, centre).item() == pytest.approx(sum(terms).item() / len(terms), rel=1e-10)


def test_no_gradient_reaches_the_teachers_side() -> None:
    student, targets, centre = random_scores(2, 2, 4, 5)
    targets.requires_grad_()
    dino_loss(student, targets, centre).backward()
    assert targets.grad is None and student.grad is not None
    same = student.detach().clone().requires_grad_()  # one network on both sides: what the stop-gradient leaves out
    (stopped,) = torch.autograd.grad(dino_loss(same, same, centre), same)
    p, log_q = ((same - centre) / 0.04).softmax(2), (same / 0.1).log_softmax(2)
    flowing = -(p[0] * log_q[1] + p[1] * log_q[0]).sum(1).mean() / 2
    assert flowing.item() == pytest.approx(dino_loss(same, same, centre).item())
    assert (torch.autograd.grad(flowing, same)[0] - stopped).norm() > 0.1 * stopped.norm()


def test_centre_follows_the_teachers_mean() -> None:
    method, batch = method_of(centre_momentum=0.75), batch_of()
    whole = torch.cat(list(method.crops.views(batch).values())[:2])
    mean = method.teacher(whole).mean(0)
    before = method.loss(batch, STEP)["loss"]
    assert torch.equal(method.centre, torch.zeros(24))  # the loss alone changes nothing that the next loss reads
    assert torch.equal(method.loss(batch, STEP)["loss"], before)
    method.after_step(torch.tensor(1.0))
    torch.testing.assert_close(method.centre, 0.25 * mean)
    method.after_step(torch.tensor(1.0))
    torch.testing.assert_close(method.centre, (0.25 + 0.75 * 0.25) * mean)
    assert not torch.equal(method.loss(batch, STEP)["loss"], before)


def test_every_view_but_the_same_is_predicted() -> None:
    method, batch = method_of(), batch_of()
    views = list(method.preview(batch).values())
    assert [tuple(view.shape[2:]) for view in views] == [(28, 28)] * 2 + [(12, 12)] * 2
    whole, local = (torch.cat(part) for part in (views[:2], views[2:]))
    scores = [method.head(method.encoder.pool(method.encoder(part))).chunk(2) for part in (whole, local)]
    targets = method.teacher(whole).chunk(2)
    log_q = [(score / 0.1).log_softmax(1) for part in scores for score in part]
    p = [(target / 0.04).softmax(1) for target in targets]
    terms = [-(p[t] * log_q[s]).sum(1).mean() for t in range(2) for s in range(4) if s != t]
    torch.testing.assert_close(method.loss(batch, STEP)["loss"], torch.stack(terms).mean(), atol=1e-5, rtol=1e-5)


def test_teacher_has_no_gradient_and_follows() -> None:
    method = method_of(momentum=0.9)
    method.loss(batch_of(), STEP)["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    optimised = {id(p) for group in method.parameter_groups() for p in group["params"]}
    assert optimised == {id(p) for p in (*method.encoder.parameters(), *method.head.parameters())}
    with torch.no_grad():
        method.head.prototypes.add_(1.0)
    start = method.teacher.head.prototypes.clone()
    method.after_step(torch.tensor(1.0))  # the momentum has risen to 1
    assert torch.equal(method.teacher.head.prototypes, start)
    method.after_step(torch.tensor(0.0))
    torch.testing.assert_close(method.teacher.head.prototypes, start + 0.1)


def test_scores_are_cosines() -> None:
    head = PrototypeHead(5, 6, 4, 9).eval()
    z = head.layers(torch.ones(2, 5))
    expected = [[torch.cosine_similarity(row, w, dim=0) for w in head.prototypes] for row in z]
    torch.testing.assert_close(head(torch.ones(2, 5)), torch.stack([torch.stack(row) for row in expected]))


def test_monitors_tell_both_collapses() -> None:
    method = method_of()
    uniform = method._collapse(torch.zeros(2, 6, 24))
    assert float(uniform["target_entropy"]) == pytest.approx(1) and float(uniform["prototype_use"]) == pytest.approx(1)
    one = torch.zeros(2, 6, 24)
    one[..., 3] = 9.0
    assert all(float(value) < 1e-6 for value in method._collapse(one).values())
    each = torch.eye(24)[:12].reshape(2, 6, 24) * 9
    apart = method._collapse(each)
    assert float(apart["target_entropy"]) < 1e-6
    assert float(apart["prototype_use"]) == pytest.approx(math.log(12) / math.log(24))


def test_step_is_one_graph() -> None:
    """The views are traced in tests/test_views.py, so most of what they do is off."""
    method, batch = method_of(num_local=1, jitter=0.0, grayscale=0.0, mirror=False), batch_of()
    compiled = torch.compile(method.loss, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for loss in (method.loss, compiled):
        value = loss(batch, STEP)["loss"]
        found.append((value, *torch.autograd.grad(value, list(method.head.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_refusals_name_the_numbers() -> None:
    with pytest.raises(HarnessError, match=r"local views of 4 x 4 px .*local_side=0.15 of 28 px"):
        method_of(local_side=0.15)
    with pytest.raises(HarnessError, match=r"local_scale=0.5 is above method.crop_scale=0.4"):
        method_of(local_scale=0.5)
    method_of(local_side=0.15, num_local=0)
