"""Several seeds of one configuration trained as one network with a leading dimension over seeds.

`torch.func.vmap` runs the method's own `loss` over stacked weights, buffers and batches, so that a step is a few large
kernels instead of many small ones; the seeds' losses are added, which leaves each seed the gradient it has alone. Every
seed keeps its own order, views and initialisation, and its result is that of its separate run up to rounding
(docs/decisions/009). What would mix the seeds, or cannot be said in this form, is named by `obstacle`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from harness import pretrain
from harness.batches import Batches
from harness.config import RunConfig
from harness.contracts import Batch, HarnessError, Method

GroupLog = Callable[[int, list[dict[str, float]], int], None]


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0-4` or `3,5,7-9` -> seeds in the order written, each once; ranges include both ends. Raises HarnessError."""
    seeds: list[int] = []
    for word in text.split(","):
        first, dash, last = (part.strip() for part in word.partition("-"))
        numbers = (first, last) if dash else (first,)
        if not all(number.isascii() and number.isdecimal() and len(number) <= 18 for number in numbers):
            raise HarnessError(
                f"--seeds '{text}' is not understood; write a range and single seeds, like 0-4 or 3,5,7-9"
            )
        low, high = int(first), int(numbers[-1])
        if high < low or high - low >= 10_000:
            raise HarnessError(f"--seeds '{text}': a range goes from a seed to a higher one, 10,000 seeds at most")
        seeds += range(low, high + 1)
    return tuple(dict.fromkeys(seeds))


def wins(choice: str, device: torch.device) -> bool:
    """Whether seeds are trained together: `stack_seeds` = on, or auto where benchmarks/seeds.py has measured a gain.

    That is so far on no device: it lost on a CPU and has not been run on CUDA (docs/decisions/009).
    """
    return choice == "on"


def obstacle(method: Method, config: RunConfig) -> str | None:
    """Why seeds of this configuration cannot be trained together; None when they can."""
    if method.supervised:
        return "each seed has its own labelled images"
    if type(method).on_epoch_start is not Method.on_epoch_start:
        return "it looks at the data before each epoch"
    if config.optim.name == "lars":
        return "LARS takes the norm of a whole tensor, which would hold every seed"
    if config.optim.clip_norm is not None:
        return "optim.clip_norm limits the norm of all gradients, which would be every seed's"
    if config.schedule.name == "plateau":
        return "a plateau schedule lowers each seed's rate at its own time"
    if config.accumulate > 1:
        return "accumulate divides a batch along the dimension that holds the seeds"
    if config.activation_checkpointing:
        return "activation checkpointing does not work inside vmap"
    if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in method.modules()):
        return "dropout draws from the default generator, which knows one seed"
    return None


class _Loss(nn.Module):
    """`method.loss` as the forward pass that functional_call wants."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, images: Tensor, indices: Tensor, seeds: Tensor, step: Tensor) -> dict[str, Tensor]:
        before = dict(self.method.named_buffers())
        losses = self.method.loss(Batch(images, None, indices, seeds), step)
        _refuse_replaced(before, self.method)
        return losses


def _refuse_replaced(before: Mapping[str, Tensor], method: Method) -> None:
    """A buffer that was replaced rather than written in place is lost behind functional_call: better no result."""
    for name, buffer in method.named_buffers():
        if before[name] is not buffer:
            raise RuntimeError(f"buffer {name} is replaced, not changed in place")


class _Casts(TorchFunctionMode):
    """What autocast leaves out inside vmap (torch 2.15): convolutions in its precision, batch norm of such tensors."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_autocast_enabled(self.device_type):
            return func(*args, **kwargs)
        if func in (torch.conv1d, torch.conv2d, torch.conv3d):
            low = torch.get_autocast_dtype(self.device_type)
            args = [a.to(low) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        if func is functional.batch_norm and args[0].dtype in (torch.bfloat16, torch.float16):
            return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)


class StackedMethod(Method):
    """S copies of a method with all tensors stacked on dimension 0; the copies' own tensors become views of the stack.

    methods: the same configuration, another seed each; weight_decay: the optimiser's, for groups that name none
    """

    def __init__(self, methods: Sequence[Method], weight_decay: float) -> None:
        nn.Module.__init__(self)
        self.weight_decay = weight_decay
        self._copies = tuple(methods)  # a tuple, so that their tensors are not registered a second time
        self._one = (_Loss(methods[0]),)
        self._names: dict[str, str] = {}  # the method's name of a tensor -> ours
        for name, parameter in methods[0].named_parameters():
            together = torch.stack([m.get_parameter(name).detach() for m in methods])
            self._names[name] = name.replace(".", "/")
            self.register_parameter(self._names[name], nn.Parameter(together, parameter.requires_grad))
            for copy, view in zip(methods, together, strict=True):
                copy.get_parameter(name).data = view
        for name, _ in methods[0].named_buffers():
            together = torch.stack([m.get_buffer(name) for m in methods])
            self._names[name] = name.replace(".", "/")
            self.register_buffer(self._names[name], together)
            for copy, view in zip(methods, together, strict=True):
                path, _, last = name.rpartition(".")
                copy.get_submodule(path)._buffers[last] = view

    def train(self, mode: bool = True) -> StackedMethod:
        for copy in self._copies:
            copy.train(mode)
        super().train(mode)
        return self

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        """The sum of the seeds' losses, and every entry of seed number i as `name/i`; tensors of `batch` are (S, B, ...)."""
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        tensors = {f"method.{name}": own[ours] for name, ours in self._names.items()}

        def one(stack: dict[str, Tensor], images: Tensor, indices: Tensor, seeds: Tensor) -> dict[str, Tensor]:
            out: dict[str, Tensor] = functional_call(self._one[0], stack, (images, indices, seeds, step))
            return out

        with warnings.catch_warnings(), _Casts(batch.images.device.type):
            warnings.filterwarnings("ignore", message="There is a performance drop")  # small integer work only
            found = vmap(one, randomness="error")(tensors, batch.images, batch.indices, batch.seeds)
        each = {f"{name}/{i}": value for name, values in found.items() for i, value in enumerate(values)}
        return {"loss": found["loss"].sum(), **each}

    def after_step(self, progress: Tensor) -> None:
        if type(self._copies[0]).after_step is Method.after_step:
            return
        for copy in self._copies:
            before = dict(copy.named_buffers())
            copy.after_step(progress)
            _refuse_replaced(before, copy)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The method's groups, cut by its own tensors' dimensions: stacked biases are no matrices that decay."""
        ours = {id(p): self.get_parameter(self._names[name]) for name, p in self._copies[0].named_parameters()}
        groups = []
        for group in self._copies[0].parameter_groups():
            decay = group.get("weight_decay", self.weight_decay)
            trained = [p for p in group["params"] if p.requires_grad]
            for matrices, value in ((True, decay), (False, 0.0)):
                params = [ours[id(p)] for p in trained if (p.ndim > 1) == matrices]
                if params:
                    groups.append({**group, "params": params, "weight_decay": value})
        return groups


class StackedBatches(Batches):
    """Each seed's own batch of every step, stacked: images (S, B, C, H, W), indices and seeds (S, B)."""

    def __init__(self, each: Sequence[Batches]) -> None:
        self.each = tuple(each)
        first = self.each[0]
        self.images, self.labels, self.batch_size, self.seed = first.images, None, first.batch_size, first.seed
        self.device, self.steps_per_epoch = first.device, first.steps_per_epoch

    def close(self) -> None:
        for data in self.each:
            data.close()

    def at(self, step: int) -> Batch:
        batches = [data.at(step) for data in self.each]
        return Batch(
            torch.stack([b.images for b in batches]), None, torch.stack([b.indices for b in batches]),
            torch.stack([b.seeds for b in batches]),
        )  # fmt: skip


def train(
    methods: Sequence[Method],
    data: Sequence[Batches],
    plan: pretrain.Plan,
    folder: Path | None,
    on_log: GroupLog,
    note: Callable[[str], None] = lambda _: None,
) -> list[pretrain.Finished]:
    """Train all methods in place as one; resume from `folder`. Seconds of each are its share of the group's.

    methods, data: one of each per seed, on the device; on_log(step, means of each seed, executed)
    A loss that is not finite in any seed ends all of them (`failed_at`): then nobody's result is good. An operation that
    cannot be batched, and one that draws from the default generator, raises RuntimeError.
    """
    count = len(methods)

    def apart(means: Mapping[str, float]) -> list[dict[str, float]]:
        return [{name.removesuffix(f"/{i}"): value for name, value in means.items() if name.endswith(f"/{i}")}
                for i in range(count)]  # fmt: skip

    def log(step: int, means: dict[str, float], executed: int) -> None:
        on_log(step, apart(means), executed)

    together = StackedMethod(methods, plan.optim.weight_decay)
    captured = replace(plan, mode="graph" if "graph" in plan.mode else "off")  # inductor inside vmap: not tried
    done = pretrain.train(together, StackedBatches(data), captured, folder, log, note)
    points = [(point["step"], apart(point)) for point in done.curve]
    curves: list[list[dict[str, float]]] = [[{"step": step, **each[i]} for step, each in points] for i in range(count)]
    return [replace(done, curve=curve, seconds=done.seconds / count) for curve in curves]
