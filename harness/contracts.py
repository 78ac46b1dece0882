"""What a plugin must be: Batch, Method, Encoder, Dataset, Evaluator, Row. Names and meaning, no behaviour.

A method is one file in `methods/`, a data set one file in `datasets/`, an evaluator one file in `harness/evaluators/`;
each holds exactly one public subclass of the matching class below and is found by its file name. Shapes use single
letters: B batch, N images, C channels, H W space, D features.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from harness.errors import HarnessError
from harness.rows import Row, Status

# ---------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Range:
    """A numeric search range, both ends included; `log` draws uniformly in the logarithm."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Choice:
    """A finite search range."""

    values: tuple[Any, ...]


Search = Range | Choice


class Config(BaseModel):
    """Frozen, typed settings; an unknown key or a non-finite number is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def setting(default: Any, meaning: str, *, source: str = "", search: Search | None = None, **limits: Any) -> Any:
    """Declare one hyperparameter once: default, meaning, source (authors, year, section) and search range.

    `limits` are pydantic's (`ge`, `gt`, `le`, `lt`). A field without `search` is never varied by `tune`.
    """
    extra: Any = {"source": source, "search": search}
    return Field(default, description=meaning, json_schema_extra=extra, **limits)


Positives = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
Counts = tuple[Annotated[int, Field(ge=1)], ...]
Shares = tuple[Annotated[float, Field(gt=0, lt=1)], ...]


# ------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Batch:
    """What a method sees at one step; everything on the training device.

    images: (B, C, H, W) uint8, channels_last in memory
    labels: (B,) int64, or None: only a method that declares `supervised` ever gets them; -1 marks an unlabelled image of
        one that `sees_unlabelled` as well
    indices: (B,) int64 positions in the pretraining data; a supervised method's among its labelled images, which follow
        the pretraining data for one that `sees_unlabelled` as well
    seeds: (B,) int64 = hash(seed, epoch, index): the only source of randomness (see augment.uniform)
    """

    images: Tensor
    labels: Tensor | None
    indices: Tensor
    seeds: Tensor

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class PublishedFile:
    """One file as its publisher distributes it.

    name: path under the data folder, in torchvision's conventions
    digests: {"md5" | "sha256": hex}; size in bytes where known
    url: https address it is fetched from; None: made by unpacking `archive`
    archive: name of the PublishedFile it comes out of, when it is not fetched itself
    """

    name: str
    digests: Mapping[str, str] = field(default_factory=dict)
    size: int | None = None
    url: str | None = None
    archive: str | None = None


@dataclass(frozen=True)
class DatasetInfo:
    """The facts of one opened data set; sizes and counts are read from the files, never assumed.

    mean, std: per channel, of the training images scaled to [0, 1]
    pretrain_split: what pretraining uses unless told otherwise: split names joined by `+`
    mirror_keeps_label: whether a horizontal flip leaves the class what it is
    """

    name: str
    title: str
    classes: tuple[str, ...] | None
    image_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    counts: Mapping[str, int]
    licence: str
    citation: str
    default_encoder: str
    pretrain_split: str
    mirror_keeps_label: bool

    @property
    def num_classes(self) -> int:
        return len(self.classes or ())


@dataclass(frozen=True)
class Split:
    """images: (N, C, H, W) uint8, channels_last in memory, on the CPU; labels: (N,) int64 or None if there are none."""

    images: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class FileReport:
    """One line of `harness data verify`: state is `published`, `readable, not the published file`, `broken` or `missing`."""

    name: str
    state: Literal["published", "readable, not the published file", "broken", "missing"]
    detail: str = ""


class Dataset(ABC):
    """One data set under one folder. Construction reads nothing; files are opened and verified only when asked.

    root: the data folder (torchvision's conventions below it)
    image_size: asked-for side in pixels; None: the data set's own. A data set of fixed size refuses another one.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    licence: ClassVar[str]
    citation: ClassVar[str]
    default_encoder: ClassVar[str]
    pretrain_split: ClassVar[str] = "train"
    mirror_keeps_label: ClassVar[bool] = False
    caution: ClassVar[str] = ""  # what a leaderboard on it has to say about its reach
    published: ClassVar[tuple[PublishedFile, ...]] = ()
    takes_argument: ClassVar[bool] = False  # `folder:PATH`: the part after the colon arrives as `argument`

    def __init__(self, root: Path, image_size: int | None = None, argument: str | None = None) -> None:
        self.root = root
        self.image_size = image_size
        self.argument = argument

    @property
    @abstractmethod
    def info(self) -> DatasetInfo:
        """Facts read from the files (cached). Must not open the test images."""

    @abstractmethod
    def split(self, name: str) -> Split:
        """Decode `unlabeled`, `train` or `test` (cached). Raises HarnessError naming the file that is missing or broken."""

    @property
    def folds(self) -> tuple[np.ndarray, ...] | None:
        """Index arrays into `train` where the data set defines labelled folds (STL-10's ten), else None."""
        return None

    @abstractmethod
    def verify(self) -> list[FileReport]:
        """Check every file against its published digest, and whether it can be read."""

    def fetch(self, offline: bool = False) -> list[str]:
        """Download what is missing, verified; return one line per file. The default has nothing to fetch."""
        return [f"{self.name}: nothing to fetch"]

    def test_files(self) -> Sequence[Path]:
        """The files behind the test split, so that their bytes can be told apart; none when it is embedded."""
        return ()

    def verified(self, split_expression: str) -> bool:
        """Whether every file behind these splits (`a+b`) is the published one. Embedded data is."""
        return True


# --------------------------------------------------------------------------------------------------------- encoders


@dataclass(frozen=True)
class ReceptiveField:
    """Square input region behind one cell of a map: side and stride in input pixels."""

    side: int
    stride: int


class Encoder(nn.Module, ABC):
    """The network that is kept. Takes uint8 images or floats in [0, 1] and normalises them itself.

    name: what `--encoder` calls it; readouts: names `read` understands, best known first
    mean, std: buffers (1, C, 1, 1), of the pretraining data
    activation_checkpointing: whether a training `forward` should keep activations at its stages' borders only
    """

    name: str
    readouts: tuple[str, ...]
    activation_checkpointing: bool = False
    mean: Tensor
    std: Tensor

    def normalise(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 or float in [0, 1] -> float, per-channel standardised."""
        floats = images.to(self.mean.dtype).div(255) if images.dtype == torch.uint8 else images
        return (floats - self.mean) / self.std

    @property
    @abstractmethod
    def map_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the map that `forward` returns for the image size it was built for."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> feature map (B, C', H', W')."""

    @abstractmethod
    def forward_to(self, images: Tensor, layer: str) -> Tensor:
        """The map after the named layer; `layers` lists the names."""

    def forward_layers(self, images: Tensor, layers: Sequence[str]) -> tuple[Tensor, ...]:
        """The maps after several named layers; encoders that can make them in one pass override this."""
        return tuple(self.forward_to(images, layer) for layer in layers)

    def forward_apart(self, images: Tensor) -> tuple[Tensor, ...]:
        """The maps after all of `layers`, with no gradient from one stage into the one before; the values are those of
        `forward_layers`. Raises HarnessError where the network cannot be taken apart."""
        raise HarnessError(f"encoder {self.name} cannot be taken apart into stages; use one of `harness list encoders`")

    @property
    @abstractmethod
    def layers(self) -> tuple[str, ...]:
        """Names for `forward_to`, input side first."""

    @abstractmethod
    def pool(self, feature_map: Tensor) -> Tensor:
        """Feature map -> (B, D): the vector most methods put a projector on (global average pooling for conv nets)."""

    @abstractmethod
    def read(self, feature_map: Tensor, readout: str) -> Tensor:
        """Feature map -> (B, D) for one of `readouts` (`spatial_pca` is made from `spatial` by the probe)."""

    @abstractmethod
    def classifier(self, num_classes: int) -> nn.Module:
        """What follows the map in the published net: a fresh module from map to (B, num_classes) logits."""

    def receptive_field(self, layer: str | None = None) -> ReceptiveField | None:
        """Of one cell of the final map, or of the named layer's; None where it is not known."""
        return None


# ---------------------------------------------------------------------------------------------------------- methods


class PretrainingData(Protocol):
    """What a method may ask for outside the training loop. Never labels, never the test split."""

    def __len__(self) -> int:
        """How many images are pretrained on; `Batch.indices` are below it."""

    def batches(self, limit: int | None = None) -> Iterator[Batch]:
        """`limit` pretraining images spread evenly (all if None), in index order, augmentation-free, as Batches."""

    def embed(self, function: Callable[[Tensor], Tensor], limit: int | None = None) -> Tensor:
        """Apply `function` (images -> (B, ...)) to those batches without gradients and concatenate on the CPU."""


class Method(nn.Module, ABC):
    """One pretraining method. It never touches devices, precision, optimisers, logging, files, labels or data sets.

    Class attributes (declare what differs from the defaults):
    role: None for a method; "control" or "floor" for what every run is measured beside; "outside" for the one that
        stands for weights made elsewhere
    trains: False when there is nothing to optimise (`loss` is never called)
    views_per_image: encoder inputs made of one image, by default settings; where some of them change it, its Config has
        a property of this name (see `num_views`)
    supervised: True when it is shown labels; then the labelled indices enter its identity
    sees_unlabelled: True when a supervised method learns from the pretraining images as well as from the labelled ones
    graphable: False (with `why_not_graphable`) when a step cannot be captured in a CUDA graph
    tier: "ranked" is carried through every comparison; "ported" runs and is tested, but nobody has run it properly yet
    family, year, idea (one line), source: what lists and tables say of it
    defaults: shared settings this method changes, by dotted key ({"optim.name": "adamw"})
    null_control: name of the registered method that is this one with its information removed
    evaluators: names to run whatever was asked for; None: those asked for
    view_corruptions: corruptions of evaluator `robustness` that its views contain and no setting of it tells
    """

    role: ClassVar[Literal["control", "floor", "outside"] | None] = None
    trains: ClassVar[bool] = True
    views_per_image: ClassVar[int] = 1
    supervised: ClassVar[bool] = False
    sees_unlabelled: ClassVar[bool] = False
    graphable: ClassVar[bool] = True
    why_not_graphable: ClassVar[str] = ""
    tier: ClassVar[Literal["ranked", "ported"]] = "ported"
    family: ClassVar[str] = ""
    year: ClassVar[int]
    idea: ClassVar[str] = ""
    source: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]] = {}
    null_control: ClassVar[str | None] = None
    evaluators: ClassVar[tuple[str, ...] | None] = None
    view_corruptions: ClassVar[tuple[str, ...]] = ()

    class Config(Config):
        """No hyperparameters; a method with some overrides this class."""

    def __init__(self, encoder: Encoder, config: Any, info: DatasetInfo) -> None:
        """Build heads for `encoder`. Raises HarnessError, with the numbers, when config, encoder and data do not fit."""
        super().__init__()
        self.encoder = encoder
        self.config = config

    @classmethod
    def own_encoder(cls, info: DatasetInfo) -> Encoder | None:
        """The encoder of a method that cannot use the data set's default one, else None.

        One of `harness list encoders` (vit_tiny) gives way to another of its kind that is asked for by name; any other
        (pixels, HOG) is no network, and `--encoder` speaks of the controls only.
        """
        return None

    @abstractmethod
    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        """Return {"loss": scalar to minimise, ...scalar monitors}; `step` is a 0-d int64 device tensor."""

    @property
    def num_views(self) -> int:
        """Encoder inputs made of one image by this very instance: settings may add to `views_per_image`."""
        return int(getattr(self.config, "views_per_image", self.views_per_image))

    def after_step(self, progress: Tensor) -> None:
        """Update what is not optimised (momentum teachers, queues); `progress` is a 0-d tensor in [0, 1]."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups of everything trainable; `lr_scale` and `weight_decay` may be given per group."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def prepare(self, data: PretrainingData) -> None:
        """A pass over the data before the first step (or instead of training)."""

    def on_epoch_start(self, data: PretrainingData, epoch: int) -> None:
        """A pass over the data before each epoch (clusters)."""

    def after_training(self, data: PretrainingData) -> None:
        """A pass over the data after the last step: what the encoder is then is kept and measured.

        A killed command repeats it from the trained weights, so it may depend on nothing but them and `data`.
        """

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """What the method really sees of `batch`, for the figures: {"view 1": (B, C, H, W) floats in [0, 1], ...}."""
        return {}

    def diagnostics(self, data: PretrainingData, untrained: Encoder) -> dict[str, float]:
        """Numbers that say what was learnt by the pretext task itself, measured on the trained encoder beside
        `untrained` (same initialisation, batch-norm statistics set); they become rows of evaluator `pretext`."""
        return {}


# ------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class LabelBudget:
    """The labelled images one evaluation may use; the budget pays for its own validation.

    spec: the flag as typed (`all`, `1000`, `0.1`, `10pc`, `folds`); fold: its number under `folds`
    indices: (B,) positions in `train`, in the order of hash(label_seed, index): everything the budget bought
    rounds: (fit, validation) position pairs inside `indices`: one for a hold-out, several for cross-validation,
        none when one image per class leaves nothing to hold out (then fixed defaults are used)
    """

    spec: str
    label_seed: int
    fold: int | None
    indices: np.ndarray
    rounds: tuple[tuple[np.ndarray, np.ndarray], ...]
    sha256: str
    smallest_class: int


@dataclass(frozen=True)
class Measurement:
    """One number an evaluator returns; the runner turns it into a Row. `value` None: see `status`."""

    readout: str | None
    split: Literal["validation", "test", "pretrain"]
    metric: str
    value: float | None
    n_test: int | None = None
    converged: bool | None = None
    status: Status | None = None
    collapsed: bool | None = None


@dataclass
class Evaluation:
    """Everything one evaluator found. predictions: {readout: (n_test,) int64 predicted test labels}; chosen: what
    validation picked ({"gap.strength": 0.01, "gap.at_edge": False}); curves: {name: [(step, value), ...]}."""

    measurements: list[Measurement]
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    steps_executed: int = 0


class Trainer(Protocol):
    """The one training loop, lent to evaluators that optimise a network; resumable under `key`."""

    def __call__(
        self,
        key: str,
        module: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        steps: int,
        batch_size: int,
        seed: int,
        optim: Config,
        schedule: Config,
    ) -> TrainingOutcome:
        """Optimise `module.loss(batch, step)["loss"]` in place for `steps` steps."""


@dataclass(frozen=True)
class TrainingOutcome:
    """final_loss: mean loss over the last epoch; losses: [(step, mean loss)]; executed: steps run by this process."""

    final_loss: float
    losses: tuple[tuple[int, float], ...]
    executed: int
    finite: bool


class EvaluationTask(Protocol):
    """What an evaluator works on. The encoder is a private copy; the test split is opened on first `test` access only.

    encoder: on `device`, in eval mode; trainer: the one training loop; has_test: whether `test` can be asked for
    method_settings: of the method that made the encoder, by dotted name; view_corruptions: what it declares
    """

    encoder: Encoder
    info: DatasetInfo
    seed: int
    device: torch.device
    method_settings: Mapping[str, Any]
    view_corruptions: tuple[str, ...]

    @property
    def trainer(self) -> Trainer: ...

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision in which the encoder was trained and `features` are computed."""

    @property
    def has_test(self) -> bool: ...

    @property
    def budget(self) -> LabelBudget:
        """Raises HarnessError when the data set has no labels."""

    def features(self, split: str, readout: str) -> Tensor:
        """(n, D) float32 on the CPU of `train` (the budget's images, in budget order), `test`, or `pretrain` (a fixed
        sample of pretraining images); extracted once for all readouts and cached."""

    def images(self, split: str) -> Tensor:
        """uint8 (n, C, H, W) of the same images in the same order: on the device if they fit there, else on the CPU."""

    def labels(self, split: str) -> np.ndarray:
        """(n,) int64 of `train` (budget order) or `test`."""


class Evaluator(ABC):
    """(encoder, data set, label budget, seed) -> numbers; never changes the encoder it is given.

    needs_labels: False for label-free ones; trains_encoder: fine-tuning (skipped for encoders without parameters)
    """

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = True
    trains_encoder: ClassVar[bool] = False

    class Config(Config):
        """No settings; an evaluator with some overrides this class."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def check(self, encoder: Encoder) -> None:
        """Refuse settings that do not fit the encoder, before any work. Raises HarnessError with the numbers."""
        return

    @abstractmethod
    def evaluate(self, task: EvaluationTask) -> Evaluation:
        """Measure; validation measurements are made before the refit that the test measurements use."""


__all__ = [
    "Batch", "Choice", "Config", "Counts", "Dataset", "DatasetInfo", "Encoder", "Evaluation", "EvaluationTask", "Evaluator",
    "FileReport", "HarnessError", "LabelBudget", "Measurement", "Method", "Positives", "PretrainingData", "PublishedFile",
    "Range", "ReceptiveField", "Row", "Search", "Sequence", "Shares", "Split", "Status", "Trainer", "TrainingOutcome",
    "setting",
]  # fmt: skip
