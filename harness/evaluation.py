"""What an evaluator works on: a private copy of the encoder, its features, the label budget and the training loop.

Features are extracted once per split for all readouts and cached; the test split is opened on first use only.

An evaluator is trusted with arrays, so a determined one can cheat; what goes wrong by itself cannot pass: the encoder is
compared with the one that was handed out, labels come from the budget only, nothing is trained by the lent loop once the
test labels were read, and a test top-1 must be that of the predictions beside it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from harness import fingerprint, pretrain
from harness.augment import hash_seeds, mix, stream_key
from harness.batches import Batches, place
from harness.contracts import (
    Config,
    Dataset,
    DatasetInfo,
    Encoder,
    Evaluation,
    HarnessError,
    LabelBudget,
    Split,
    TrainingOutcome,
)
from harness.mapped import select
from harness.optim import OptimConfig, ScheduleConfig
from harness.step import Mode

PRETRAIN_SAMPLE = 2048  # images that label-free measures and figures look at
EXTRACTION_BATCH = 256


def computing_in(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context in which features of a run of that precision are computed."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def image_digests(images: Tensor) -> set[bytes]:
    """A digest of every decoded image (N, C, H, W) uint8."""
    rows = images.permute(0, 2, 3, 1).reshape(len(images), -1).numpy()
    return {hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows}


def sample_indices(count: int, limit: int, seed: int, salt: str) -> Tensor:
    """`limit` of `count` positions in the order of hash(seed, index), sorted: nested in limit."""
    if limit >= count:
        return torch.arange(count)
    order = torch.argsort(mix(hash_seeds(seed, 0, torch.arange(count)) + stream_key(salt)), stable=True)
    return order[:limit].sort().values


@dataclass
class Material:
    """The decoded data of one command, opened when first asked for and shared by every arm of it."""

    dataset: Dataset
    info: DatasetInfo
    pretrain_images: Tensor
    allow_test: bool
    digest: Callable[[Split], str]
    digests: dict[str, str] = field(default_factory=dict)
    test_overlap: int | None = None
    test_digest: str | None = None  # of the files' bytes; None: closed or absent
    count_overlap: bool = False
    _verified: dict[str, bool] = field(default_factory=dict)
    _placed: Tensor | None = None

    def placed_images(self, device: torch.device) -> Tensor:
        """The pretraining images on `device` where they fit, copied once for all arms; else as they are."""
        if self._placed is None:
            self._placed = place(self.pretrain_images, device)
        return self._placed

    @property
    def has_test(self) -> bool:
        return self.allow_test and self.info.counts.get("test", 0) > 0

    @property
    def has_labels(self) -> bool:
        return self.info.classes is not None

    def verified(self, splits: tuple[str, ...]) -> bool:
        """Whether every file behind these splits is the published one; files are hashed once per command."""
        for name in splits:
            if name not in self._verified:
                self._verified[name] = self.dataset.verified(name)
        return all(self._verified[name] for name in splits)

    def split(self, name: str) -> Split:
        """A decoded split; its digest is taken on the way."""
        if name == "test" and not self.allow_test:
            raise HarnessError("the test split is closed here: nothing may be chosen by looking at it")
        split = self.dataset.split(name)
        if name not in self.digests:
            self.digests[name] = self.digest(split)
            if name == "test" and self.count_overlap:
                known = image_digests(self.pretrain_images)
                if self.has_labels:
                    known |= image_digests(self.dataset.split("train").images)
                self.test_overlap = len(image_digests(split.images) & known)
        return split


@dataclass
class Task:
    """Implements contracts.EvaluationTask for one encoder, evaluator and label budget."""

    encoder: Encoder
    info: DatasetInfo
    seed: int
    device: torch.device
    material: Material
    label_budget: LabelBudget | None
    cache: FeatureCache
    bf16: bool
    state_folder: Path
    on_steps: Callable[[str, int, int, dict[str, float], int, int], None]
    checkpoint_seconds: float
    mode: Mode = "off"
    note: Callable[[str], None] = lambda _: None
    method_settings: Mapping[str, Any] = field(default_factory=dict)
    view_corruptions: tuple[str, ...] = ()
    trains_encoder: bool = True  # as the evaluator declares
    test_labels_read: bool = field(default=False, init=False)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision that the arm was trained in."""
        return computing_in("bf16" if self.bf16 else "fp32", self.device)

    @property
    def has_test(self) -> bool:
        return self.material.has_test

    @property
    def budget(self) -> LabelBudget:
        if self.label_budget is None:
            raise HarnessError(f"data set '{self.info.name}' has no labels; only label-free evaluators can run on it")
        return self.label_budget

    def _indices(self, split: str) -> Tensor:
        if split not in ("train", "test", "pretrain"):
            raise HarnessError(f"an evaluator sees train (its label budget), test and pretrain, not {split!r}")
        if split == "train":
            return torch.from_numpy(np.asarray(self.budget.indices, dtype=np.int64))
        count = len(self.material.pretrain_images if split == "pretrain" else self.material.split(split))
        limit = PRETRAIN_SAMPLE if split == "pretrain" else count
        return sample_indices(count, limit, 0, "sample")

    def _source(self, split: str) -> Tensor:
        return self.material.pretrain_images if split == "pretrain" else self.material.split(split).images

    def features(self, split: str, readout: str) -> Tensor:
        return self.cache.features(self, split, readout)

    def images(self, split: str) -> Tensor:
        return place(select(self._source(split), self._indices(split)), self.device)

    def labels(self, split: str) -> np.ndarray:
        if split not in ("train", "test"):
            raise HarnessError(f"an evaluator sees labels of train (its label budget) and of test, not of {split!r}")
        labels = self.material.split(split).labels
        if labels is None:
            raise HarnessError(f"data set '{self.info.name}' has no labels in its {split} split")
        self.test_labels_read |= split == "test"
        return labels[self._indices(split)].numpy()

    def trainer(
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
        """The one training loop on `images` and `labels`; its states lie under this evaluation's own folder."""
        if self.test_labels_read:
            raise HarnessError("the test labels were read before the training was over: the test split is opened once, at "
                               "the end, or the best epoch would be chosen on it")  # fmt: skip
        if not self.trains_encoder and any(isinstance(part, Encoder) for part in module.modules()):
            raise HarnessError("an evaluator that does not declare trains_encoder = True reads a frozen encoder and trains "
                               "its own head only")  # fmt: skip
        module.to(self.device)
        plan = pretrain.Plan(
            steps, seed, cast(OptimConfig, optim), cast(ScheduleConfig, schedule), self.bf16, self.checkpoint_seconds,
            mode=self.mode,
        )  # fmt: skip
        data = Batches(images, labels, batch_size=min(batch_size, len(images)), seed=seed, device=self.device)

        def log(step: int, means: dict[str, float], executed: int) -> None:
            self.on_steps(key, step, steps, means, executed, data.batch_size)

        done = pretrain.train(module, data, plan, self.state_folder / key.replace("/", "_"), log, self.note)
        losses = tuple((int(point["step"]), point["loss"]) for point in done.curve)
        last = [loss for step, loss in losses if step > steps - max(data.steps_per_epoch, plan.log_every)]
        final = float(np.mean(last)) if last else float("nan")
        return TrainingOutcome(final, losses, done.executed, done.failed_at is None)


class FeatureCache:
    """Features of one encoder, by split and label subset."""

    def __init__(self) -> None:
        self._features: dict[tuple[str, str], dict[str, Tensor]] = {}

    def features(self, task: Task, split: str, readout: str) -> Tensor:
        """(n, D) float32 on the CPU; one pass over the images serves every readout."""
        key = (split, task.budget.sha256 if split == "train" else "")
        if key not in self._features:
            with task.autocast():
                self._features[key] = extract(task.encoder, task._source(split), task._indices(split), task.device)
        return self._features[key][readout]


@torch.inference_mode()
def extract(encoder: Encoder, images: Tensor, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Every readout of images[indices] in eval mode, computed as the caller's autocast says, given in float32:
    {readout: (n, D) on the CPU}."""
    was_training = encoder.training
    encoder.eval()
    parts: dict[str, list[Tensor]] = {name: [] for name in encoder.readouts}
    for chunk in indices.split(EXTRACTION_BATCH):
        rows = images.permute(0, 2, 3, 1).index_select(0, chunk.to(images.device))  # 7 times images[chunk]
        batch = rows.permute(0, 3, 1, 2).to(device)
        feature_map = encoder(batch)
        for name in encoder.readouts:
            parts[name].append(encoder.read(feature_map, name).float().cpu())
    encoder.train(was_training)
    return {name: torch.cat(chunks).clone() for name, chunks in parts.items()}


def private_copy(encoder: Encoder) -> Encoder:
    """A copy for one evaluation, so that none can disturb the next."""
    return copy.deepcopy(encoder).eval()


def check_evaluation(name: str, found: Evaluation, task: Task, encoder: Encoder, weights_sha256: str | None) -> None:
    """Refuse what evaluator `name` found if it cannot be what its rows would say.

    encoder: the pretrained one, of which task.encoder was a private copy; weights_sha256: as its rows record it
    """
    if fingerprint.weights_sha256(task.encoder) != weights_sha256:
        before, buffers = encoder.state_dict(), {key for key, _ in encoder.named_buffers()}
        moved = [key for key, now in task.encoder.state_dict().items() if not torch.equal(now, before[key])]
        what = ", ".join(f"{'buffer' if key in buffers else 'weight'} {key}" for key in moved[:2])
        raise HarnessError(f"evaluator '{name}' changed the encoder that it was given ({what}): its numbers are not of the "
                           "frozen encoder; let it work on a copy in eval mode")  # fmt: skip
    for m in found.measurements:
        paid = len(task.budget.indices) if m.split == "validation" else None
        if paid is not None and m.n_test is not None and m.n_test > paid:
            raise HarnessError(f"evaluator '{name}' validated on {m.n_test:,} images, but its label budget holds {paid:,}: "
                               "a budget pays for its own validation")  # fmt: skip
        predicted = found.predictions.get(m.readout or "network")
        if m.split == "test" and m.metric == "top1" and m.value is not None and predicted is not None:
            right = float(np.mean(np.asarray(predicted) == task.labels("test")))
            if abs(right - m.value) > 0.5 / len(predicted):
                raise HarnessError(f"evaluator '{name}' reports a test top1 of {m.value:.4f}, but its predictions have "
                                   f"{right:.4f}: a number must be of the network that it is recorded for")  # fmt: skip


def describe_budget(budget: LabelBudget | None) -> dict[str, Any]:
    """The part of a budget that is in an eval_id."""
    if budget is None:
        return {}
    return {"labels": budget.spec, "label_seed": budget.label_seed, "fold": budget.fold, "subset": budget.sha256}
