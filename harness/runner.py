"""run(config) -> rows: pretrain, evaluate, record; resumable at every arrow.

One command is a list of arms (the method, its null control, the controls and floors) times evaluations. Everything
finished is found by its identity and not done again; a row file is written only after what it speaks of is safe.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import nn

from harness import (
    __version__,
    checkpoint,
    durable,
    fingerprint,
    floor,
    mirror,
    pretrain,
    provenance,
    records,
    registry,
    runs,
)
from harness import transfer as transfers
from harness import weights as weights_of
from harness.allocator import keep_freed_memory
from harness.arms import (
    Arm,
    Cell,
    Plan,
    Request,
    build_encoder,
    build_method,
    cells,
    environment,
    failure_id,
    in_group,
    make_plan,
    pretext_id,
    training_batches,
)
from harness.batches import Batches
from harness.config import Layers, dotted, load_recipe
from harness.contracts import Encoder, Evaluation, HarnessError, Measurement, Method, Row, Status
from harness.encoders import set_batch_norm_statistics
from harness.evaluation import FeatureCache, Task, check_evaluation, private_copy
from harness.run_figures import log_evaluation_figures, log_pretraining_figures
from harness.step import Mode

if TYPE_CHECKING:
    import pandas as pd

Module = TypeVar("Module", bound=nn.Module)
PREPARE_BATCH = 256  # of passes over the data outside training; fixed, because batch-norm statistics depend on it


open_journals: list[Any] = []  # of this process: what a process that must end at once can still close


class Reporter(Protocol):
    """What a run tells whoever watches: the CLI draws it, the Python API is silent."""

    def arm_started(self, arm: Arm, number: int, total: int) -> None: ...
    def training(
        self, label: str, step: int, steps: int, means: Mapping[str, float], images_per_second: float
    ) -> None: ...
    def evaluating(self, arm: Arm, cell: Cell) -> None: ...
    def note(self, text: str) -> None: ...


class Silent:
    """Nobody watches."""

    def arm_started(self, arm: Arm, number: int, total: int) -> None:
        return

    def training(self, label: str, step: int, steps: int, means: Mapping[str, float], images_per_second: float) -> None:
        return

    def evaluating(self, arm: Arm, cell: Cell) -> None:
        return

    def note(self, text: str) -> None:
        return


@dataclass
class Outcome:
    """Rows of every arm, cached ones included; problems: one line per arm that did not finish; what MLflow is owed.

    seeds: of a command over several, whose first plan this is
    """

    plan: Plan
    seeds: tuple[int, ...] = ()
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    owed: mirror.Owed = field(default_factory=mirror.Owed)
    steps_executed: int = 0


def execute(request: Request, reporter: Reporter | None = None, plan: Plan | None = None) -> Outcome:
    """Do what is missing of a request and return all its rows.

    Raises HarnessError before anything is written when the request cannot be met.
    """
    reporter = reporter or Silent()
    plan = plan or make_plan(request, fetch=True)
    _leave_groups(plan)
    outcome = Outcome(plan)
    with tracked(request, outcome) as tracker:
        carry_out(plan, tracker, reporter, outcome)
    return outcome


def _leave_groups(plan: Plan) -> None:
    """Controls by themselves, where the seeds that are measured again were trained together without these controls."""
    for place, arm in enumerate(plan.arms[1:], 1):
        folder = runs.checkpoint_folder(plan.request.workspace, arm.pretrain_id)
        if "stacked" in arm.identity and checkpoint.load_encoder(folder) is None:
            plan.arms[place] = in_group(arm, None)


def carry_out(plan: Plan, tracker: mirror.Tracking, reporter: Reporter, outcome: Outcome) -> None:
    """Do what is missing of one plan, arm by arm; `latest` is its first arm from then on."""
    with numerics(plan):
        for number, arm in enumerate(plan.arms, 1):
            torch.set_num_threads(arm.config.num_threads or 1)
            reporter.arm_started(arm, number, len(plan.arms))
            run = ArmRun(plan, arm, tracker, reporter, outcome)
            with run.locked():
                run.run()
    main = plan.arms[0]
    durable.write_sealed(plan.request.workspace / ".harness" / "latest.json", {"pretrain_id": main.pretrain_id})


@contextlib.contextmanager
def tracked(request: Request, outcome: Outcome) -> Iterator[mirror.Tracking]:
    """The tracking of one command; what it could not deliver in time is left in `outcome.owed`."""
    tracker = mirror.Tracking(request.workspace, request.tracking)
    tracker.start()
    clean = False
    try:
        yield tracker
        clean = True
    finally:
        # after an interrupt there is little time: what is not delivered stays in the journal for `harness sync`
        outcome.owed = tracker.close(30.0) if clean else tracker.close(4.0, leave=True)


@contextlib.contextmanager
def numerics(plan: Plan) -> Iterator[None]:
    """Threads and determinism of a run, put back afterwards."""
    if plan.device.type == "cpu":
        keep_freed_memory()
    threads = torch.get_num_threads()
    torch.backends.cudnn.allow_tf32 = False  # fp32 in a row means fp32
    tried = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not plan.request.deterministic  # shapes are fixed: let it find the fastest kernels
    if plan.request.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = tried


class ArmRun:
    """Carries one arm from its configuration to its rows."""

    def __init__(self, plan: Plan, arm: Arm, tracker: mirror.Tracking, reporter: Reporter, outcome: Outcome) -> None:
        self.plan, self.arm, self.tracker, self.reporter, self.outcome = plan, arm, tracker, reporter, outcome
        self.workspace = plan.request.workspace
        self.folder = runs.checkpoint_folder(self.workspace, arm.pretrain_id)
        self.journal: Any = None
        self.cache = FeatureCache()
        self.failed = False
        self.on_epoch: Callable[[Encoder, int], None] | None = None  # sees the encoder in training after whole epochs

    def locked(self) -> contextlib.AbstractContextManager[object]:
        """Hold the arm against other local processes."""
        lock = self.workspace / ".harness" / "locks" / f"{self.arm.pretrain_id}.lock"
        return durable.locked(
            lock, lambda: self.reporter.note("another process is at work on this arm; waiting for it")
        )

    def run(self) -> None:
        todo = []
        own: list[Cell | None] = [None] if self.arm.origin is None else []  # else told by its own run
        for cell in [*own, *cells(self.arm, self.plan)]:
            eval_id = cell.eval_id if cell else pretext_id(self.arm.pretrain_id)
            rows = records.read(records.rows_path(self.workspace, self.arm.pretrain_id, eval_id))
            if rows is None or rows[0].status in ("INTERRUPTED", "OUT_OF_MEMORY", "FAILED"):
                todo.append(cell)
            else:
                self.outcome.rows += [row for row in rows if row.metric != "status" or row.status != "FINISHED"]
                if cell is None and any(row.status == "NONFINITE" for row in rows):
                    self.failed = True
                    self.outcome.problems.append(
                        f"{self.arm.method}: the loss was not finite at step {rows[0].steps}; not retried"
                    )
                    return
        if todo:
            with self.recorded(), self._failures_become_rows():
                self._work(todo)
                records.rows_path(self.workspace, self.arm.pretrain_id, self._failure_id()).unlink(missing_ok=True)

    def _work(self, todo: list[Cell | None]) -> None:
        encoder, facts = self.pretrained()
        if None in todo:
            self._record_pretraining(facts)
        if facts["status"] != "FINISHED":
            return
        for cell in todo:
            if cell is not None:
                self.reporter.evaluating(self.arm, cell)
                self.evaluate(cell, encoder, facts)

    # ------------------------------------------------------------------------------------------------ pretraining

    def pretrained(self) -> tuple[Encoder, dict[str, Any]]:
        """The arm's encoder, loaded if it was finished before, else trained now; on the device, in eval mode."""
        saved, origin = checkpoint.load_encoder(self.folder), self.arm.origin
        if saved is None:
            return self._pretrain()
        info = self.plan.material.info if origin is None else origin.info
        encoder = build_encoder(self.arm.method, self.arm.config, info)
        tensors, facts = saved
        encoder.load_state_dict(tensors)
        return _placed(encoder, self.plan.device).eval(), facts

    def _pretrain(self) -> tuple[Encoder, dict[str, Any]]:
        arm = self.arm
        if arm.origin is not None:
            raise HarnessError(f"the weights of run {arm.pretrain_id} are gone; run its command again")
        if "stacked" in arm.identity:
            seeds = ",".join(map(str, arm.identity["stacked"]))
            raise HarnessError(f"{arm.method} was trained together with seeds {seeds} and its weights are gone; run its "
                               f"command again (--seeds {seeds} --stack-seeds on)")  # fmt: skip
        started, clock = _now(), time.monotonic()
        method, everything = self.prepared()
        done = self._train(method) if arm.plugin.trains else None
        return self.finish(method, everything, done, started, clock)

    def prepared(self) -> tuple[Method, Batches]:
        """The arm's method before its first step, on the device, and the pretraining data in index order."""
        arm, device, info = self.arm, self.plan.device, self.plan.material.info
        method = _placed(build_method(arm.method, arm.config, info), device)
        if arm.plugin.role == "outside":
            weights = self.plan.request.weights
            assert weights is not None
            weights_of.adopt(method.encoder, weights_of.read_weights(weights), weights)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        images = self.plan.material.placed_images(device)
        everything = Batches(
            images, None, batch_size=min(PREPARE_BATCH, len(images)), seed=arm.config.seed, device=device
        )
        method.prepare(everything)
        return method, everything

    def finish(
        self, method: Method, everything: Batches, done: pretrain.Finished | None, started: str, clock: float
    ) -> tuple[Encoder, dict[str, Any]]:
        """Save a pretrained encoder with its facts. started, clock: when work on it began, by the calendar and by
        time.monotonic(); done: None for what trains nothing."""
        arm, device = self.arm, self.plan.device
        facts: dict[str, Any] = {"status": "FINISHED", "steps": 0, "images_seen": 0, "images_per_second": None}
        curve: list[dict[str, float]] = []
        if done is not None:
            curve = done.curve
            steps = arm.steps if done.failed_at is None else done.failed_at
            facts = {
                "status": "FINISHED" if done.failed_at is None else "NONFINITE", "steps": steps,
                "images_seen": steps * arm.batch_size,
                "images_per_second": steps * arm.batch_size / done.seconds if done.seconds else None, "compile": done.mode,
            }  # fmt: skip
            clock = time.monotonic() - done.seconds
            if done.failed_at is None:
                method.after_training(everything)
        method.eval()
        facts |= {
            "views_seen": facts["images_seen"] * method.num_views, "device_seconds": time.monotonic() - clock,
            "peak_memory_bytes": provenance.peak_memory_bytes(device), "started_at": started, "finished_at": _now(),
            "curve": curve, **provenance.code_state(),
        }  # fmt: skip
        facts["weights_sha256"] = fingerprint.weights_sha256(method.encoder)
        facts["share_of_floor"] = self._share_of_floor(method, facts["images_per_second"])
        facts["pretext"] = self._diagnose(method, everything, facts)
        log_pretraining_figures(self.journal, self.folder, arm, method, everything, curve)
        self._save(method.encoder, facts)
        return method.encoder, facts

    def _share_of_floor(self, method: Method, images_per_second: float | None) -> float | None:
        arm, info = self.arm, self.plan.material.info
        if images_per_second is None:
            return None
        least = floor.find(method, info, arm.batch_size, self.plan.device, arm.config.precision == "bf16")
        return None if least is None else images_per_second * least.seconds

    def training_data(self) -> Batches:
        """What the arm is trained on, in the order of its steps."""
        return training_batches(self.arm, self.plan.material, self.plan.device)

    def _train(self, method: Method) -> pretrain.Finished:
        arm, device, data, look = self.arm, self.plan.device, self.training_data(), self.on_epoch
        if data.placement != "resident":
            self.reporter.note(f"{len(data):,} images do not fit on the device: {data.placement} (docs/decisions/008)")
        if device.type == "cuda" and not arm.plugin.graphable:
            self.reporter.note(f"{arm.method}: steps are not captured in a graph: {arm.plugin.why_not_graphable}")
        return pretrain.train(
            method,
            data,
            self.training_plan(),
            self.folder / "state",
            self._logger("pretrain", arm.steps, arm.batch_size),
            self.reporter.note,
            None if look is None else lambda epoch: look(method.encoder, epoch),
        )

    def training_plan(self) -> pretrain.Plan:
        """How the arm is trained."""
        arm, bf16 = self.arm, self.arm.config.precision == "bf16"
        return pretrain.Plan(
            arm.steps, arm.config.seed, arm.config.optim, arm.config.schedule, bf16, self.plan.request.checkpoint_seconds,
            arm.config.accumulate, cast(Mode, arm.config.compile),
        )  # fmt: skip

    def _logger(
        self, phase: str, steps: int, batch_size: int, clock: dict[str, float] | None = None
    ) -> pretrain.LogFunction:
        """clock: when something was logged last, shared by trainings that follow one another"""
        last = {"time": time.monotonic()} if clock is None else clock

        def log(step: int, means: dict[str, float], executed: int) -> None:
            now = time.monotonic()
            rate = executed * batch_size / max(now - last["time"], 1e-9)
            last["time"] = now
            self.outcome.steps_executed += executed
            self.journal.steps(phase, executed, step)
            self.journal.metrics(step, {f"{phase}.{name}": value for name, value in means.items()})
            self.reporter.training(f"{self.arm.method} {phase}", step, steps, means, rate)

        return log

    def _diagnose(self, method: Method, everything: Batches, facts: dict[str, Any]) -> dict[str, float | None]:
        """What the method says of its own pretext task, beside an untrained encoder with set batch-norm statistics."""
        arm, info = self.arm, self.plan.material.info
        if facts["status"] != "FINISHED" or type(method).diagnostics is Method.diagnostics:
            return {}
        untrained = _placed(build_encoder(arm.method, arm.config, info), self.plan.device)
        set_batch_norm_statistics(untrained, everything.batches(64 * PREPARE_BATCH))
        values = method.diagnostics(everything, untrained.eval())
        return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}

    def _save(self, encoder: Encoder, facts: dict[str, Any]) -> None:
        layers = self.plan.request.layers
        asked = {
            "recipes": [vars(recipe) for recipe in layers.recipes],
            "flags": layers.flags,
            "overrides": layers.overrides,
        }
        stored = {**facts, "config": dotted(self.arm.config), "identity": self.arm.identity, "method": self.arm.method,
                  "dataset": self.plan.request.dataset, "pretrain_id": self.arm.pretrain_id, "layers": asked,
                  "info": asdict(self.plan.material.info)}  # fmt: skip
        checkpoint.save_encoder(self.folder, encoder.state_dict(), stored)
        checkpoint.discard(self.folder / "state")

    def _record_pretraining(self, facts: dict[str, Any]) -> None:
        """Commit what the pretext task says, or how the pretraining ended; from the saved facts, so that a kill between
        the weights and these rows loses nothing."""
        status: Status = facts["status"]
        if status != "FINISHED":
            self.failed = True
            self.outcome.problems.append(
                f"{self.arm.method}: the loss was not finite at step {facts['steps']}; the weights before it are kept"
            )
        found = [Measurement(None, "pretrain", name, value) for name, value in facts["pretext"].items()]
        found = found or [Measurement(None, "pretrain", "status", None)]
        rows = [self._row(m, None, facts, pretext_id(self.arm.pretrain_id), status) for m in found]
        records.write(self.workspace, rows)
        self._publish(rows)

    def _failure_id(self) -> str:
        arm = self.arm
        return failure_id(arm.pretrain_id, None if arm.origin is None else self.plan.dataset_name)

    # ------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, cell: Cell, encoder: Encoder, facts: dict[str, Any]) -> None:
        """Run one evaluator on one budget and commit its rows."""
        arm, plan = self.arm, self.plan
        evaluator = registry.load_evaluator(cell.evaluator)(arm.config.eval[cell.evaluator])
        states = self.folder / cell.eval_id
        phase = (
            cell.evaluator
            if cell.budget is None or cell.budget.fold is None
            else f"{cell.evaluator}.fold{cell.budget.fold}"
        )
        loggers: dict[str, pretrain.LogFunction] = {}
        logged = {"time": time.monotonic()}

        def on_steps(key: str, step: int, steps: int, means: dict[str, float], executed: int, batch: int) -> None:
            if key not in loggers:
                loggers[key] = self._logger(f"{phase}.{key.partition('/')[2]}", steps, batch, logged)
            loggers[key](step, means, executed)

        task = Task(
            private_copy(encoder), plan.material.info, arm.config.seed, plan.device, plan.material, cell.budget,
            self.cache, arm.config.precision == "bf16", states, on_steps, plan.request.checkpoint_seconds,
            # a fit of minutes does not earn a compilation back
            "graph" if "graph" in arm.config.compile else "off", self.reporter.note,
            {k.removeprefix("method."): v for k, v in dotted(arm.config).items() if k.startswith("method.")},
            arm.plugin.view_corruptions,
            trains_encoder=evaluator.trains_encoder,
        )  # fmt: skip
        started, clock = _now(), time.monotonic()
        result: Evaluation = evaluator.evaluate(task)
        check_evaluation(cell.evaluator, result, task, encoder, facts["weights_sha256"])
        timing = {"started_at": started, "finished_at": _now(), "device_seconds": time.monotonic() - clock}
        found = result.measurements
        supervised_here = arm.plugin.supervised and arm.origin is None
        if supervised_here and cell.budget is not None and len(cell.budget.rounds) > 1:
            # under cross-validation it has trained on every validation image: those numbers would be leaks
            found = [m for m in found if m.split != "validation"]
        rows = [self._row(m, cell, facts | timing, cell.eval_id, "FINISHED") for m in found]
        log_evaluation_figures(self.journal, self.folder, arm, cell, task, result, plan.dataset_name)
        records.write(self.workspace, rows, result.chosen, result.predictions)
        checkpoint.discard(states)
        self._publish(rows)

    def _publish(self, rows: list[Row]) -> None:
        self.outcome.rows += [row for row in rows if row.metric != "status" or row.status != "FINISHED"]
        self.journal.rows([row.model_dump(mode="json") for row in rows])

    def _row(self, m: Measurement, cell: Cell | None, facts: Mapping[str, Any], eval_id: str, status: Status) -> Row:
        arm, plan, budget, origin = self.arm, self.plan, cell.budget if cell else None, self.arm.origin
        if (
            arm.plugin.supervised and origin is None
        ):  # one arm per budget: its label-free rows are told apart by it as well
            budget = arm.budgets[0]
        settings = dotted(arm.config) | ({"compile": facts["compile"]} if "compile" in facts else {})  # as it was done
        keep = {
            k: v
            for k, v in settings.items()
            if not k.startswith("eval.") or (cell and k.startswith(f"eval.{cell.evaluator}."))
        }
        if "stacked" in arm.identity:
            keep["stacked_seeds"] = arm.identity["stacked"]
        opened = sorted(arm.identity["data"])
        if origin is not None:  # label-free measures look at the pretraining images of what they are made on
            opened = [] if budget else sorted(set(plan.material.digests) - {"test"})
        opened += (["train"] if budget else []) + (["test"] if m.split == "test" else [])
        digests = {name: plan.material.digests[name] for name in dict.fromkeys(opened)}
        verified = plan.material.verified(tuple(digests))
        if origin is not None:
            digests |= {f"{origin.dataset}:{name}": digest for name, digest in arm.identity["data"].items()}
            verified = verified and origin.verified
        codes = [arm.identity["code"]]
        if cell:
            codes.append(fingerprint.code_sha256(registry.load_evaluator(cell.evaluator)))
        finite = m.value is not None
        return Row(
            method=arm.method, config=keep, dataset=plan.dataset_name, data_sha256=fingerprint.digest(digests),
            data_verified=verified,
            test_overlap=plan.material.test_overlap if m.split == "test" else None,
            pretrain_data=(arm.config.data.pretrain_split or "") if origin is None else origin.pretrain_data,
            encoder=arm.encoder, pretrain_id=arm.pretrain_id,
            eval_id=eval_id, seed=arm.config.seed, label_seed=budget.label_seed if budget else None,
            labels=budget.spec if budget else None, fold=budget.fold if budget else None,
            label_subset_sha256=budget.sha256 if budget else None, evaluator=cell.evaluator if cell else "pretext",
            readout=m.readout, split=m.split, metric=m.metric if finite else "status", value=m.value, n_test=m.n_test,
            steps=facts["steps"], images_seen=facts["images_seen"], views_seen=facts["views_seen"],
            device_seconds=facts["device_seconds"], device=plan.device.type, precision=arm.config.precision,
            num_threads=arm.config.num_threads or 0, deterministic=plan.request.deterministic,
            torch_version=facts["torch_version"], harness_version=__version__, git_commit=facts["git_commit"],
            git_dirty=facts["git_dirty"], code_sha256=fingerprint.digest(codes),
            numbers_version=fingerprint.NUMBERS_VERSION, started_at=facts["started_at"],
            finished_at=facts["finished_at"], status=m.status or status, collapsed=m.collapsed, converged=m.converged,
            weights_sha256=facts["weights_sha256"], images_per_second=facts["images_per_second"],
            share_of_floor=facts.get("share_of_floor"),
            peak_memory_bytes=facts["peak_memory_bytes"],
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------ bookkeeping

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Open the arm's journal and end it truthfully, whatever happens in between."""
        arm, info = self.arm, self.plan.material.info if self.arm.origin is None else self.arm.origin.info
        self.journal = self.tracker.open(
            arm.pretrain_id, name=f"{arm.method}-{arm.config.dataset_name}-s{arm.config.seed}",
            params={key: str(value) for key, value in dotted(arm.config).items()},
            tags={"method": arm.method, "role": arm.role, "dataset": arm.config.dataset_name, "encoder": arm.config.encoder.name,
                  "seed": str(arm.config.seed)},
            config=dotted(arm.config), environment=environment(),
            datasets=[{"name": f"{info.name}/{split}", "digest": digest, "context": "pretraining"}
                      for split, digest in arm.identity["data"].items()],
            parent=self.plan.request.parent if arm is self.plan.arms[0] else self.plan.arms[0].pretrain_id,
        )  # fmt: skip
        status = "INTERRUPTED"
        open_journals.append(self.journal)
        try:
            yield
            status = "FAILED" if self.failed else "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            open_journals.remove(self.journal)
            self.journal.end(status)

    @contextlib.contextmanager
    def _failures_become_rows(self) -> Iterator[None]:
        """An arm that fails leaves a status row and lets the others run; a caller's mistake still ends the command."""
        try:
            yield
        except HarnessError:
            raise
        except Exception as error:
            words = ("not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
            memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(w in str(error) for w in words)
            log = self.folder / "error.txt"
            durable.write_bytes(log, traceback.format_exc().encode())
            advice = (
                "lower it with --set batch_size=N, or try --set activation_checkpointing=true"
                if memory
                else f"the traceback is in {log}"
            )
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self._record_failure("OUT_OF_MEMORY" if memory else "FAILED", reason, advice)

    def _record_failure(self, status: Status, reason: str, advice: str) -> None:
        self.failed = True
        self.outcome.problems.append(f"{self.arm.method}: {status} ({reason}); {advice}")
        facts = {"steps": 0, "images_seen": 0, "views_seen": 0, "device_seconds": None, "images_per_second": None,
                 "peak_memory_bytes": None, "weights_sha256": None, "started_at": _now(), "finished_at": _now(),
                 **provenance.code_state()}  # fmt: skip
        measurement = Measurement(None, "pretrain", "status", None)
        rows = [self._row(measurement, None, facts, self._failure_id(), status)]
        records.write(self.workspace, rows)
        self._publish(rows)

    def record_loss(self, reason: str) -> None:
        """Leave the status row of an arm whose process was lost in a way that it could not record itself."""
        with self.recorded():
            self._record_failure("FAILED", reason, "lost with its process")


def _placed(module: Module, device: torch.device) -> Module:
    """The module on `device`, its convolutions' weights in channels_last memory like the images."""
    return module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# ------------------------------------------------------------------------------------------------------- Python API


def run(
    method: str = "sc",
    dataset: str = "digits",
    *,
    workspace: str | Path = ".",
    recipe: str | list[str] | None = None,
    data_dir: str | Path | None = None,
    labels: str | int | float = "all",
    label_seed: int | None = None,
    evaluators: list[str] | None = None,
    device: str = "auto",
    deterministic: bool = False,
    offline: bool = False,
    control: bool = True,
    tracking: str | None = None,
    seeds: Sequence[int] | str | None = None,
    transfer: Sequence[str] = (),
    set: Mapping[str, Any] | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """Pretrain, evaluate beside the controls, record; return every row the call used as a DataFrame.

    transfer: data sets that the encoder is measured on afterwards too (harness.transfer)
    settings: any top-level setting (`seed=0`, `epochs=10`, `encoder="resnet18"`); dotted ones go into `set`
    ({"optim.lr": 0.05}). seeds: several in one call, [0, 1, 2] or "0-2", in place of `seed`. The other arguments are
    the flags of `harness run`. Raises HarnessError for a mistake.
    """
    flags = {
        ("encoder.name" if key == "encoder" else key): value for key, value in settings.items() if value is not None
    }
    recipes = [recipe] if isinstance(recipe, str) else recipe or []
    request = Request(
        method=method, dataset=dataset, layers=Layers([load_recipe(r) for r in recipes], flags, dict(set or {})),
        workspace=Path(workspace).resolve(), data_dir=Path(data_dir) if data_dir else None, labels=str(labels),
        label_seed=label_seed, evaluators=None if evaluators is None else tuple(evaluators), device=device,
        deterministic=deterministic, offline=offline, control=control, tracking=tracking,
    )  # fmt: skip
    transfers.check(request, transfer)
    if seeds is None:
        outcome = execute(request)
    else:
        from harness import seeds as many

        outcome = many.execute(many.with_seeds(request, seeds), Silent())
    elsewhere = [row for other in execute_elsewhere(outcome, transfer) for row in other.rows]
    return records.frame(outcome.rows + elsewhere)


def evaluate(
    run: str | None = None,
    *,
    weights: str | Path | None = None,
    encoder: str | None = None,
    dataset: str | None = None,
    workspace: str | Path = ".",
    data_dir: str | Path | None = None,
    labels: str | int | float = "all",
    label_seed: int | None = None,
    evaluators: list[str] | None = None,
    control: bool = True,
    tracking: str | None = None,
    set: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Evaluate a finished pretraining, or an outside encoder's weights, by the same protocol; return the rows.

    dataset: what to measure on; for a run None is what it was pretrained on, and another one makes it a transfer
    """
    request = evaluation_request(
        run, Path(weights) if weights else None, encoder, dataset, Path(workspace).resolve(), dict(set or {}),
        data_dir=Path(data_dir) if data_dir else None, labels=str(labels), label_seed=label_seed,
        evaluators=None if evaluators is None else tuple(evaluators), control=control, tracking=tracking,
    )  # fmt: skip
    return records.frame(execute(request).rows)


def execute_elsewhere(outcome: Outcome, datasets: Sequence[str], reporter: Reporter | None = None) -> Iterator[Outcome]:
    """Measure what a command pretrained on other data sets too, one after another; one Outcome per run and data set.

    A pretraining that did not finish is passed over: its problem has been told.
    """
    request = outcome.plan.request
    mine = dict.fromkeys(row.pretrain_id for row in outcome.rows if row.method == request.method)
    for pretrain_id in mine:
        folder = runs.checkpoint_folder(request.workspace, pretrain_id)
        found = runs.find(request.workspace, pretrain_id) if (folder / "encoder.json").exists() else None
        if found is None or found.facts["status"] != "FINISHED":
            continue
        for dataset in datasets:
            elsewhere = transfers.request_elsewhere(
                found, dataset, {}, data_dir=request.data_dir, labels=request.labels, label_seed=request.label_seed,
                evaluators=request.evaluators, control=request.control, tracking=request.tracking,
                offline=request.offline, allow_test=request.allow_test, checkpoint_seconds=request.checkpoint_seconds,
            )  # fmt: skip
            yield execute(replace(elsewhere, device=request.device), reporter)


def evaluation_request(
    run: str | None,
    weights: Path | None,
    encoder: str | None,
    dataset: str | None,
    workspace: Path,
    overrides: dict[str, Any],
    **changes: Any,
) -> Request:
    """The request behind `harness evaluate`. Raises HarnessError when run and weights are both or neither given.

    dataset: what to measure on; a run's encoder on other data than it was pretrained on is a transfer
    """
    if (run is None) == (weights is None):
        raise HarnessError("evaluate takes either a RUN (see `harness list runs`) or --weights FILE")
    if run is not None:
        found = runs.find(workspace, run)
        if dataset is not None and dataset != found.facts["dataset"]:
            return transfers.request_elsewhere(found, dataset, overrides, **changes)
        request = runs.request_again(found, overrides, **changes)
        if make_plan(request).arms[0].pretrain_id != found.pretrain_id:
            if registry.load_method(request.method).supervised:
                raise HarnessError(
                    f"run {found.pretrain_id} learnt from its own labels; "
                    "give the --labels and --label-seed that it was made with"
                )
            raise HarnessError(
                f"run {found.pretrain_id} was made by other code or data than there is now; run its command again"
            )
        return request
    if encoder is None or dataset is None:
        raise HarnessError("--weights needs --encoder (what the weights are for) and --dataset (what to evaluate on)")
    assert weights is not None
    state = weights_of.read_weights(weights)
    method = registry.methods_with_role("outside")[0]
    overrides = {"encoder.name": encoder, "method.weights_sha256": fingerprint.tensors_sha256(state), **overrides}
    return Request(
        method=method,
        dataset=dataset,
        layers=Layers(overrides=overrides),
        workspace=workspace,
        weights=weights,
        **changes,
    )


__all__ = ["Outcome", "Reporter", "Request", "evaluate", "evaluation_request", "execute", "execute_elsewhere", "run"]
