"""Optimisers and learning-rate schedules shared by pretraining and fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from harness.contracts import Choice, Config, Range, Shares, setting


class OptimConfig(Config):
    """`optim.*`: how the loss is descended."""

    name: Literal["sgd", "adamw", "lars"] = setting("sgd", "optimiser")
    lr: float = setting(
        0.1, "peak learning rate", source="Hoffer et al. 2016, section 5", gt=0, search=Range(1e-3, 1.0, log=True)
    )
    momentum: float = setting(0.9, "momentum of sgd and lars", ge=0, lt=1)
    nesterov: bool = setting(True, "Nesterov momentum (sgd, when momentum > 0)")
    weight_decay: float = setting(
        1e-4, "L2 penalty (decoupled for adamw); biases and norms are exempt", ge=0, search=Range(1e-6, 1e-2, log=True)
    )
    beta1: float = setting(0.9, "adamw: decay of the first moment", ge=0, lt=1)
    beta2: float = setting(0.999, "adamw: decay of the second moment", ge=0, lt=1)
    trust: float = setting(1e-3, "lars: trust coefficient", source="You, Gitman & Ginsburg 2017, section 5", gt=0)
    clip_norm: float | None = setting(None, "largest gradient norm; none: no clipping", gt=0)


class ScheduleConfig(Config):
    """`schedule.*`: the learning rate over a run, as a factor of `optim.lr`."""

    name: Literal["constant", "step", "cosine", "plateau"] = setting(
        "cosine", "shape after warm-up", search=Choice(("step", "cosine"))
    )
    warmup_fraction: float = setting(0.0, "share of the steps with a linear rise from 0", ge=0, lt=1)
    milestones: Shares = setting((0.6, 0.85), "step: shares of the run after which the rate drops")
    gamma: float = setting(
        0.1, "step, plateau: factor of each drop", source="Hoffer et al. 2016, section 5", gt=0, lt=1
    )
    patience: int = setting(5, "plateau: epochs without improvement before a drop", ge=1)
    tolerance: float = setting(1e-3, "plateau: smallest relative fall of the epoch's mean loss that counts", ge=0)
    final: float = setting(0.0, "cosine: factor at the end", ge=0, le=1)


def schedule_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """The factor on `optim.lr` at `step` (0-based) of `steps`; a plateau's own drops come on top."""
    warmup = int(config.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    share = step / max(1, steps)
    if config.name == "step":
        return config.gamma ** sum(share >= milestone for milestone in config.milestones)
    if config.name == "cosine":
        done = (step - warmup) / max(1, steps - warmup)
        return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * done))
    return 1.0


@dataclass
class Plateau:
    """Drops the rate whenever the epoch's mean loss has not fallen for `patience` epochs."""

    config: ScheduleConfig
    factor: float = 1.0
    best: float = math.inf
    waited: int = 0

    def epoch_ended(self, mean_loss: float) -> None:
        if self.config.name != "plateau":
            return
        if mean_loss < self.best - self.config.tolerance * abs(self.best if math.isfinite(self.best) else 0.0):
            self.best, self.waited = mean_loss, 0
            return
        self.waited += 1
        if self.waited >= self.config.patience:
            self.factor, self.waited = self.factor * self.config.gamma, 0

    def state(self) -> dict[str, float]:
        return {"factor": self.factor, "best": self.best, "waited": float(self.waited)}

    def load(self, state: dict[str, float]) -> None:
        self.factor, self.best, self.waited = state["factor"], state["best"], int(state["waited"])


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017, algorithm 1).

    A parameter with at most one dimension (bias, norm) gets plain SGD with momentum, as is usual since.
    """

    def __init__(
        self, params: Any, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 1e-3
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; `closure`, if given, is called first and its loss returned."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad + group["weight_decay"] * p
                if p.ndim > 1:
                    weight_norm, update_norm = p.norm(), update.norm()
                    ratio = group["trust"] * weight_norm / update_norm
                    update = update * torch.where((weight_norm > 0) & (update_norm > 0), ratio, torch.ones_like(ratio))
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(update)
                if isinstance(group["lr"], Tensor):
                    p.sub_(group["lr"] * state["momentum"])
                else:
                    p.add_(state["momentum"], alpha=-group["lr"])
        return loss


def split_decay(groups: Iterable[dict[str, Any]], weight_decay: float) -> list[dict[str, Any]]:
    """Exempt parameters of at most one dimension (biases, norms) from weight decay, group by group."""
    out = []
    for group in groups:
        decay = group.get("weight_decay", weight_decay)
        common = {key: value for key, value in group.items() if key not in ("params", "weight_decay")}
        params: list[Tensor] = [p for p in group["params"] if p.requires_grad]
        for selected, value in (([p for p in params if p.ndim > 1], decay), ([p for p in params if p.ndim <= 1], 0.0)):
            if selected:
                out.append({**common, "params": selected, "weight_decay": value})
    return out


def build(config: OptimConfig, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser over `groups` (see Method.parameter_groups); `lr_scale` of a group is kept for `set_rate`."""
    params = split_decay(groups, config.weight_decay)
    for group in params:
        group.setdefault("lr_scale", 1.0)
    if config.name == "adamw":
        return torch.optim.AdamW(params, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
    if config.name == "lars":
        return Lars(params, lr=config.lr, momentum=config.momentum, trust=config.trust)
    nesterov = config.nesterov and config.momentum > 0
    return torch.optim.SGD(params, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, times its `lr_scale`; in place where a graph reads it from a tensor."""
    for group in optimizer.param_groups:
        rate = lr * group["lr_scale"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def hold(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Keep rates and step counts in tensors on `device`, so that a captured step can be replayed with other rates."""
    for group in optimizer.param_groups:
        group["lr"] = torch.full((), float(group["lr"]), device=device)
        if "capturable" in group:
            group["capturable"] = True
    # the steps that warm a capture up run outside of it, and are meant to
    optimizer._warned_capturable_if_run_uncaptured = True


def release(optimizer: torch.optim.Optimizer) -> None:
    """Undo `hold`."""
    for group in optimizer.param_groups:
        group["lr"] = float(group["lr"])
        if "capturable" in group:
            group["capturable"] = False
