"""One command over several seeds: one after another, or, where it is asked for and possible, trained together.

Every seed keeps its own arms, identities and rows, so all of it is cached and resumed seed by seed. Training together
(harness.stacked) comes first and leaves finished encoders; from there on a seed is evaluated as if it had been alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import torch

from harness import checkpoint, durable, mirror, stacked
from harness.arms import Arm, Plan, Request, build_method, in_group, make_plan
from harness.batches import Batches
from harness.contracts import HarnessError
from harness.runner import ArmRun, Outcome, Reporter, carry_out, numerics, tracked

ONE_BY_ONE = "one_by_one.json"  # why a group was given up; beside its first arm's weights


def with_seeds(request: Request, seeds: Sequence[int] | str) -> list[Request]:
    """One request per seed. Raises HarnessError where `seeds` is malformed or the request names a seed as well."""
    numbers = stacked.parse_seeds(seeds if isinstance(seeds, str) else ",".join(map(str, seeds)))
    for source, where in ((request.layers.flags, "--seed"), (request.layers.overrides, "--set seed")):
        if "seed" in source:
            raise HarnessError(f"--seeds and {where} were both given; name every seed in --seeds")
    layers = request.layers
    return [replace(request, layers=replace(layers, flags={**layers.flags, "seed": n})) for n in numbers]


def make_plans(requests: Sequence[Request], fetch: bool = False) -> Iterator[Plan]:
    """The plan of each seed, the data opened once; arms that will be trained together have the identity of that."""
    first, requests = _first_plan(requests, fetch)
    yield first
    for request in requests[1:]:
        yield make_plan(request, beside=first)


def _first_plan(requests: Sequence[Request], fetch: bool) -> tuple[Plan, Sequence[Request]]:
    first = make_plan(requests[0], fetch)
    if len(requests) > 1 and stacked.wins(first.arms[0].config.stack_seeds, first.device):
        requests = [replace(request, stacked=_numbers(requests)) for request in requests]
        first = make_plan(requests[0], beside=first)
    return first, requests


def _numbers(requests: Sequence[Request]) -> tuple[int, ...]:
    return tuple(int(request.layers.flags["seed"]) for request in requests)


def execute(requests: Sequence[Request], reporter: Reporter) -> Outcome:
    """Do what is missing of every seed and return all rows; a seed that fails does not stop the others.

    Raises HarnessError before anything is written when the first seed's request cannot be met.
    """
    first, requests = _first_plan(requests, fetch=True)
    outcome = Outcome(first, seeds=_numbers(requests))
    plans = [first]
    with tracked(first.request, outcome) as tracker:
        if first.request.stacked is not None:
            plans += [make_plan(request, beside=first) for request in requests[1:]]
            _train_groups(plans, tracker, reporter, outcome)
        for number, request in enumerate(requests):
            known = len(outcome.problems)
            try:  # a plan is made in its turn where it can be: each may hold its own images
                plan = plans[number] if number < len(plans) else make_plan(request, beside=first)
                carry_out(plan, tracker, reporter, outcome)
            except HarnessError as error:
                outcome.problems.append(str(error))
            named = [f"seed {outcome.seeds[number]}: {problem}" for problem in outcome.problems[known:]]
            outcome.problems[known:] = named
    return outcome


# ------------------------------------------------------------------------------------------------ training together


def _train_groups(plans: list[Plan], tracker: mirror.Tracking, reporter: Reporter, outcome: Outcome) -> None:
    """Leave the finished encoders of every arm that can be trained together; the others become arms by themselves."""
    for place, arm in enumerate(plans[0].arms):
        if "stacked" in arm.identity:
            members = [ArmRun(plan, plan.arms[place], tracker, reporter, outcome) for plan in plans]
            with numerics(plans[0]):
                reason = _Group(members, reporter, outcome).train()
            if reason is not None:
                for plan in plans:
                    plan.arms[place] = in_group(plan.arms[place], None)
        elif arm.plugin.trains:
            info = plans[0].material.info
            reason = stacked.obstacle(build_method(arm.method, arm.config, info), arm.config)
        else:
            continue
        if reason is not None:
            reporter.note(f"{arm.method}: seeds are trained one after another: {reason}")


class _Group:
    """One arm of every seed, on the way to their encoders."""

    def __init__(self, members: Sequence[ArmRun], reporter: Reporter, outcome: Outcome) -> None:
        self.members, self.reporter, self.outcome = members, reporter, outcome
        self.arm: Arm = members[0].arm
        self.label = f"{self.arm.method} pretrain, {len(members)} seeds together"

    def train(self) -> str | None:
        """Train what is not finished yet; returns why that cannot be done together, None when it is done."""
        marker = self.members[0].folder / ONE_BY_ONE
        with contextlib.ExitStack() as held:
            for member in self.members:
                held.enter_context(member.locked())
            if known := durable.read_sealed(marker) if marker.exists() else None:
                return str(known["reason"])
            if all((member.folder / "encoder.json").exists() for member in self.members):
                return None
            for member in self.members:
                held.enter_context(member.recorded())
            reason = self._attempt()
            if reason is not None:
                for member in self.members:
                    member.failed = True  # what their journals end with
                durable.write_sealed(marker, {"reason": reason})
            return reason

    def _attempt(self) -> str | None:
        started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
        torch.set_num_threads(self.arm.config.num_threads or 1)
        ready = [member.prepared() for member in self.members]
        # The state lies with the member that is saved last: until then a killed command finds it.
        folder = self.members[-1].folder / "state"
        methods = [method for method, _ in ready]
        try:
            finished = stacked.train(
                methods, self._data(), self.members[0].training_plan(), folder, self._log(), self.reporter.note
            )
        except HarnessError:
            raise
        except Exception as error:  # no memory for all, an operation that has no batched form: alone it may do
            checkpoint.discard(folder)
            return f"together: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if finished[0].failed_at is not None:
            checkpoint.discard(folder)
            return f"a loss was not finite at step {finished[0].failed_at}"
        for member, (method, everything), done in zip(self.members, ready, finished, strict=True):
            if not (member.folder / "encoder.json").exists():
                member.finish(method, everything, done, started, clock)
        return None

    def _data(self) -> list[Batches]:
        """Each seed's order of the images; those that are the same for all seeds are on the device once."""
        out = []
        for member in self.members:
            config, device = member.arm.config, member.plan.device
            images = member.plan.material.placed_images(device)
            out.append(Batches(images, None, batch_size=config.batch_size, seed=config.seed, device=device))
        return out

    def _log(self) -> stacked.GroupLog:
        last = {"time": time.monotonic()}
        count, arm = len(self.members), self.arm

        def log(step: int, means: list[dict[str, float]], executed: int) -> None:
            now = time.monotonic()
            rate = count * executed * arm.batch_size / max(now - last["time"], 1e-9)
            last["time"] = now
            self.outcome.steps_executed += count * executed
            for member, own in zip(self.members, means, strict=True):
                member.journal.steps("pretrain", executed, step)
                member.journal.metrics(step, {f"pretrain.{name}": value for name, value in own.items()})
            over_seeds = {name: sum(own[name] for own in means) / count for name in means[0]}
            self.reporter.training(self.label, step, arm.steps, over_seeds, rate)

        return log
