"""DINO: say of every small crop what a slowly moving average of the network says of a large one; no labels, no negatives.

Caron, Touvron, Misra, Jégou, Mairal, Bojanowski & Joulin, "Emerging properties in self-supervised vision transformers",
ICCV 2021 (arXiv 2104.14294). What is said is a distribution over prototypes. Two things keep all images from getting the
same one: the teacher's scores are centred (no prototype wins everywhere) and sharpened (no uniform distribution).

Where this differs: as many prototypes as small data can use (the paper has 65,536); a smaller head, with batch norm (see
`PrototypeHead`); a momentum that starts at 0.99, as a run has hundreds of steps rather than 100,000; a fixed teacher
temperature, since the paper's warm-up counts epochs of ImageNet; the last layer is not frozen at the start; no gradient
clipping unless asked for; SimCLR's views for both sides, without blur and solarisation that differ between them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness.contracts import Batch, Choice, DatasetInfo, Encoder, Method, Range, setting
from harness.heads import MomentumTeacher, matrix_product, unit_rows, wide
from harness.multi_crop import NUM_GLOBAL, NUM_LOCAL, MultiCrop, MultiCropConfig

__all__ = ["DINO", "dino_loss"]


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    centre: Tensor,
    *,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
) -> Tensor:
    """Eq. 3: cross-entropy of the student's softmax under the teacher's, over all pairs of different views.

    student (V, B, K), teacher (T, B, K) scores, whose view t is the student's view t; centre (K,) -> scalar, the mean
    over T * (V - 1) pairs and images (the paper adds the pairs). No gradient reaches teacher or centre.
    """
    targets = ((wide(teacher.detach()) - centre.detach()) / teacher_temperature).softmax(2)
    predicted = (wide(student) / student_temperature).log_softmax(2)
    with torch.autocast(student.device.type, enabled=False):
        pairs = torch.einsum("tbk,sbk->ts", targets, predicted)
    same = pairs.diagonal().sum()
    return (same - pairs.sum()) / (len(teacher) * (len(student) - 1) * student.shape[1])


class PrototypeHead(nn.Module):
    """Section 3.1: three layers with GELU, the unit sphere, cosines to prototypes of unit length: (B, D) -> (B, K).

    With batch norm, which the paper's transformers do without. On digits (convnet_small, SGD at
    0.1, batch 128, 1024 prototypes, seed 10) without it all images had the same uniform target after 30 steps: what is
    common to all images outweighs by far what differs.
    """

    def __init__(self, features: int, hidden: int, out: int, prototypes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.GELU(),
            nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.GELU(), nn.Linear(hidden, out),
        )  # fmt: skip
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.randn(prototypes, out))

    def forward(self, features: Tensor) -> Tensor:
        return matrix_product(unit_rows(self.layers(features)), unit_rows(self.prototypes).T)


class DINO(Method):
    """DINO"""

    tier = "ranked"
    family = "self-distillation"
    year = 2021
    idea = (
        "small crops predict which prototypes a momentum teacher sees in large ones; its scores centred and sharpened"
    )
    source = "Caron, Touvron, Misra et al., ICCV 2021, arXiv 2104.14294"
    views_per_image: ClassVar[int] = NUM_GLOBAL + NUM_LOCAL

    class Config(MultiCropConfig):
        prototypes: int = setting(
            256, "outputs of the head", source="65,536 (section 3.1)", search=Choice((128, 256, 1024, 4096)), ge=2
        )
        student_temperature: float = setting(0.1, "divides the student's scores", source="section 3.2", gt=0)
        teacher_temperature: float = setting(
            0.04,
            "divides the teacher's: sharpening",
            source="0.04 to 0.07 (appendix)",
            search=Range(0.02, 0.08),
            gt=0,
        )
        centre_momentum: float = setting(0.9, "of the running mean of scores", source="appendix", ge=0, le=1)
        momentum: float = setting(
            0.99,
            "of the teacher at the start; it rises to 1",
            source="0.996 with 100,000 steps (section 3.1)",
            search=Range(0.9, 0.999),
            ge=0,
            le=1,
        )
        hidden: int = setting(512, "hidden units of the head", source="2048 (section 3.1)", ge=1)
        out: int = setting(64, "width before the prototypes", source="256 (section 3.1)", ge=1)

    centre: Tensor
    batch_centre: Tensor

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.crops = MultiCrop.of("dino", config, info, encoder)
        features = encoder.pool(torch.zeros(1, *encoder.map_shape)).shape[1]
        self.head = PrototypeHead(features, config.hidden, config.out, config.prototypes)
        self.teacher = MomentumTeacher(encoder, self.head, config.momentum)
        self.register_buffer("centre", torch.zeros(config.prototypes))
        self.register_buffer("batch_centre", torch.zeros(config.prototypes), persistent=False)  # until after_step

    def _scores(self, views: Tensor) -> Tensor:
        scores: Tensor = self.head(self.encoder.pool(self.encoder(views)))
        return scores

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        whole, local = self.crops.by_size(batch)
        parts = [self._scores(whole)] + ([] if local is None else [self._scores(local)])
        student = self.crops.stacked(parts, len(batch))
        teacher = wide(self.crops.stacked([self.teacher(whole)], len(batch)))
        self.batch_centre.copy_(teacher.mean((0, 1)))
        config = self.config
        loss = dino_loss(
            student, teacher, self.centre, student_temperature=config.student_temperature,
            teacher_temperature=config.teacher_temperature,
        )  # fmt: skip
        return {"loss": loss, **self._collapse(teacher)}

    def _collapse(self, teacher: Tensor) -> dict[str, Tensor]:
        """Section 5.3: entropy of single targets (1: uniform) and of their mean (0: one prototype takes everything)."""
        targets = ((teacher - self.centre) / self.config.teacher_temperature).softmax(2)
        most = torch.log(torch.full_like(self.centre[0], self.config.prototypes))
        each, together = (torch.special.entr(p).sum(-1).mean() / most for p in (targets, targets.mean((0, 1))))
        return {"target_entropy": each, "prototype_use": together}

    @torch.no_grad()
    def after_step(self, progress: Tensor) -> None:
        self.teacher.follow(self.encoder, self.head, progress)
        self.centre.lerp_(self.batch_centre, 1 - self.config.centre_momentum)  # eq. 4

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Global and local views."""
        return self.crops.views(batch)
