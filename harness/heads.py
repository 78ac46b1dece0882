"""Parts that methods share and throw away after pretraining: projectors, decoders, distances that survive coincidence,
momentum teachers and queues."""

from __future__ import annotations

import copy
import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from harness.contracts import DatasetInfo, Encoder, HarnessError

Distance = Literal["l2", "squared", "cosine"]


def projector(features: int, hidden: int, out: int) -> nn.Sequential:
    """Linear, batch norm, ReLU, linear: (B, features) -> (B, out) (Chen et al., 2020, section 2.1)."""
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out)
    )


def decoder(map_shape: tuple[int, int, int], image_shape: tuple[int, int, int], hidden: int) -> nn.Sequential:
    """From a feature map back to an image: (B, *map_shape) -> (B, *image_shape), any values.

    map_shape, image_shape: (C, H, W). Doubles the sides until they are the image's (the last step by what is missing),
    nearest neighbour and a 3 x 3 convolution each time: transposed convolutions leave checkerboards (Odena et al., 2016).
    """
    channels, height, width = map_shape
    _, image_height, image_width = image_shape
    layers: list[nn.Module] = []
    while True:
        layers += [nn.Conv2d(channels, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)]
        channels = hidden
        if (height, width) == (image_height, image_width):
            return nn.Sequential(*layers, nn.Conv2d(hidden, image_shape[0], 3, padding=1))
        height, width = min(2 * height, image_height), min(2 * width, image_width)
        layers.append(nn.Upsample((height, width)))


@torch.no_grad()
def momentum_update(teacher: nn.Module, online: nn.Module, momentum: Tensor) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * online, parameters only: a teacher in training mode makes its
    own batch-norm statistics. `momentum` is a 0-d tensor on the device, so nothing waits for it.
    """
    for slow, fast in zip(teacher.parameters(), online.parameters(), strict=True):
        slow.lerp_(fast, (1 - momentum).to(slow.dtype))


def wide(features: Tensor) -> Tensor:
    """Sums are taken in at least float32; float64 stays."""
    return features if features.dtype == torch.float64 else features.float()


def _placed(features: Tensor, distance: Distance) -> Tensor:
    """The points whose distance is taken; for the cosine on the unit sphere, where half the square is 1 - cos."""
    points = wide(features)
    return points * (points.square().sum(-1, keepdim=True) + 1e-12).rsqrt() if distance == "cosine" else points


def pair_distances(first: Tensor, second: Tensor, distance: Distance = "l2") -> Tensor:
    """Distances between partners: (..., D) and (..., D), broadcast -> (...), in float32 or float64."""
    squared = (_placed(first, distance) - _placed(second, distance)).square().sum(-1)
    if distance == "squared":
        return squared
    if distance == "cosine":
        return squared / 2
    apart = squared > 0
    # sqrt has no slope at 0: there the distance is 0 and so is its gradient, exactly.
    return torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)


def _distance_matrix(anchors: Tensor, positives: Tensor, distance: Distance) -> tuple[Tensor, ...]:
    """(N, D) and (N, D) as `_placed` left them -> the same about one centre, partners' difference, distances (N, N).

    Matmul form: distances do not depend on the centre, rounding does. Partners' own distance is that of the direct
    difference, taken before centring rounds it.
    """
    centre = positives.mean(0)
    a, b, difference = anchors - centre, positives - centre, anchors - positives
    matrix = torch.addmm(b.square().sum(1)[None], a, b.T, alpha=-2).add_(a.square().sum(1)[:, None]).clamp_min_(0)
    matrix.diagonal().copy_(difference.square().sum(1))
    if distance == "l2":
        matrix.sqrt_()
    elif distance == "cosine":
        matrix.div_(2)
    return a, b, difference, matrix


@torch.no_grad()
def all_distances(anchors: Tensor, positives: Tensor, distance: Distance = "l2") -> Tensor:
    """D[i, j] between anchor i and positive j: (N, D) and (N, D) -> (N, N), in float32 or float64, without gradient."""
    with torch.autocast(anchors.device.type, enabled=False):
        return _distance_matrix(_placed(anchors, distance), _placed(positives, distance), distance)[-1]


class _Contrast(torch.autograd.Function):
    """Softmax over distances and its gradient with respect to the points, made together.

    The points' gradient is known as soon as the softmax is, so nothing of size N x N waits for the backward pass, and
    none of autograd's thirty small steps is taken: 1.7 times as fast at N = 128, D = 64 on one core, 1.1 times where the
    three products dominate. And 1 - p, which float32 loses when the task is solved, keeps its digits.
    """

    generate_vmap_rule = True  # several seeds in one network

    @staticmethod
    def forward(
        anchors: Tensor, positives: Tensor, distance: Distance, symmetric: bool, temperature: float
    ) -> tuple[Tensor, ...]:
        with torch.autocast(anchors.device.type, enabled=False):
            a, b, difference, distances = _distance_matrix(anchors, positives, distance)
            scores = distances * (-1 / temperature)
            pull = scores.log_softmax(1)  # of anchor i for positive j
            loss = -pull.diagonal().mean()
            pull.exp_().diagonal().zero_()
            own = pull.sum(1)  # 1 - p of the own positive, as the sum of the others: not lost where p is near 1
            if symmetric:
                # CUDA's softmax along any but the last dimension takes a hundred times as long (265 us at N = 512, H200)
                back = scores.T.contiguous().log_softmax(1).T if scores.is_cuda else scores.log_softmax(0)
                loss = (loss - back.diagonal().mean()) / 2
                back.exp_().diagonal().zero_()
                own += back.sum(0)
                pull += back
            # d loss / d D[i, j] is -pull, on the diagonal +own; then D's own slope along a_i - b_j.
            share = 1 / (len(a) * temperature * (2 if symmetric else 1))
            if distance == "l2":  # 1 / D; nothing where two points coincide
                pull.div_(functional.threshold(distances, 0.0, torch.inf))
                own = own / functional.threshold(distances.diagonal(), 0.0, torch.inf)
            elif distance == "squared":
                share *= 2
            direct = (own * share)[:, None] * difference
            pull *= -share
            to_anchors = torch.addmm(pull.sum(1)[:, None] * a + direct, pull, b, alpha=-1)
            to_positives = torch.addmm(pull.sum(0)[:, None] * b - direct, pull.T, a, alpha=-1)
        return loss, distances, to_anchors, to_positives

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, distances, to_anchors, to_positives = output
        ctx.mark_non_differentiable(distances, to_anchors, to_positives)
        ctx.save_for_backward(to_anchors, to_positives)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if slope is None:
            return None, None, None, None, None
        to_anchors, to_positives = ctx.saved_tensors
        return slope * to_anchors, slope * to_positives, None, None, None


def contrast_points(
    anchors: Tensor, positives: Tensor, *, distance: Distance = "l2", symmetric: bool = False, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Mean over i of -log softmax_j(-D[i, :] / temperature) at j = i, D as in `all_distances`; symmetric: the mean of
    that and the same along columns.

    anchors, positives (N, D) -> scalar, at least float32, and D (N, N) without gradient. Memory: 4 matrices N x N.
    """
    points = _placed(anchors, distance), _placed(positives, distance)
    loss, distances, *_ = _Contrast.apply(*points, distance, symmetric, temperature)
    return loss, distances


# ------------------------------------------------------------------------------------- teachers and remembered embeddings


def unit_rows(features: Tensor) -> Tensor:
    """Rows on the unit sphere, (N, D) -> (N, D), in float32 or float64."""
    return functional.normalize(wide(features), dim=1)


def matrix_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in the precision they have: autocast would make every product bfloat16."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def rising_momentum(progress: Tensor, base: float) -> Tensor:
    """`base` at progress 0, 1 at progress 1, along half a cosine (Grill et al., 2020, section 3.2)."""
    return 1 - (1 - base) * (torch.cos(math.pi * progress) + 1) / 2


class MomentumTeacher(nn.Module):
    """A slowly moving average of an encoder and its head: never optimised, no gradient, batch norm by its own batch.

    momentum: at the start of training; it rises to 1
    """

    def __init__(self, encoder: Encoder, head: nn.Module, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.head = copy.deepcopy(head).requires_grad_(False)

    @torch.no_grad()
    def forward(self, views: Tensor) -> Tensor:
        """What it says of views (B, C, H, W): (B, D)."""
        embeddings: Tensor = self.head(self.encoder.pool(self.encoder(views)))
        return embeddings

    def follow(self, encoder: nn.Module, head: nn.Module, progress: Tensor) -> None:
        """One step towards the online encoder and head."""
        momentum = rising_momentum(progress, self.momentum)
        momentum_update(self.encoder, encoder, momentum)
        momentum_update(self.head, head, momentum)


QueueLength = Annotated[int, Field(ge=1)] | Literal["auto"]
LONGEST_QUEUE = 4096  # what "auto" means for large data: the CIFAR-10 setting of MoCo's authors


class Queue(nn.Module):
    """The last embeddings of earlier batches, first in first out, and the image that each came from.

    Its tensors keep their places and are written there, so that a captured step finds them. Where a queue is a sizeable
    part of the data it holds embeddings of the images that are just looked at (the order of one epoch says nothing of
    the next one's), so that `of_images` is needed to tell an image from the others.

    length: rows, "auto" is a quarter of the data and LONGEST_QUEUE at most; features: D; info: of the data set
    Raises HarnessError for a length of more than half of the data's images.
    """

    embeddings: Tensor
    images: Tensor
    pointer: Tensor

    def __init__(self, length: QueueLength, features: int, info: DatasetInfo) -> None:
        super().__init__()
        self.asked = length
        rows = self._rows(num_pretraining_images(info))
        self.register_buffer("embeddings", unit_rows(torch.randn(rows, features)))
        self.register_buffer("images", torch.full((rows,), -1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def _rows(self, num_images: int | None) -> int:
        if self.asked == "auto":
            return LONGEST_QUEUE if num_images is None else max(1, min(LONGEST_QUEUE, num_images // 4))
        if num_images is not None and self.asked > num_images // 2:
            raise HarnessError(
                f"method.queue: {self.asked:,} embeddings are more than half of the {num_images:,} pretraining images; "
                f"use auto or at most {num_images // 2}"
            )
        return self.asked

    def fit(self, num_images: int) -> None:
        """Shorten the queue, or refuse its length, where only so many images of the data set are trained on."""
        rows = self._rows(num_images)
        self.embeddings, self.images = self.embeddings[:rows].clone(), self.images[:rows].clone()

    def of_images(self, indices: Tensor) -> Tensor:
        """Which rows came from which image: indices (B,) -> (B, rows) bool."""
        return self.images == indices[:, None]

    @torch.no_grad()
    def push(self, embeddings: Tensor, indices: Tensor) -> None:
        """Overwrite the oldest rows: embeddings (B, D), of images `indices` (B,); more than fit: the last ones."""
        rows = len(self.images)
        embeddings, indices = embeddings[-rows:], indices[-rows:]
        places = (self.pointer + torch.arange(len(indices), device=indices.device)) % rows
        self.embeddings.index_copy_(0, places, embeddings.to(self.embeddings.dtype))
        self.images.index_copy_(0, places, indices)
        self.pointer.copy_((self.pointer + len(indices)) % rows)


def num_pretraining_images(info: DatasetInfo) -> int | None:
    """Images in the splits that pretraining uses by default; None where the data set does not say."""
    return sum(info.counts.get(split, 0) for split in info.pretrain_split.split("+")) or None


def map_shape_of(encoder: Encoder, channels: int, size: tuple[int, int]) -> tuple[int, int, int] | None:
    """(C, H, W) of the map that `encoder` makes of images of `size` (H, W); None where it takes no such images."""
    training = encoder.training
    try:
        with torch.no_grad():
            shape = encoder.eval()(torch.zeros(1, channels, *size)).shape
    except (RuntimeError, AssertionError, ValueError, TypeError, HarnessError):
        return None
    finally:
        encoder.train(training)
    return (shape[1], shape[2], shape[3]) if len(shape) == 4 and min(shape[2:]) > 0 else None


LEAST_CELLS = 3  # along a side of a map: on fewer, outer weights of a 3 x 3 convolution see little but padding


class SquareEncoder(nn.Module):
    """Squares cut out of images, encoded each by itself, stretched no more than the network needs.

    Near to their own scale its features stay those of whole images; but a network that is shown 8 px at a time, one cell
    of its map, learns little that holds for a map of 6 x 6. So a square is shown at the least size whose map has
    LEAST_CELLS along a side, at the images' size where there is none below it.

    side: of the squares, pixels; map_shape: (C, H, W) of one square's map; features: its numbers
    """

    def __init__(self, encoder: Encoder, info: DatasetInfo, side: int) -> None:
        super().__init__()
        self.side = side
        low, high = side, max(side, *info.image_size)  # the size is in low .. high; larger sizes have larger maps
        while low < high:
            middle = (low + high) // 2
            shape = map_shape_of(encoder, info.channels, (middle, middle))
            if shape and min(shape[1:]) >= LEAST_CELLS:
                high = middle
            else:
                low = middle + 1
        own = map_shape_of(encoder, info.channels, (low, low))
        self.size: tuple[int, int] = (low, low) if own else info.image_size
        self.map_shape: tuple[int, int, int] = own or encoder.map_shape
        self.features = math.prod(self.map_shape)

    def stretched(self, squares: Tensor) -> Tensor:
        """What the network is shown: squares (..., C, side, side) -> (N, C, *size), N the product of the leading sides."""
        flat = squares.flatten(0, -4)
        if self.size == (self.side, self.side):
            return flat
        return functional.interpolate(flat, self.size, mode="bilinear", align_corners=False)

    def forward(self, encoder: Encoder, squares: Tensor) -> Tensor:
        """squares (..., C, side, side) floats in [0, 1] -> maps (N, *map_shape), N the product of the leading sides."""
        maps = encoder(self.stretched(squares))
        assert isinstance(maps, Tensor)
        return maps
