"""Multi-crop: two views of most of an image and several small ones of little parts of it.

Caron, Misra, Mairal, Goyal, Bojanowski & Joulin, "Unsupervised learning of visual features by contrasting cluster
assignments", NeurIPS 2020, section 3.3. Local views are smaller in pixels too, so that they cost little: 96 of 224 px
there, the same share of the side here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.contracts import Batch, Choice, DatasetInfo, Encoder, HarnessError, Range, setting
from harness.heads import map_shape_of
from harness.views import ViewConfig, ViewMaker

NUM_GLOBAL = 2
NUM_LOCAL = 4  # by default


class MultiCropConfig(ViewConfig):
    """The settings of global and local views."""

    crop_scale: float = setting(
        0.4,
        "smallest crop of a global view and largest of a local one, share of the image's area",
        source="0.4: authors' code of Caron et al., 2021; 0.14 for ResNet-50: Caron et al., 2020",
        search=Range(0.2, 0.6),
        gt=0,
        le=1,
    )
    num_local: int = setting(
        NUM_LOCAL,
        "local views",
        source="6: Caron et al., 2020; 8: authors' code of Caron et al., 2021",
        search=Choice((0, 2, 4, 6)),
        ge=0,
    )
    local_scale: float = setting(
        0.15, "smallest crop of a local view, share of the area", source="0.05: Caron et al., 2020", gt=0, le=1
    )
    local_side: float = setting(
        0.43, "side of a local view, share of the image's", source="96 of 224 px: Caron et al., 2020", gt=0, le=1
    )

    @property
    def views_per_image(self) -> int:
        """Global and local views together."""
        return NUM_GLOBAL + self.num_local


@dataclass(frozen=True)
class MultiCrop:
    """Makes the views of one method; `name` is part of every view's stream."""

    name: str
    whole: ViewMaker
    local: ViewMaker
    num_local: int

    @classmethod
    def of(cls, name: str, config: MultiCropConfig, info: DatasetInfo, encoder: Encoder) -> MultiCrop:
        """Raises HarnessError, with the numbers, when local crops are larger than global ones or fit no encoder."""
        if config.local_scale > config.crop_scale:
            raise HarnessError(
                f"{name}: method.local_scale={config.local_scale:g} is above method.crop_scale={config.crop_scale:g}, "
                "where local views end"
            )
        side = max(1, round(config.local_side * min(info.image_size)))
        if config.num_local and map_shape_of(encoder, info.channels, (side, side)) is None:
            raise HarnessError(
                f"{name}: encoder {encoder.name} does not take local views of {side} x {side} px "
                f"(method.local_side={config.local_side:g} of {min(info.image_size)} px); raise it or set method.num_local=0"
            )
        scale = (config.local_scale, config.crop_scale)
        return cls(
            name, ViewMaker.of(config, info), ViewMaker.of(config, info, scale=scale, size=side), config.num_local
        )

    def views(self, batch: Batch) -> dict[str, Tensor]:
        """`global 1`, `global 2`, then `local 1`, ...: each (B, C, h, w) floats in [0, 1]."""
        makers = {f"global {n + 1}": self.whole for n in range(NUM_GLOBAL)}
        makers |= {f"local {n + 1}": self.local for n in range(self.num_local)}
        return {
            name: maker(batch.images, batch.seeds, f"{self.name}.{name.replace(' ', '.')}")
            for name, maker in makers.items()
        }

    def by_size(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """All global views (2B, C, H, W), view after view, and all local ones; None where there are none."""
        views = list(self.views(batch).values())
        local = torch.cat(views[NUM_GLOBAL:]) if self.num_local else None
        return torch.cat(views[:NUM_GLOBAL]), local

    def stacked(self, embeddings: list[Tensor], count: int) -> Tensor:
        """What was made of `by_size`'s parts, each (V * count, D) -> (views, count, D), global views first."""
        return torch.cat([part.unflatten(0, (-1, count)) for part in embeddings])
