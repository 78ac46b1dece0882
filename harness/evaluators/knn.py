"""Weighted k-nearest-neighbour classification by cosine similarity; nothing is fitted and nothing chosen.

The bank is the whole label budget; a neighbour with similarity s votes exp(s / temperature) (Wu et al., 2018, section
3.4). k is `num_neighbours`, clipped to half the labels of the smallest class so that a class cannot be outvoted by its
own lack of images; that is the metric `top1`. A variant with a fixed k has it in its name (`top1_k1`) and is left out
where the bank is smaller. Validation rows use the fit rows as bank. Features are L2-normalised, not standardised.

Ties are settled by position: of equally similar bank images the earlier ones, of equal votes the lower class.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from harness.contracts import Counts, Evaluation, EvaluationTask, Evaluator, Measurement, setting

SIMILARITIES_AT_ONCE = 2**24  # 64 MiB of float32


class KNearestNeighbours(Evaluator):
    """k-nearest neighbours."""

    name = "knn"

    class Config(Evaluator.Config):
        """`eval.knn.*`."""

        num_neighbours: int = setting(20, "k of `top1`, clipped to half the labels of the smallest class", ge=1)
        temperature: float = setting(0.07, "of the votes", source="Wu et al. 2018, section 3.4", gt=0)
        variants: Counts = setting((1,), "further values of k, never clipped, each its own metric `top1_kN`")

    def evaluate(self, task: EvaluationTask) -> Evaluation:
        """Classify by every readout of the encoder: validation by round, then test with the whole budget as bank."""
        device = task.device if task.device.type == "cuda" else torch.device("cpu")
        found = Evaluation([])
        labels = torch.from_numpy(task.labels("train")).to(device)
        banks: dict[str, Tensor] = {}
        for name in task.encoder.readouts:
            features = task.features("train", name).to(device)
            if not bool(torch.isfinite(features).all()):
                found.measurements.append(Measurement(name, "validation", "status", None, status="NONFINITE"))
                continue
            banks[name] = features
            self._validate(name, features, labels, task, found)
        if task.has_test:
            for name, bank in banks.items():
                queries = task.features("test", name).to(device)
                self._test(name, bank, labels, queries, task, found)
        return found

    def _metrics(self, bank_labels: Tensor) -> dict[str, int]:
        """{metric: k} for a bank with these labels."""
        smallest = int(torch.unique(bank_labels, return_counts=True)[1].min())
        metrics = {"top1": max(1, min(self.config.num_neighbours, smallest // 2))}
        return metrics | {f"top1_k{k}": k for k in self.config.variants if 1 <= k <= len(bank_labels)}

    def _validate(self, name: str, features: Tensor, labels: Tensor, task: EvaluationTask, found: Evaluation) -> None:
        top1: dict[str, list[float]] = {}
        count = 0
        for fit, validation in task.budget.rounds:
            bank, held_out = torch.from_numpy(fit), torch.from_numpy(validation)
            count += len(validation)
            metrics = self._metrics(labels[bank])
            predicted = predict(
                features[held_out], features[bank], labels[bank], task.info.num_classes, list(metrics.values()),
                self.config.temperature,
            )  # fmt: skip
            for metric, classes in zip(metrics, predicted, strict=True):
                top1.setdefault(metric, []).append(float((classes == labels[held_out]).double().mean()))
        for metric, values in top1.items():
            found.measurements.append(Measurement(name, "validation", metric, float(np.mean(values)), count))

    def _test(
        self, name: str, bank: Tensor, labels: Tensor, queries: Tensor, task: EvaluationTask, found: Evaluation
    ) -> None:
        targets = torch.from_numpy(task.labels("test")).to(labels.device)
        if not bool(torch.isfinite(queries).all()):
            found.measurements.append(Measurement(name, "test", "status", None, len(targets), status="NONFINITE"))
            return
        metrics = self._metrics(labels)
        found.chosen[f"{name}.k"] = metrics["top1"]
        predicted = predict(
            queries, bank, labels, task.info.num_classes, list(metrics.values()), self.config.temperature
        )
        for metric, classes in zip(metrics, predicted, strict=True):
            top1 = float((classes == targets).double().mean())
            found.measurements.append(Measurement(name, "test", metric, top1, len(targets)))
        found.predictions[name] = predicted[0].cpu().numpy()


def predict(
    queries: Tensor, bank: Tensor, labels: Tensor, num_classes: int, counts: list[int], temperature: float
) -> list[Tensor]:
    """The class of each query for every k in `counts`, from one pass over the similarities.

    queries (Q, D), bank (N, D) float; labels (N,) int64; each k at most N -> per k (Q,) int64
    """
    queries, bank = F.normalize(queries.float(), dim=1), F.normalize(bank.float(), dim=1)
    one_hot = F.one_hot(labels, num_classes).float()
    out: list[list[Tensor]] = [[] for _ in counts]
    for rows in queries.split(max(1, SIMILARITIES_AT_ONCE // len(bank))):
        similarity = rows @ bank.T
        for k, classes in zip(counts, out, strict=True):
            classes.append(_vote(similarity, one_hot, k, temperature).argmax(1))
    return [torch.cat(classes) for classes in out]


def _vote(similarity: Tensor, one_hot: Tensor, k: int, temperature: float) -> Tensor:
    """Votes (Q, K) of the k nearest of similarities (Q, N)."""
    nearest, positions = similarity.topk(k, dim=1)
    last = nearest[:, -1:]
    # exp((s - 1) / T): the factor common to all votes keeps the largest at 1, and changes no winner
    votes = (((nearest - 1) / temperature).exp()[..., None] * one_hot[positions]).sum(1)
    tied = ((similarity >= last).sum(1) > k).nonzero()[:, 0]
    if len(tied):  # topk is free to pick among equals: take the earliest instead
        rows, last = similarity[tied], last[tied]
        closer, equal = rows > last, rows == last
        chosen = closer | (equal & (equal.cumsum(1) <= k - closer.sum(1, keepdim=True)))
        votes[tied] = (((rows - 1) / temperature).exp() * chosen) @ one_hot
    return votes
