"""Spatial contrasting: two patches of one image's feature map must be closer than patches of different images.

Hoffer, Hubara & Ailon, "Deep unsupervised learning through spatial contrasting", 2016 (arXiv 1610.00243; revised text:
ICLR 2017 submission S1vyujVye). Both patches come out of one forward pass. The functions below are the printed
equations; the Config's defaults differ from them where measurements say so: a patch is the mean of its cells (the one
choice that clearly mattered on Fashion-MNIST) and both directions are averaged; `paper-literal` is the printed form.

Three things the equations leave open decide whether this trains at all. Log-softmax is taken of -D: e^-D itself is
e^-53 on random 3,072-dimensional features and disappears. The gradient of |a - b| where both patches coincide (1 draw
in 25 for 4 x 4 of 8 x 8 cells) is set to zero. Distances use the matmul form on centred patches, the positive's own
distance the direct difference: relative gradient error 2e-7 where the plain form reaches 6e-3 (float32).
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.augment import integers, mix, shift_and_mirror, to_float
from harness.contracts import (
    Batch,
    Choice,
    Config,
    DatasetInfo,
    Encoder,
    HarnessError,
    Method,
    PretrainingData,
    Range,
    setting,
)
from harness.heads import Distance, all_distances, contrast_points, pair_distances, projector, wide
from harness.patches import (
    PatchGeometry,
    PatchSampler,
    crop_windows,
    hand_statistics,
    patch_means,
    patches_at,
    sample_patches,
)

__all__ = [
    "SpatialContrasting", "contrast", "pair_contrasting_loss", "patches_at", "retrieval_top1", "sample_patches",
    "spatial_contrasting_loss",
]  # fmt: skip

NUM_RETRIEVED, NUM_RETRIEVALS = 128, 8  # images among which diagnostics look for a partner, and how often
REDRAW_BYTES = 4 * 2**30  # of the N x N patches that Algorithm 1 draws; training holds about four times as much

# -------------------------------------------------------------------------------------------------------- criterion


def contrast(distances: Tensor, *, symmetric: bool = False, temperature: float = 1.0) -> Tensor:
    """Eq. 4 of a distance matrix (N, N): mean over i of -log softmax_j(-D[i, :] / temperature) at j = i.

    symmetric: the mean of this and the same along columns. Chance is log N.
    """
    target = torch.arange(len(distances), device=distances.device)
    loss = functional.cross_entropy(-distances / temperature, target)
    if not symmetric:
        return loss
    return (loss + functional.cross_entropy(-distances.T / temperature, target)) / 2


def retrieval_top1(distances: Tensor) -> Tensor:
    """Share of rows (N, N) whose smallest entry lies on the diagonal -> 0-d float32."""
    own = torch.arange(len(distances), device=distances.device)
    return (distances.detach().argmin(1) == own).float().mean()


def spatial_contrasting_loss(
    anchors: Tensor, positives: Tensor, *, symmetric: bool = False, distance: Distance = "l2", temperature: float = 1.0
) -> Tensor:
    """Eq. 4: each anchor must be nearest to the positive of its own image, among those of all images.

    anchors, positives (N, D): one patch each of image i in row i -> scalar, float32 (float64 for float64 input).
    """
    return contrast_points(anchors, positives, distance=distance, symmetric=symmetric, temperature=temperature)[0]


def pair_contrasting_loss(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], *, distance: Distance = "l2", temperature: float = 1.0
) -> Tensor:
    """Eq. 3, averaged with the roles of the two images swapped.

    first, second: the two patches, each (M, D), of M first and M second images -> scalar.
    -log(e^-p / (e^-p + e^-n)) is softplus(p - n), which cannot underflow.
    """
    between = pair_distances(first[0], second[0], distance)
    own = [pair_distances(image[0], image[1], distance) for image in (first, second)]
    losses = [functional.softplus((positive - between) / temperature) for positive in own]
    return torch.stack(losses).mean()


def _mean(values: tuple[Tensor, ...]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean()


# ----------------------------------------------------------------------------------------------------------- method


class SpatialContrasting(Method):
    """Spatial contrasting"""

    tier = "ranked"
    family = "contrastive"
    idea = "two patches of one image's feature map lie nearer than patches of different images"
    year = 2016
    source = "Hoffer, Hubara & Ailon, 2016, arXiv 1610.00243"
    null_control: ClassVar[str | None] = "sc_null"

    class Config(Config):
        patch: int | float = setting(
            0.5,
            "side of a patch: an integer counts cells, a fraction is a share of the map's side (rounded half up)",
            source="about 30% of the image on STL-10 and CIFAR-10, nearly all of it on MNIST (revised text)",
            search=Choice((0.25, 0.5, 0.75)),
            gt=0,
        )
        pool: Literal["mean", "flatten"] = setting(
            "mean", "a patch's vector", source="flatten: the paper; mean: measured", search=Choice(("mean", "flatten"))
        )
        layers: tuple[str, ...] = setting((), "encoder layers that carry the criterion, averaged; none: the last")
        symmetric: bool = setting(True, "average both directions of eq. 4", source="eq. 3 swaps roles; eq. 4 does not")
        distance: Distance = setting(
            "l2", "between patches", source="l2: eq. 3; cosine: Chen et al., 2020", search=Choice(("l2", "cosine"))
        )
        temperature: float = setting(
            1.0, "divides the distances", source="none in the paper", search=Range(0.05, 5, log=True), gt=0
        )
        projector: int = setting(0, "outputs of a projector on patches; 0: none", source="Chen et al., 2020", ge=0)
        patches_per_image: int = setting(
            2, "patches drawn per image; every two of them are contrasted", search=Range(2, 6), ge=2, le=16
        )
        overlap: Literal["allow", "disjoint"] = setting(
            "allow", "whether the two patches may depend on common input pixels", source="not stated"
        )
        form: Literal["batch", "pair"] = setting("batch", "eq. 4 over the batch, or eq. 3 with the next image")
        redraw: bool = setting(False, "draw image j's second patch anew for every i", source="Algorithm 1 as printed")
        pairs: Literal["same_image", "shuffled"] = setting(
            "same_image", "shuffled: positives of another image, the null control that carries no information"
        )
        shift: int = setting(
            2, "largest translation, pixels", source="'small translations', size not stated", search=Range(0, 4), ge=0
        )
        mirror: bool | Literal["auto"] = setting(
            "auto", "flip half of the images; auto: where the data set says a class survives it", source="'mirroring'"
        )

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        super().__init__(encoder, config, info)
        self.mirror = info.mirror_keeps_label if config.mirror == "auto" else config.mirror
        self.geometries: list[PatchGeometry] = []
        self.samplers, self.projectors = nn.ModuleList(), nn.ModuleList()
        for place, (channels, height, width) in enumerate(self._map_shapes(info)):
            layer = config.layers[place] if config.layers else None
            geometry = self._geometry((height, width), info.image_size, layer)
            self.geometries.append(geometry)
            self.samplers.append(PatchSampler(geometry, config.overlap == "disjoint"))
            features = channels * (1 if config.pool == "mean" else geometry.cells**2)
            head = projector(features, features, config.projector) if config.projector else nn.Identity()
            self.projectors.append(head)
        if config.redraw and config.form == "pair":
            raise HarnessError("sc: method.redraw belongs to the batch form, not to eq. 3 (method.form=pair)")
        if config.overlap == "disjoint" and config.patches_per_image > 2:
            raise HarnessError(f"sc: method.overlap=disjoint draws 2 patches per image, not {config.patches_per_image}")

    def _map_shapes(self, info: DatasetInfo) -> list[tuple[int, ...]]:
        if not self.config.layers:
            return [self.encoder.map_shape]
        training, blank = self.encoder.training, torch.zeros(1, info.channels, *info.image_size)
        with torch.no_grad():
            maps = self.encoder.eval().forward_layers(blank, self.config.layers)
        self.encoder.train(training)
        return [tuple(feature_map.shape[1:]) for feature_map in maps]

    def _geometry(self, map_size: tuple[int, int], image_size: tuple[int, int], layer: str | None) -> PatchGeometry:
        patch, side = self.config.patch, min(map_size)
        if isinstance(patch, float) and patch > 1:
            raise HarnessError(f"sc: method.patch={patch} is a share above 1; write an integer to count cells")
        cells = max(1, int(patch * side + 0.5)) if isinstance(patch, float) else patch
        geometry = PatchGeometry(map_size, image_size, cells, self.encoder.receptive_field(layer))
        where = f"the {map_size[0]} x {map_size[1]} map of {self.encoder.name}"
        if cells > side:
            raise HarnessError(f"sc: a patch of {cells} x {cells} cells (method.patch={patch}) is larger than {where}")
        if len(geometry.corners) == 1:
            raise HarnessError(
                f"sc: a patch of {cells} x {cells} cells (method.patch={patch}) is the whole of {where}: it has one "
                "place, so both patches of an image are always the same"
            )
        if self.config.overlap == "disjoint" and geometry.p_disjoint == 0:
            reach = "unknown" if geometry.field is None else f"{geometry.input_side} px"
            raise HarnessError(
                f"sc: method.overlap=disjoint cannot be met: a patch of {cells} x {cells} cells on {where} depends "
                f"on an input side of {reach}, the image is {image_size[0]} x {image_size[1]} px: P(input-disjoint) = 0"
            )
        return geometry

    # ---- loss

    def _sampler(self, place: int) -> PatchSampler:
        return cast(PatchSampler, self.samplers[place])

    def corners(self, seeds: Tensor, place: int = 0) -> Tensor:
        """Corners of the patches that `loss` draws for criterion `place`: seeds (B,) -> (patches_per_image, B, 2)."""
        sampler = self._sampler(place)
        return sampler.corners[sampler.draw(seeds, f"sc.patch.{place}", self.config.patches_per_image)].transpose(0, 1)

    def view(self, batch: Batch) -> Tensor:
        """The mildly augmented images, same type as `batch.images`."""
        return shift_and_mirror(batch.images, batch.seeds, "sc", self.config.shift, self.mirror)

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """The feature map of each layer that carries the criterion."""
        if not self.config.layers:
            return (self.encoder(images),)
        return self.encoder.forward_layers(images, self.config.layers)

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        maps = self.maps(self.view(batch))
        terms = [term for place, each in enumerate(maps) for term in self.criterion(each, batch.seeds, place)]
        losses, retrievals = zip(*terms, strict=True)
        return {"loss": _mean(losses), "retrieval": _mean(retrievals)}

    def criterion(self, feature_map: Tensor, seeds: Tensor, place: int = 0) -> list[tuple[Tensor, Tensor]]:
        """(loss, retrieval top-1) of every two draws p < q; patches of one image are never each other's negatives."""
        config = self.config
        sampler = self._sampler(place)
        draws = sampler.draw(seeds, f"sc.patch.{place}", config.patches_per_image)
        vectors = [self.projectors[place](v) for v in self._patch_vectors(feature_map, sampler.corners[draws], place)]
        partner = None if config.pairs == "same_image" else self._partner_images(seeds)
        terms = []
        for p, anchors in enumerate(vectors):
            for q in range(p + 1, len(vectors)):
                positives = vectors[q] if partner is None else vectors[q].index_select(0, partner)
                if config.redraw:
                    stream = f"sc.redraw.{place}.{p}.{q}"
                    candidates = self._redrawn(feature_map, seeds, draws[:, p], partner, stream, place)
                    distances = pair_distances(anchors[:, None], candidates, config.distance)
                    value = contrast(distances, symmetric=config.symmetric, temperature=config.temperature)
                elif config.form == "pair":
                    distances = all_distances(anchors, positives, config.distance)
                    value = self._pair_form(anchors, positives)
                else:
                    value, distances = contrast_points(
                        anchors, positives, distance=config.distance, symmetric=config.symmetric,
                        temperature=config.temperature,
                    )  # fmt: skip
                terms.append((value, retrieval_top1(distances)))
        return terms

    def _patch_vectors(self, feature_map: Tensor, corners: Tensor, place: int) -> tuple[Tensor, ...]:
        """(B, C, H, W) and corners (B, P, 2) -> P times (B, D), at least float32, before any projector."""
        cells = self.geometries[place].cells
        if self.config.pool == "mean":
            return patch_means(feature_map, cells, corners).unbind(1)
        return tuple(wide(patches_at(feature_map, cells, each)).flatten(1) for each in corners.unbind(1))

    def _redrawn(
        self, feature_map: Tensor, seeds: Tensor, first: Tensor, partner: Tensor | None, stream: str, place: int
    ) -> Tensor:
        """Algorithm 1 as printed: a second patch of image j for every anchor i -> (N, N, D), anchor by image."""
        count, cells = len(seeds), self.geometries[place].cells
        held = count**2 * cells**2 * feature_map.shape[1] * 4
        if held > REDRAW_BYTES:
            raise HarnessError(
                f"sc: method.redraw cuts a patch for each of {count} x {count} pairs of images, {held / 2**30:.1f} GiB "
                f"of them, more than {REDRAW_BYTES / 2**30:.0f} GiB; lower it with --set batch_size=N"
            )
        both = mix(mix(seeds)[:, None] + seeds).flatten()  # one seed per (anchor, image): other layouts, same draw
        sampler = self._sampler(place)
        second = sampler.partner(first.repeat_interleave(count), both, stream)
        images = torch.arange(count, device=seeds.device).repeat(count)
        patches = wide(patches_at(feature_map, cells, sampler.corners[second], images))
        vectors = patches.mean((1, 2)) if self.config.pool == "mean" else patches.flatten(1)
        redrawn = self.projectors[place](vectors).reshape(count, count, -1)
        return redrawn if partner is None else redrawn.index_select(1, partner)

    def _pair_form(self, anchors: Tensor, positives: Tensor) -> Tensor:
        """Eq. 3 of every image with the next one of the batch; symmetric also exchanges the two patches' roles."""
        score = partial(pair_contrasting_loss, distance=self.config.distance, temperature=self.config.temperature)
        loss = score((anchors, positives), (anchors.roll(-1, 0), positives.roll(-1, 0)))
        if not self.config.symmetric:
            return loss
        return (loss + score((positives, anchors), (positives.roll(-1, 0), anchors.roll(-1, 0)))) / 2

    def _partner_images(self, seeds: Tensor) -> Tensor:
        """Which image gives the positive of each anchor of the null control: never its own."""
        own = torch.arange(len(seeds), device=seeds.device)
        return (own + 1 + integers(mix(seeds.sum()[None]), "sc.shuffle", len(seeds) - 1)) % len(seeds)

    # ---- what it saw, what it learnt

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The view, and the image regions behind the first two patches of the first criterion."""
        view = to_float(self.view(batch))
        first, second = self.corners(batch.seeds)[:2]
        geometry = self.geometries[0]
        return {
            "view": view,
            "patch 1": crop_windows(view, geometry, first),
            "patch 2": crop_windows(view, geometry, second),
        }

    def diagnostics(self, data: PretrainingData, untrained: Encoder) -> dict[str, float]:
        """Is it spatial, and was there anything to learn? Per criterion (named by its layer when there are several).

        Retrieval: how often the patch 1 nearest to a patch 2, among 128 images without augmentation, is of its own
        image (projectors left out). The hand matcher sees only eight statistics of the patches' input windows.
        """
        batches = list(data.batches(NUM_RETRIEVED * NUM_RETRIEVALS))
        images = torch.cat([batch.images for batch in batches]).split(NUM_RETRIEVED)
        seeds = torch.cat([batch.seeds for batch in batches]).split(NUM_RETRIEVED)
        groups = [group for group in zip(images, seeds, strict=True) if len(group[0]) == len(images[0])]
        found: dict[str, float] = {}
        for place, geometry in enumerate(self.geometries):
            facts = {"patch_cells": float(geometry.cells), "map_side": float(min(geometry.map_size))}
            if geometry.input_side is not None:
                facts |= {"patch_input_side": float(geometry.input_side), "p_input_disjoint": geometry.p_disjoint}
            facts["retrieval_top1"] = self._retrieval(self.encoder, groups, place)
            facts["retrieval_top1_untrained"] = self._retrieval(untrained, groups, place)
            facts["retrieval_top1_hand_statistics"] = self._hand_retrieval(groups, place)
            suffix = f".{self.config.layers[place]}" if len(self.geometries) > 1 else ""
            found |= {key + suffix: value for key, value in facts.items()}
        return found

    @torch.no_grad()
    def _retrieval(self, encoder: Encoder, groups: list[tuple[Tensor, Tensor]], place: int) -> float:
        training, layers = encoder.training, self.config.layers[place : place + 1]
        encoder.eval()
        scores = []
        for images, seeds in groups:
            feature_map = encoder.forward_layers(images, layers)[0] if layers else encoder(images)
            corners = self.corners(seeds, place)[:2].transpose(0, 1)
            first, second = self._patch_vectors(feature_map, corners, place)
            scores.append(retrieval_top1(all_distances(second, first, self.config.distance)))
        encoder.train(training)
        return torch.stack(scores).mean().item()

    def _hand_retrieval(self, groups: list[tuple[Tensor, Tensor]], place: int) -> float:
        """Each statistic in units of its spread over the group, then the nearest in L2."""
        scores = []
        for images, seeds in groups:
            corners = self.corners(seeds, place)[:2]
            both = torch.stack([hand_statistics(to_float(images), self.geometries[place], at) for at in corners])
            first, second = both / both.std((0, 1), correction=0).clamp_min(1e-12)
            scores.append(retrieval_top1(all_distances(second, first)))
        return torch.stack(scores).mean().item()
