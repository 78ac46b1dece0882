"""Fine-tuning: the whole network, the encoder followed by its published classifier, on the label budget.

The learning rate is chosen per arm on validation top-1 (mean over rounds; of equals the lower cross-entropy). A best
rate at the edge of the grid extends it by one more factor, at most `max_extensions` times per side; a best that is
still at an edge is flagged. If the fits at that rate have not converged, the number of steps doubles and the choice is
made again, at most `max_doublings` times: an under-trained arm manufactures wins for the other. The network is then
trained anew on the whole budget, same rate and number of steps, from the same initial weights. At 25 labels per class
or fewer five validation images per class would decide at most, so nothing is chosen: `default_learning_rate` holds for
every arm (the validation row is still measured).

The head's initial weights depend on the task's seed alone. Views: shifts of up to 2 pixels, mirroring where it keeps
the label. `converged`: at the end the network classifies at least 99% of its own training images (unaugmented) right,
or, where the schedule does not force the rate to zero (`constant`, `plateau`), the loss fell by less than 1% from the
last but one tenth of the steps to the last. A cosine's flat end proves nothing, so it does not count.
`fit_loss` is the mean training loss at the end: on the validation rows that of the fits, on the test rows the refit's.

The paper's rule (Hoffer, Hubara & Ailon, 2016, section 5) is learning_rates = [0.01], max_extensions = 0, schedule
`plateau`. Linear probing first (Kumar et al., 2022) is `head_first_steps`.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.augment import shift_and_mirror
from harness.contracts import (
    Batch,
    Encoder,
    Evaluation,
    EvaluationTask,
    Evaluator,
    HarnessError,
    Measurement,
    Positives,
    setting,
)
from harness.mapped import select
from harness.optim import OptimConfig, ScheduleConfig

FEW_LABELS = 25  # per class: protocol, "Evaluations"
SHIFT = 2
EVALUATION_BATCH = 256
SMALLEST_BATCH = 16  # unless there are fewer images: batch norm needs some
CONVERGED_TOP1 = 0.99
CONVERGED_FALL = 0.01


@dataclass(frozen=True)
class Fitted:
    """A trained network with the mean loss at the end of its training (NaN: it diverged)."""

    network: Network
    loss: float
    converged: bool


class FineTune(Evaluator):
    """Fine-tuning."""

    name = "fine_tune"
    trains_encoder = True

    class Config(Evaluator.Config):
        """`eval.fine_tune.*`."""

        learning_rates: Positives = setting((0.01, 0.03, 0.1, 0.3), "tried on validation")
        default_learning_rate: float = setting(
            0.03,
            "at 25 labels per class or fewer",
            source="random_init, convnet_small on scikit-learn's digits (test split, 3, 10 and 25 per class, 3 seeds; "
            "0.01 to 0.3 differ by at most 1.6 points): blind on every data set but that one",
            gt=0,
        )
        max_extensions: int = setting(2, "further rates on each side while the best is at the edge", ge=0)
        epochs: float = setting(12.0, "passes over the labelled images, at least min_steps, at most max_steps", gt=0)
        min_steps: int = setting(300, "fewest steps", ge=1)
        max_steps: int = setting(20_000, "most steps, doublings included", ge=1)
        max_doublings: int = setting(2, "times the steps double while the chosen rate has not converged", ge=0)
        batch_size: int = setting(
            128, "at most; also at most 1/25 of the labelled images, but 16 where there are", ge=1
        )
        weight_decay: float = setting(5e-4, "L2 penalty", ge=0)
        momentum: float = setting(0.9, "Nesterov momentum", ge=0, lt=1)
        schedule: ScheduleConfig = setting(ScheduleConfig(), "learning rate over the steps")
        transfer_depth: int = setting(0, "leading layers of the encoder kept frozen", ge=0)
        head_first_steps: int = setting(0, "steps of the head alone before the whole", source="Kumar et al. 2022", ge=0)

    def check(self, encoder: Encoder) -> None:
        """Refuse to freeze more layers than the encoder has."""
        if self.config.transfer_depth > len(encoder.layers):
            raise HarnessError(
                f"eval.fine_tune.transfer_depth={self.config.transfer_depth}: encoder '{encoder.name}' has "
                f"{len(encoder.layers)} layers ({', '.join(encoder.layers)})"
            )

    def evaluate(self, task: EvaluationTask) -> Evaluation:
        """Choose the rate, refit, and open the test split once, at the end."""
        self.check(task.encoder)
        arm = _Arm(task, self.config)
        rate = arm.choose_rate()
        if task.has_test:
            arm.test(rate)
        return arm.found


class _Arm:
    """One evaluation in progress."""

    def __init__(self, task: EvaluationTask, config: FineTune.Config) -> None:
        self.task, self.config = task, config
        self.images = task.images("train")
        self.labels = torch.from_numpy(task.labels("train"))
        self.found = Evaluation([])
        # Same rate, same number of steps: the refit takes as many as the fits, whose size decides.
        count = len(task.budget.rounds[0][0]) if task.budget.rounds else len(self.labels)
        self.batch_size = min(config.batch_size, max(SMALLEST_BATCH, count // 25), count)
        self.steps = min(max(math.ceil(config.epochs * count / self.batch_size), config.min_steps), config.max_steps)
        self.scores: dict[float, tuple[float, float]] = {}  # rate: (validation top-1, -cross-entropy)
        self.fits: dict[float, tuple[float, bool]] = {}  # rate: (mean fit loss, all converged)

    def choose_rate(self) -> float:
        """The learning rate for the refit; the validation rows go into `found`."""
        rate = self._choose_rate_at_these_steps()
        for _ in range(self.config.max_doublings):
            if rate not in self.fits or self.fits[rate][1] or self.steps == self.config.max_steps:
                break
            self.steps = min(2 * self.steps, self.config.max_steps)
            self.scores, self.fits = {}, {}
            rate = self._choose_rate_at_these_steps()
        if self.task.budget.rounds:
            self._validation_rows(rate)
        return rate

    def _choose_rate_at_these_steps(self) -> float:
        config, budget = self.config, self.task.budget
        few = budget.smallest_class <= FEW_LABELS or not budget.rounds
        rates = [config.default_learning_rate] if few else sorted(set(config.learning_rates))
        if budget.rounds:
            for rate in rates:
                self._validate(rate)
        if not few:
            rates = self._extend(rates)
        best = max(rates, key=lambda rate: self.scores.get(rate, (0.0, 0.0)))
        at_edge = not few and len(rates) > 1 and best in (rates[0], rates[-1])
        self.found.chosen = {"learning_rate": best, "at_edge": at_edge, "tried": rates, "steps": self.steps}
        return best

    def _extend(self, rates: list[float]) -> list[float]:
        """Try further rates beyond the edge where the best is."""
        for side, neighbour in ((0, 1), (-1, -2)):
            for _ in range(self.config.max_extensions if len(rates) > 1 else 0):
                if max(rates, key=self.scores.__getitem__) != rates[side]:
                    break
                further = float(f"{rates[side] ** 2 / rates[neighbour]:.6g}")  # 0.9, not 0.8999999999999999
                self._validate(further)
                rates = sorted([*rates, further])
        return rates

    def _validate(self, rate: float) -> None:
        top1, nll, losses, converged = [], [], [], True
        for number, (fit, validation) in enumerate(self.task.budget.rounds):
            done = self._fit(f"round{number}/lr{rate:g}", torch.from_numpy(fit), rate)
            held_out = torch.from_numpy(validation)
            logits = self._logits(done.network, select(self.images, held_out))
            finite = bool(torch.isfinite(logits).all()) and math.isfinite(done.loss)
            targets = self.labels[held_out]
            top1.append(float((logits.argmax(1) == targets).double().mean()) if finite else 0.0)
            nll.append(float(F.cross_entropy(logits, targets)) if finite else math.inf)
            losses.append(done.loss)
            converged = converged and done.converged
        self.scores[rate] = float(np.mean(top1)), -float(np.mean(nll))
        self.fits[rate] = float(np.mean(losses)), converged

    def _validation_rows(self, rate: float) -> None:
        loss, converged = self.fits[rate]
        count = sum(len(validation) for _, validation in self.task.budget.rounds)
        if not math.isfinite(loss):
            self.found.measurements.append(_not_finite("validation", count))
            return
        self.found.measurements += [
            Measurement(None, "validation", "top1", self.scores[rate][0], count, converged),
            Measurement(None, "validation", "fit_loss", loss, None, converged),
        ]

    def test(self, rate: float) -> None:
        """Refit on the whole budget, then measure on the test split; its rows and predictions go into `found`."""
        done = self._fit(f"refit/lr{rate:g}", torch.arange(len(self.labels)), rate)
        logits = self._logits(done.network, self.task.images("test"))
        targets = torch.from_numpy(self.task.labels("test"))
        if not (bool(torch.isfinite(logits).all()) and math.isfinite(done.loss)):
            self.found.measurements.append(_not_finite("test", len(targets)))
            return
        predicted = logits.argmax(1)
        values = {
            "top1": float((predicted == targets).double().mean()),
            "nll": float(F.cross_entropy(logits.double(), targets)),
            "fit_loss": done.loss,
        }
        for metric, value in values.items():
            count = None if metric == "fit_loss" else len(targets)
            self.found.measurements.append(Measurement(None, "test", metric, value, count, done.converged))
        self.found.predictions["network"] = predicted.numpy()

    def _logits(self, network: Network, images: Tensor) -> Tensor:
        with self.task.autocast():
            return network.logits(images)

    def _fit(self, key: str, rows: Tensor, rate: float) -> Fitted:
        """Train a fresh copy of the network on these positions of the budget."""
        config, task = self.config, self.task
        network = Network(task.encoder, task.info.num_classes, task.info.mirror_keeps_label, task.seed)
        network.to(task.device)
        images, labels = select(self.images, rows), self.labels[rows]
        optim = OptimConfig(
            lr=rate, momentum=config.momentum, nesterov=config.momentum > 0, weight_decay=config.weight_decay
        )
        key = f"fine_tune/steps{self.steps}/{key}"
        stages = [(f"{key}/head", config.head_first_steps, len(task.encoder.layers))] if config.head_first_steps else []
        for name, steps, frozen in [*stages, (key, self.steps, config.transfer_depth)]:
            network.freeze(frozen, images)
            outcome = task.trainer(
                name, network, images, labels.to(task.device), steps=steps, batch_size=self.batch_size,
                seed=task.seed, optim=optim, schedule=config.schedule,
            )  # fmt: skip
            self.found.steps_executed += outcome.executed
            self.found.curves[name] = list(outcome.losses)
        network.eval()
        top1 = float((self._logits(network, images).argmax(1) == labels).double().mean())
        settled = config.schedule.name in ("constant", "plateau") and _settled(outcome.losses)
        converged = outcome.finite and (top1 >= CONVERGED_TOP1 or settled)
        return Fitted(network, outcome.final_loss if outcome.finite else math.nan, converged)


class Network(nn.Module):
    """A deep copy of the encoder and a fresh classifier, trainable by the one training loop."""

    def __init__(self, encoder: Encoder, num_classes: int, mirror: bool, seed: int) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = encoder.classifier(num_classes)
        self.mirror = mirror
        self._frozen: list[nn.Module] = []

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of the batch's views against its labels."""
        assert batch.labels is not None
        views = shift_and_mirror(batch.images, batch.seeds, "fine_tune", SHIFT, self.mirror)
        return {"loss": F.cross_entropy(self.head(self.encoder(views)).float(), batch.labels)}

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> (N, K) float32 on the CPU, in eval mode."""
        self.eval()
        parts = (part.to(self.encoder.mean.device) for part in images.split(EVALUATION_BATCH))
        return torch.cat([self.head(self.encoder(part)).float().cpu() for part in parts])

    def freeze(self, depth: int, images: Tensor) -> None:
        """Keep the first `depth` of `encoder.layers` as they are, batch-norm statistics included; thaw all others.

        What belongs to them is found by running them on two of `images`: parameters that a gradient reaches and
        modules that are called.
        """
        self.encoder.requires_grad_(True)
        self._frozen = []
        if depth == 0:
            return
        self.encoder.eval()
        called: list[nn.Module] = []
        hooks = [
            m.register_forward_hook(lambda module, _, __: called.append(module))
            for m in self.encoder.modules()
            if not list(m.children())
        ]
        output = self.encoder.forward_to(images[:2].to(self.encoder.mean.device), self.encoder.layers[depth - 1])
        for hook in hooks:
            hook.remove()
        self._frozen = called
        if not output.requires_grad:  # layers without parameters
            return
        parameters = list(self.encoder.parameters())
        gradients = torch.autograd.grad(output.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is None)

    def train(self, mode: bool = True) -> Network:
        """Switch modes; frozen modules stay in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self


def _settled(losses: tuple[tuple[int, float], ...]) -> bool:
    """Whether the loss fell by less than CONVERGED_FALL from the last but one tenth of the steps to the last."""
    if len(losses) < 2:
        return False
    steps, values = np.array([s for s, _ in losses], dtype=float), np.array([v for _, v in losses])
    last, before = steps > 0.9 * steps[-1], (steps > 0.8 * steps[-1]) & (steps <= 0.9 * steps[-1])
    if not last.any() or not before.any():
        return False
    return bool(values[last].mean() >= (1 - CONVERGED_FALL) * values[before].mean())


def _not_finite(split: str, count: int) -> Measurement:
    return Measurement(None, split, "status", None, count, status="NONFINITE")  # type: ignore[arg-type]
