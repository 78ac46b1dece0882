"""Exemplar networks: every image is a class of its own, made of its transformed copies.

Dosovitskiy, Springenberg, Riedmiller & Brox, "Discriminative unsupervised feature learning with convolutional neural
networks", NIPS 2014 (arXiv 1406.6909), section 2: copies are shifted, scaled, turned and recoloured; a softmax
tells the surrogate classes apart.

Where we differ: the paper learns one row of classifier weights for each of up to 32,000 patches. Here the classes of a
step are the images of its batch, and the row of a class is the mean embedding of the other copies of that image, on the
sphere: what a trained classifier's row tends to. A table of rows gets its gradient only when its image comes up, four
times in a short run, and grows with the data; the mean is there from the first step. A copy's own row never contains
the copy itself. Whole images stand in for 32 px patches of larger ones, so a shifted copy repeats its border; contrast
along principal components of the colours is the usual contrast, and the power is taken of every channel, not of
saturation and value.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harness.augment import to_float, uniform
from harness.contracts import Batch, Choice, Config, DatasetInfo, Encoder, Method, Range, setting
from harness.heads import projector, wide
from harness.image_operations import adjust_colours

__all__ = ["Exemplar", "exemplar_loss", "recolour", "warp"]


def exemplar_scores(copies: Tensor, temperature: float) -> Tensor:
    """Cosine of each copy with the row of each class, over temperature: (V, B, D) -> (V, B, B)."""
    with torch.autocast(copies.device.type, enabled=False):
        points = functional.normalize(wide(copies), dim=-1)
        total = points.sum(0)
        rows = functional.normalize(total, dim=-1)
        others = functional.normalize(total - points, dim=-1)
        scores = points @ rows.T
        own = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        return torch.where(own, (points * others).sum(-1, keepdim=True), scores) / temperature


def exemplar_loss(copies: Tensor, temperature: float) -> Tensor:
    """Eq. 1 with the images of the batch as its classes: copies (V, B, D), V >= 2 -> scalar. Chance is log B."""
    scores = exemplar_scores(copies, temperature)
    return -scores.log_softmax(-1).diagonal(dim1=1, dim2=2).mean()


def warp(images: Tensor, seeds: Tensor, stream: str, shift: float, zoom: float, turn: float) -> Tensor:
    """Shift by up to `shift` sides, scale by 1 / zoom to zoom (uniform in the logarithm), turn by up to `turn` degrees;
    bilinear, the border repeats. float (B, C, H, W) -> the same."""
    height, width = images.shape[2:]
    drawn = 2 * uniform(seeds, stream, (4,)) - 1
    scale, angle = (drawn[:, 0] * math.log(zoom)).exp(), drawn[:, 1] * math.radians(turn)
    sine, cosine = angle.sin() / scale, angle.cos() / scale
    # Coordinates run from -1 to 1 along both sides, so a turn must know the sides' ratio.
    across = torch.stack((cosine, -sine * (height / width), drawn[:, 2] * (2 * shift)), 1)
    down = torch.stack((sine * (width / height), cosine, drawn[:, 3] * (2 * shift)), 1)
    grid = functional.affine_grid(torch.stack((across, down), 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False).clamp(0, 1)


def recolour(images: Tensor, seeds: Tensor, stream: str, strength: float) -> Tensor:
    """The paper's colours at strength 1: contrast by 0.5 to 2, saturation by 0.7 to 1.4, hue by up to 0.1 of a circle,
    values to the power 0.25 to 4, times 0.7 to 1.4, plus -0.1 to 0.1. float (B, C, H, W) -> the same."""
    drawn = (2 * uniform(seeds, stream, (6,)) - 1) * strength
    contrast, saturation = (drawn[:, 0] * math.log(2)).exp(), (drawn[:, 1] * math.log(1.4)).exp()
    factors = torch.stack((torch.ones_like(contrast), contrast, saturation), 1)
    order = torch.arange(4, device=seeds.device).expand(len(seeds), 4)
    images = adjust_colours(images, factors, 0.1 * drawn[:, 2], order)
    power, factor = (drawn[:, 3] * math.log(4)).exp(), (drawn[:, 4] * math.log(1.4)).exp()
    each = [value[:, None, None, None] for value in (power, factor, 0.1 * drawn[:, 5])]
    return (images.pow(each[0]) * each[1] + each[2]).clamp(0, 1)


class Exemplar(Method):
    """Exemplar networks"""

    tier = "ranked"
    family = "pretext"
    year = 2014
    idea = "each image is a class made of its shifted, turned and recoloured copies"
    source = "Dosovitskiy, Springenberg, Riedmiller & Brox, NIPS 2014, arXiv 1406.6909"
    views_per_image = 4

    class Config(Config):
        shift: float = setting(
            0.2, "largest translation along each side, share of it", source="section 2.1",
            search=Range(0.05, 0.3), ge=0, le=0.5,
        )  # fmt: skip
        zoom: float = setting(1.4, "largest scale, and 1 / smallest", source="section 2.1: 0.7 to 1.4", ge=1, le=2)
        turn: float = setting(20.0, "largest turn, degrees", source="section 2.1", search=Range(0, 40), ge=0, le=180)
        colours: float = setting(
            1.0, "strength of the changes of contrast and colour, 0: none", source="1: section 2.1",
            search=Range(0, 1), ge=0, le=1,
        )  # fmt: skip
        temperature: float = setting(0.2, "divides the cosines", search=Range(0.05, 1, log=True), gt=0)
        hidden: int = setting(256, "units of the layer under the softmax", source="512: section 3.1", ge=1)
        out: int = setting(128, "dimensions of the embedding", search=Choice((64, 128, 256)), ge=1)

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        features = encoder.pool(torch.zeros(1, *encoder.map_shape)).shape[1]
        self.projector = projector(features, config.hidden, config.out)

    @torch.no_grad()
    def copy(self, batch: Batch, number: int) -> Tensor:
        """One transformed copy of each image."""
        config, stream = self.config, f"exemplar.{number}"
        with torch.autocast(batch.images.device.type, enabled=False):
            images = to_float(batch.images)
            moved = warp(images, batch.seeds, f"{stream}.warp", config.shift, config.zoom, config.turn)
            return recolour(moved, batch.seeds, f"{stream}.colour", config.colours) if config.colours else moved

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        copies = torch.cat(tuple(self.preview(batch).values()))
        embedded = self.projector(self.encoder.pool(self.encoder(copies)))
        scores = exemplar_scores(embedded.unflatten(0, (self.views_per_image, -1)), self.config.temperature)
        own = torch.arange(len(batch), device=scores.device)
        return {
            "loss": -scores.log_softmax(-1).diagonal(dim1=1, dim2=2).mean(),
            "top1": (scores.detach().argmax(-1) == own).float().mean(),
        }

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The copies."""
        return {f"copy {number}": self.copy(batch, number) for number in range(1, self.views_per_image + 1)}
