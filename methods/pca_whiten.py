"""Floor: the pixels' largest principal components, each scaled to variance 1. Linear, and blind to labels.

Hotelling, "Analysis of a complex of statistical variables into principal components", 1933; of images: Bell & Sejnowski, "The
independent components of natural scenes are edge filters", 1997. It says how much of a gain over raw pixels needs no network:
neighbours no longer see mostly the few directions of largest variance, and a probe has fewer numbers to read.

Components are those of unlabelled pretraining images. `epsilon` is added to every variance before scaling (as Coates & Ng,
2012, section 3.1, do), so that directions in which images hardly differ are not blown up; without it the features of the
fitted images have the identity as covariance. Larger images are averaged down to about 32 px first: the covariance of
96 px in colour has 764 million entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.contracts import Batch, Config, DatasetInfo, Encoder, HarnessError, Method, PretrainingData, Range, setting
from harness.methods.pixels import PixelEncoder

__all__ = ["PCAEncoder", "PCAWhiten", "principal_axes"]

SIDE = 32  # pixels that images are averaged down to


def principal_axes(covariance: Tensor, count: int, epsilon: float) -> Tensor:
    """(D, D) -> (D, count): the largest components first, each divided by sqrt(its variance + epsilon).

    A component's sign is open; here its largest entry is positive.
    """
    variances, axes = torch.linalg.eigh(covariance)
    variances, axes = variances.flip(0)[:count].clamp_min(0), axes.flip(1)[:, :count]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return axes * largest.sign() * (variances + epsilon).rsqrt()


class PCAEncoder(PixelEncoder):
    """No parameters, two buffers. The map is (B, K, 1, 1), its one readout the K whitened components."""

    readouts = ("whitened",)
    centre: Tensor  # (D,) the mean image
    axes: Tensor  # (D, K)

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info, "pca")
        self.shrink = max(1, round(min(info.image_size) / SIDE))
        self.image_size = (info.image_size[0] // self.shrink, info.image_size[1] // self.shrink)
        self.num_pixels = self.channels * self.image_size[0] * self.image_size[1]
        self.make_room(1)
        # How many components were kept is not known before the method is built, but saved tensors say it.
        self.register_load_state_dict_pre_hook(_take_size)

    def make_room(self, count: int) -> None:
        """Buffers for `count` components, all zero."""
        for name, shape in (("centre", (self.num_pixels,)), ("axes", (self.num_pixels, count))):
            self.register_buffer(name, torch.zeros(shape, device=self.mean.device))

    @property
    def map_shape(self) -> tuple[int, int, int]:
        return (self.axes.shape[1], 1, 1)

    def rows(self, images: Tensor) -> Tensor:
        """uint8 or floats in [0, 1] (B, C, H, W) -> float32 (B, D), averaged down."""
        images = super().forward(images).to(self.mean.dtype)
        return (functional.avg_pool2d(images, self.shrink) if self.shrink > 1 else images).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return ((self.rows(images) - self.centre) @ self.axes)[:, :, None, None]


def _take_size(encoder: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    assert isinstance(encoder, PCAEncoder)
    axes = state.get(f"{prefix}axes")
    if axes is not None and axes.shape[1] != encoder.axes.shape[1]:
        encoder.make_room(axes.shape[1])


class PCAWhiten(Method):
    """Whitened principal components"""

    trains = False
    family = "floor"
    year = 1997
    idea = "the pixels' largest principal components, scaled to variance 1; no network, no gradient"
    source = "Hotelling, 1933; Bell & Sejnowski, 1997"

    class Config(Config):
        dimensions: int = setting(
            64, "components kept; all where images have fewer pixels", search=Range(16, 512, log=True), ge=1
        )
        epsilon: float = setting(
            0.01, "added to the variances, pixels in [0, 1]", source="Coates & Ng, 2012, on normalised patches: 0.1",
            search=Range(1e-3, 1, log=True), ge=0,
        )  # fmt: skip
        num_images: int = setting(20_000, "images that are fitted, spread evenly, at most", ge=2)

    encoder: PCAEncoder

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.count = min(config.dimensions, self.encoder.num_pixels)
        self.encoder.make_room(self.count)

    @classmethod
    def own_encoder(cls, info: DatasetInfo) -> Encoder:
        return PCAEncoder(info)

    def prepare(self, data: PretrainingData) -> None:
        """Mean and covariance in one pass, in float64."""
        count, width = 0, self.encoder.num_pixels
        total, products = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
        for batch in data.batches(self.config.num_images):
            rows = self.encoder.rows(batch.images).cpu().double()
            count += len(rows)
            total += rows.sum(0)
            products += rows.T @ rows
        if count <= self.count:
            raise HarnessError(
                f"pca_whiten: {count:,} images do not vary in {self.count:,} directions; lower method.dimensions"
            )
        covariance = (products - total.outer(total) / count) / (count - 1)
        self.encoder.centre.copy_(total / count)
        self.encoder.axes.copy_(principal_axes(covariance, self.count, self.config.epsilon))

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError("pca_whiten is never trained")
