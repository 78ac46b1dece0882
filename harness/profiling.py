"""Where a training step's time and memory go: `harness profile`.

The step is the one that trains (harness/step.py) on the method, batches and optimiser that a run would have; only its
borders are watched. A phase is what happens between two of them:

    data       the batch is gathered (and at an epoch's beginning its order drawn)
    views      from the method's `loss` until an encoder is first entered
    forward    inside encoders, a teacher's too
    loss       the rest of `loss`: heads, criterion, monitors
    backward   until the optimiser is entered
    optimiser  its step, and what the method does after it (momentum teachers)
    logging    sums of the losses on the device and, every LOG_EVERY steps, reading them

Times are medians over steps without torch's profiler, which slows small operations down several times; on CUDA they
are times of the device, between events on its stream, and steps are not captured in a graph. The trace is made by
torch's profiler over a few further steps.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from harness import durable, floor, optim
from harness.arms import Arm, Plan, Request, build_method, make_plan, training_batches
from harness.batches import Batches
from harness.contracts import Encoder, HarnessError, Method
from harness.runner import PREPARE_BATCH, numerics
from harness.step import Step, StepConfig

PHASES = ("data", "views", "forward", "loss", "backward", "optimiser", "logging")
WARM_UP, TRACED, LOG_EVERY = 3, 3, 10  # steps


@dataclass(frozen=True)
class Phase:
    """milliseconds: median per step; share: of the sum over phases; peak_bytes: of memory while it lasts, see Profile."""

    name: str
    milliseconds: float
    share: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Profile:
    """One profile. memory: what the phases' peak_bytes are; floor: None where it cannot be counted."""

    method: str
    dataset: str
    encoder: str
    device: str
    precision: str
    num_threads: int | None
    batch_size: int
    steps: int
    phases: tuple[Phase, ...]
    step_milliseconds: float
    images_per_second: float
    floor: floor.Floor | None
    memory: str
    trace: Path

    def facts(self) -> dict[str, Any]:
        """Everything as plain values, for `--json`."""
        least = self.floor
        plain = {key: value for key, value in vars(self).items() if key not in ("phases", "floor", "trace")}
        return plain | {
            "phases": [vars(phase) for phase in self.phases], "trace": str(self.trace),
            "share_of_floor": self.share_of_floor,
            "flops_per_image": least and least.flops, "bytes_per_image": least and least.bytes,
            "floor_seconds_per_image": least and least.seconds,
            "floor_seconds_per_image_without_overlap": least and least.seconds_without_overlap,
            "matmul_flops_per_second": least and least.rates.flops, "copy_bytes_per_second": least and least.rates.bytes,
        }  # fmt: skip

    @property
    def share_of_floor(self) -> float | None:
        return None if self.floor is None else self.images_per_second * self.floor.seconds


def profile(request: Request, steps: int, trace: Path | None) -> Profile:
    """Train the request's method for a few steps and measure them; writes the trace and nothing else.

    trace: where the Chrome trace goes; None: profile-METHOD-DATASET.json in the current folder
    Raises HarnessError when the request cannot be met or the method trains nothing.
    """
    if steps < 1:
        raise HarnessError(f"--steps {steps}: at least one step is needed")
    plan = make_plan(replace(request, control=False, allow_test=False), fetch=True)
    arm = plan.arms[0]
    if not arm.plugin.trains:
        raise HarnessError(f"method '{arm.method}' trains nothing: it has no step to profile")
    trace = trace or Path(f"profile-{arm.method}-{request.dataset.partition(':')[0]}.json")
    if trace.is_dir() or not trace.absolute().parent.is_dir():
        raise HarnessError(f"--trace {trace}: give a file in a folder that exists")
    with numerics(plan):
        torch.set_num_threads(arm.config.num_threads or 1)
        return _measure(plan, arm, steps, trace)


def _measure(plan: Plan, arm: Arm, steps: int, trace: Path) -> Profile:
    device, info, config = plan.device, plan.material.info, arm.config
    method = build_method(arm.method, config, info)
    method = method.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = plan.material.placed_images(device)
    everything = Batches(images, None, batch_size=min(PREPARE_BATCH, len(images)), seed=config.seed, device=device)
    method.prepare(everything)
    method.on_epoch_start(everything, 0)
    data = training_batches(arm, plan.material, device)
    least = floor.find(method, info, arm.batch_size, device, config.precision == "bf16")
    optimizer = optim.build(config.optim, method.train().parameter_groups())
    borders = _Borders(method, optimizer)
    how = StepConfig(config.precision == "bf16", config.optim.clip_norm, config.accumulate)
    step = Step(method, optimizer, how, device, config.seed, lambda text: None)

    def take(number: int) -> None:
        borders.enter("data")
        batch = data.at(number)
        step(batch, number, (number + 1) / max(1, arm.steps), config.optim.lr)
        borders.enter("logging")
        if number % LOG_EVERY == 0:
            step.read()

    for number in range(WARM_UP):
        take(number)
    timer = _Timer(device)
    borders.enter = timer.enter
    for number in range(WARM_UP, WARM_UP + steps):
        timer.begin()
        take(number)
        timer.end()
    borders.enter = _Ranges().enter
    peaks = _trace(take, range(WARM_UP + steps, WARM_UP + steps + TRACED), borders, trace, device)
    medians, whole = timer.milliseconds()
    on_cuda, total = device.type == "cuda", sum(medians.values())
    peaks = timer.peaks if on_cuda else peaks
    return Profile(
        method=arm.method, dataset=config.dataset_name, encoder=arm.encoder, device=device.type,
        precision=config.precision, num_threads=config.num_threads, batch_size=arm.batch_size, steps=steps,
        phases=tuple(Phase(name, medians[name], medians[name] / total, peaks.get(name)) for name in PHASES),
        step_milliseconds=whole, images_per_second=1000 * arm.batch_size / whole, floor=least,
        memory="allocated on the device" if on_cuda else "allocated since the traced steps began", trace=trace,
    )  # fmt: skip


class _Borders:
    """Calls `enter` with the phase that begins. The method and optimiser it is put around are not used otherwise."""

    def __init__(self, method: Method, optimizer: torch.optim.Optimizer) -> None:
        self.enter: Callable[[str], None] = lambda phase: None
        self._depth = 0  # of encoder calls: forward_to is made of forward_layers
        self._in_loss = False  # activation checkpointing enters an encoder once more during the backward pass
        for encoder in [module for module in method.modules() if isinstance(module, Encoder)]:
            for name in ("forward", "forward_to", "forward_layers"):
                setattr(encoder, name, self._of_encoder(getattr(encoder, name)))
        method.loss = self._of_loss(method.loss)  # type: ignore[method-assign]
        method.after_step = self._of_after_step(method.after_step)  # type: ignore[method-assign]
        optimizer.register_step_pre_hook(lambda *_: self.enter("optimiser"))
        optimizer.register_step_post_hook(lambda *_: self.enter("logging"))

    def _of_encoder(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            outermost = self._in_loss and self._depth == 0
            self._depth += 1
            if outermost:
                self.enter("forward")
            out = function(*args, **kwargs)
            self._depth -= 1
            if outermost:
                self.enter("loss")
            return out

        return call

    def _of_loss(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter("views")
            self._in_loss = True
            out = function(*args, **kwargs)
            self._in_loss = False
            self.enter("backward")
            return out

        return call

    def _of_after_step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter("optimiser")
            function(*args, **kwargs)
            self.enter("logging")

        return call


class _Timer:
    """When each phase of each step began; on CUDA by events, which nothing waits for, and with the memory's peaks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, int] = {}
        self._steps: list[list[tuple[str, Any]]] = []

    def begin(self) -> None:
        self._steps.append([])

    def enter(self, phase: str) -> None:
        marks = self._steps[-1]
        if self.device.type != "cuda":
            marks.append((phase, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        if marks:
            over = marks[-1][0]
            self.peaks[over] = max(self.peaks.get(over, 0), torch.cuda.max_memory_allocated(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)
        marks.append((phase, event))

    def end(self) -> None:
        self.enter("end")

    def milliseconds(self) -> tuple[dict[str, float], float]:
        """Median per step of each phase, and of the whole step."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, list[float]] = {phase: [] for phase in PHASES}
        whole = []
        for marks in self._steps:
            spent = dict.fromkeys(PHASES, 0.0)
            for (phase, began), (_, ended) in itertools.pairwise(marks):
                spent[phase] += self._between(began, ended)
            for phase, value in spent.items():
                found[phase].append(value)
            whole.append(self._between(marks[0][1], marks[-1][1]))
        return {phase: statistics.median(values) for phase, values in found.items()}, statistics.median(whole)

    def _between(self, began: Any, ended: Any) -> float:
        return float(began.elapsed_time(ended)) if self.device.type == "cuda" else 1000 * (ended - began)


class _Ranges:
    """Phases as named ranges of torch's profiler."""

    def __init__(self) -> None:
        self._open: record_function | None = None

    def enter(self, phase: str) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
        self._open = record_function(phase) if phase in PHASES else None
        if self._open is not None:
            self._open.__enter__()


def _trace(
    take: Callable[[int], None], numbers: range, borders: _Borders, trace: Path, device: torch.device
) -> dict[str, int]:
    """Write the Chrome trace of steps `numbers`; return the peak of host memory in each phase."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with torch_profile(activities=activities, profile_memory=True) as profiler:
        for number in numbers:
            take(number)
            borders.enter("end")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(raw))
        content = raw.read_bytes()
    durable.write_bytes(trace, content)
    return _host_peaks(json.loads(content)["traceEvents"])


def _host_peaks(events: list[dict[str, Any]]) -> dict[str, int]:
    """The most bytes that torch held at once on the host in each phase, above what it held when the trace began.

    Memory is known by its allocations and frees alone: what was there before has no size, nor its end.
    """
    memory = sorted(
        (event["ts"], event["args"]["Total Allocated"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == 0
    )
    if not memory:
        return {}
    before = memory[0][1] - memory[0][2]
    times = [when for when, _, _ in memory]
    peaks: dict[str, int] = {}
    for event in events:
        if event.get("cat") == "user_annotation" and event.get("name") in PHASES:
            first, last = bisect_left(times, event["ts"]), bisect_right(times, event["ts"] + event["dur"])
            # what was held when the phase began counts too
            held = [total - before for _, total, _ in memory[max(0, first - 1) : last]]
            peaks[event["name"]] = max([peaks.get(event["name"], 0), *held])
    return peaks
