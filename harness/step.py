"""One training step: views, one forward, backward, optimiser, bookkeeping; eager, compiled, or one CUDA graph.

Nothing in a step waits for the device: losses are summed there and read once per log interval (`Step.read`). What
changes between steps (the batch, the step's number, the learning rate) lives in tensors of fixed place, so that the
whole step can be captured once and replayed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness import optim as optimisers
from harness.augment import stream_key
from harness.contracts import Batch, HarnessError, Method

Mode = Literal["off", "graph", "compile", "compile+graph"]
WARM_UP = 3  # eager steps before a capture: kernels are chosen and workspaces made (PyTorch notes, "CUDA graphs")
FALL_BACK: dict[Mode, Mode] = {"compile+graph": "graph", "compile": "off", "graph": "off"}


def resolve_mode(name: str, device: torch.device, why_not: str = "") -> Mode:
    """What `--compile` means here. why_not: a method's reason against capturing, empty if there is none.

    auto: one graph per step on CUDA, where a compiler gains a hundredth at 32 px and loses at 96 px against our own
    kernels (docs/decisions/015); elsewhere off (inductor on a CPU lost 2-13%).
    """
    if name != "auto":
        mode: Any = name
        return {"graph": "off", "compile+graph": "compile"}.get(name, mode) if why_not else mode
    return "off" if device.type != "cuda" or why_not else "graph"


@dataclass(frozen=True)
class StepConfig:
    """How a step is made. accumulate: parts that a batch is taken in, their losses weighted by their sizes."""

    bf16: bool
    clip_norm: float | None = None
    accumulate: int = 1
    mode: Mode = "off"


class Step:
    """Trains `module.loss` by `optimizer`, one call per step. mode: what is really done, after any fall-back."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: StepConfig,
        device: torch.device,
        seed: int,
        note: Callable[[str], None],
    ) -> None:
        self.module, self.optimizer, self.config, self.device = module, optimizer, config, device
        self.seed, self._note = seed, note
        self.mode: Mode = config.mode
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._number = torch.zeros((), dtype=torch.int64, device=device)
        self._progress = torch.zeros((), device=device)
        self._bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._sums: dict[str, Tensor] = {}
        # not the plain loss itself: a bound method of its own would keep a finished step, and its graph's memory, alive
        self._compiled: Callable[..., dict[str, Tensor]] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Batch | None = None

    def __call__(self, batch: Batch, number: int, progress: float, lr: float) -> None:
        """Take step `number` (0-based); progress: the share of the training done after it."""
        self._number.fill_(number)
        self._progress.fill_(progress)
        if self.mode != "off" and self._inputs is None:
            self._prepare(batch, lr)
        optimisers.set_rate(self.optimizer, lr)
        torch.manual_seed(dropout_seed(self.seed, number))
        if self._graph is None:
            self._take(batch)
            return
        assert self._inputs is not None
        _copy(batch, self._inputs)
        self._graph.replay()

    def read(self) -> tuple[dict[str, float], int]:
        """Sums of the losses since the last call, and the first step with a non-finite loss or -1; waits once."""
        values = torch.stack([self._bad.double(), *self._sums.values()]).tolist()
        names = list(self._sums)
        for total in self._sums.values():
            total.zero_()
        return dict(zip(names, values[1:], strict=True)), int(values[0])

    def reset(self) -> None:
        """Forget sums and captures: after weights or optimiser state were replaced, and at the end."""
        self._graph = self._inputs = self._compiled = None
        self._bad.fill_(-1)
        self._sums = {}
        optimisers.release(self.optimizer)

    # ------------------------------------------------------------------------------------------------- the step itself

    def _plain_loss(
        self, images: Tensor, labels: Tensor | None, indices: Tensor, seeds: Tensor, number: Tensor
    ) -> dict[str, Tensor]:
        loss: Any = self.module.loss
        return loss(Batch(images, labels, indices, seeds), number)

    def _take(self, batch: Batch) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for part in _parts(batch, self.config.accumulate):
            share = len(part) / len(batch)
            # a cache of cast weights would outlive the capture; each weight is cast once per forward anyway
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.config.bf16, cache_enabled=self._inputs is None
            ):
                loss = self._compiled or self._plain_loss
                losses = loss(part.images, part.labels, part.indices, part.seeds, self._number)
            (losses["loss"] * share if share < 1 else losses["loss"]).backward()
            for name, value in losses.items():
                value = value.detach().double() * share
                totals[name] = totals[name] + value if name in totals else value
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.optimizer.step()
        if isinstance(self.module, Method):
            self.module.after_step(self._progress)
        first = (self._bad < 0) & ~torch.isfinite(totals["loss"])
        self._bad.copy_(torch.where(first, self._number, self._bad))
        for name, value in totals.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros((), dtype=torch.float64, device=self.device)
            self._sums[name].add_(value)

    # ------------------------------------------------------------------------------------------------------- capturing

    def _prepare(self, batch: Batch, lr: float) -> None:
        """Compile and capture; what fails is announced and done without. The training's state is as before."""
        saved = copy.deepcopy((self.module.state_dict(), self.optimizer.state_dict()))
        while self.mode != "off":
            self._inputs = Batch(*(None if t is None else t.clone() for t in _tensors(batch)))  # type: ignore[arg-type]
            try:
                if "compile" in self.mode:
                    torch._dynamo.reset()  # its limit of recompilations counts over all steps of a process
                    self._compiled = torch.compile(self._plain_loss, dynamic=False)
                self._warm_up(lr, saved)
                if "graph" in self.mode:
                    self._graph = torch.cuda.CUDAGraph()
                    # threads that read batches ahead may allocate and copy meanwhile
                    with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                        self._take(self._inputs)
                    self._rewind(saved)
                return
            except HarnessError:
                raise
            except Exception as error:
                if isinstance(error, torch.OutOfMemoryError) and "graph" not in self.mode:
                    raise  # an eager step needs no less
                reason = " ".join(str(error).split())[:160] or type(error).__name__
                following = FALL_BACK[self.mode]
                self._note(f"--compile {self.mode} failed ({reason}); going on with {following}")
                self.mode = following
                self.reset()
                self.module.load_state_dict(saved[0])
                self.optimizer.load_state_dict(copy.deepcopy(saved[1]))

    def _warm_up(self, lr: float, saved: tuple[dict[str, Any], dict[str, Any]]) -> None:
        """A few steps that leave no trace but memory in its place, on a side stream where a capture follows."""
        assert self._inputs is not None
        stream: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if "graph" in self.mode:
            optimisers.hold(self.optimizer, self.device)
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            stream = torch.cuda.stream(side)
        optimisers.set_rate(self.optimizer, lr)
        with stream:
            for _ in range(WARM_UP):
                self._take(self._inputs)
        if "graph" in self.mode:
            torch.cuda.current_stream(self.device).wait_stream(side)
        self._rewind(saved)

    @torch.no_grad()
    def _rewind(self, saved: tuple[dict[str, Any], dict[str, Any]]) -> None:
        """Weights, buffers, optimiser state and sums as they were, in the tensors that the graph knows."""
        self.module.load_state_dict(saved[0])
        before = saved[1]["state"]
        for key, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):  # what did not exist yet began as zero: momenta, moments, step counts
                    old = before.get(key, {}).get(name)
                    value.zero_() if old is None else value.copy_(old)
        self._bad.fill_(-1)
        for total in self._sums.values():
            total.zero_()


def _tensors(batch: Batch) -> tuple[Tensor | None, ...]:
    return batch.images, batch.labels, batch.indices, batch.seeds


def _copy(source: Batch, target: Batch) -> None:
    for new, place in zip(_tensors(source), _tensors(target), strict=True):
        if place is not None and new is not None:
            place.copy_(new)


def _parts(batch: Batch, parts: int) -> list[Batch]:
    """The batch in parts whose sizes differ by one at most, in order."""
    if parts == 1:
        return [batch]
    split = [[None] * parts if t is None else t.tensor_split(parts) for t in _tensors(batch)]
    return [Batch(*tensors) for tensors in zip(*split, strict=True)]


_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """augment.mix of one number without a tensor: a step should not wait for ten of them."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def dropout_seed(seed: int, step: int) -> int:
    """What the default generator is seeded with before `step`: augment.hash_seeds of (seed, step, "dropout")."""
    return _mix((_mix((_mix(seed & _MASK) + step) & _MASK) + stream_key("dropout")) & _MASK) & 0x7FFF_FFFF_FFFF_FFFF
