"""LeJEPA: views of an image must agree on an embedding whose distribution is an isotropic Gaussian; nothing else.

Balestriero & LeCun, "LeJEPA: provable and scalable self-supervised learning without the heuristics", 2025 (arXiv
2511.08544). The prediction loss pulls the embeddings of all views to the mean of the global ones; SIGReg tests, along
random directions, whether embeddings are standard normal, so they cannot collapse. No teacher, no stop-gradient, no
schedule of either; one hyperparameter trades the two terms.

Where this differs: fewer directions, since the embedding is narrow, and a projector of two layers rather than three.
SIGReg is taken of each view's embeddings by itself and averaged. Directions come from a hash of the step: other ones at
every step, the same for all samples, views and machines.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.augment import hash_seeds, uniform
from harness.contracts import Batch, Choice, DatasetInfo, Encoder, Method, Range, setting
from harness.heads import matrix_product, projector, wide
from harness.multi_crop import NUM_GLOBAL, NUM_LOCAL, MultiCrop, MultiCropConfig

__all__ = ["LeJEPA", "prediction_loss", "sigreg", "unit_directions"]

KNOTS, FURTHEST = 17, 3.0  # points of the integral and its end, as in the authors' minimal example


def unit_directions(seed: Tensor, features: int, count: int) -> Tensor:
    """Uniformly distributed unit vectors from a 0-d int64 `seed`: (features, count) float32 on its device.

    Normal numbers by Box & Muller (1958), each column then divided by its length.
    """
    seeds = hash_seeds(0, seed, torch.arange(features, device=seed.device))
    radius = (-2 * torch.log1p(-uniform(seeds, "directions.radius", (count,)))).sqrt()
    normal = radius * (2 * math.pi * uniform(seeds, "directions.angle", (count,))).cos()
    return normal / normal.norm(dim=0)


def sigreg(embeddings: Tensor, directions: Tensor, knots: int = KNOTS, furthest: float = FURTHEST) -> Tensor:
    """Epps & Pulley's (1983) statistic of normality of the embeddings along each direction, averaged.

    embeddings (..., N, D), directions (D, M) of unit length -> scalar, at least float32: N times the integral over
    [-furthest, furthest] of |mean_n exp(i t x_n) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt, by the trapezoid rule. The
    integrand is even, so only t >= 0 is computed.
    """
    slices = matrix_product(wide(embeddings), directions.to(wide(embeddings).dtype))
    at = torch.linspace(0, furthest, knots, dtype=slices.dtype, device=slices.device)
    normal = (-at.square() / 2).exp()
    angles = slices[..., None] * at
    error = (angles.cos().mean(-3) - normal).square() + angles.sin().mean(-3).square()
    return embeddings.shape[-2] * 2 * torch.trapezoid(error * normal, at).mean()


def prediction_loss(embeddings: Tensor, num_global: int) -> Tensor:
    """Mean square between each view and the mean of the global views: (V, N, D), global views first -> scalar."""
    points = wide(embeddings)
    return (points - points[:num_global].mean(0)).square().mean()


class LeJEPA(Method):
    """LeJEPA"""

    tier = "ranked"
    family = "decorrelation"
    year = 2025
    idea = "views agree, and along random directions their embeddings pass a test of normality"
    source = "Balestriero & LeCun, 2025, arXiv 2511.08544"
    views_per_image: ClassVar[int] = NUM_GLOBAL + NUM_LOCAL

    class Config(MultiCropConfig):
        regularisation: float = setting(
            0.05,
            "share lambda of SIGReg in the loss; the prediction loss has the rest",
            source="0.05 recommended, 0.02 in the authors' minimal example",
            search=Range(0.01, 0.2, log=True),
            gt=0,
            lt=1,
        )
        directions: int = setting(
            256, "random directions of a step", source="1024 recommended", search=Choice((64, 256, 1024)), ge=1
        )
        hidden: int = setting(256, "hidden units of the projector", source="2048", ge=1)
        out: int = setting(
            64,
            "outputs of the projector",
            source="16 in the authors' minimal example",
            search=Choice((16, 64, 128)),
            ge=2,
        )

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.crops = MultiCrop.of("lejepa", config, info, encoder)
        features = encoder.pool(torch.zeros(1, *encoder.map_shape)).shape[1]
        self.projector = projector(features, config.hidden, config.out)

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        parts = [self.projector(self.encoder.pool(self.encoder(v))) for v in self.crops.by_size(batch) if v is not None]
        embeddings = self.crops.stacked(parts, len(batch))
        directions = unit_directions(step, self.config.out, self.config.directions)
        normality, prediction = sigreg(embeddings, directions), prediction_loss(embeddings, NUM_GLOBAL)
        share = self.config.regularisation
        return {
            "loss": share * normality + (1 - share) * prediction,
            "sigreg": normality.detach(),
            "prediction": prediction.detach(),
        }

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Global and local views."""
        return self.crops.views(batch)
