"""The `harness` command: turns words into configurations and prints what comes back; nothing else.

Heavy modules are imported inside the verbs, so that help and completion are instant.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import harness
from harness import registry
from harness.verbs import bench as bench_verbs
from harness.verbs import compare, report
from harness.verbs import reproduce as reproduce_verbs
from harness.verbs import study as study_verbs
from harness.verbs import tune as tune_verbs
from harness.verbs.options import (
    CheckpointSeconds,
    DataDir,
    Deterministic,
    Device,
    Eval,
    Json,
    Labels,
    LabelSeed,
    Offline,
    Plugins,
    Recipe,
    RunWord,
    Set,
    Tracking,
    Transfer,
    Workspace,
    add_plugins,
    complete,
    words,
)

if TYPE_CHECKING:
    from harness.arms import Request
    from harness.runner import Outcome

app = typer.Typer(
    name="harness", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Pretrain a network without labels, measure it beside honest controls, and keep every number.",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
data_app = typer.Typer(
    no_args_is_help=True, help="Fetch, verify or describe a data set's files.", rich_markup_mode=None
)
app.add_typer(data_app, name="data")
app.command()(report.report)
app.command()(compare.compare)
bench_verbs.register(app)
reproduce_verbs.register(app)
tune_verbs.register(app)
study_verbs.register(app)


# click's base of all usage errors, wherever this version of typer keeps it
_UsageMistake: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class Terminated(BaseException):
    """SIGTERM, as an exception: journals are closed and locks freed on the way out."""


def _version(value: bool) -> None:
    if value:
        typer.echo(f"harness {harness.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    method: Annotated[
        str | None, typer.Option("--method", help="Registered method.", autocompletion=complete("method"))
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", help="Registered data set, or folder:PATH.", autocompletion=complete("dataset")),
    ] = None,
    encoder: Annotated[str | None, typer.Option("--encoder", help="Network (default: the data set's).")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the pretraining images.")] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Fixes initialisation, order, views and label subset.")
    ] = None,
    transfer: Transfer = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="Several seeds in one command: 0-4 or 3,5,7-9, ends included.")
    ] = None,
    stack_seeds: Annotated[
        str | None, typer.Option("--stack-seeds", help="Train the seeds together: auto (where it is faster), on, off.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels", help="Label budget: all, a count, a fraction like 0.1, Npc per class, or folds (all)."
        ),
    ] = None,
    label_seed: LabelSeed = None,
    evaluators: Eval = None,
    recipe: Recipe = None,
    overrides: Set = None,
    data_dir: DataDir = None,
    image_size: Annotated[int | None, typer.Option("--image-size", help="Side in pixels, for folder: data.")] = None,
    workspace: Workspace = Path("."),
    device: Device = "auto",
    compile: Annotated[
        str | None,
        typer.Option(
            "--compile", help="auto, off, graph, compile or compile+graph (default auto: graph on CUDA, else off)."
        ),
    ] = None,
    deterministic: Deterministic = False,
    offline: Offline = False,
    no_control: Annotated[bool, typer.Option("--no-control", help="Leave out the controls and floors.")] = False,
    tracking: Tracking = None,
    checkpoint_seconds: CheckpointSeconds = 10.0,
    plugins: Plugins = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Resolve and check everything, print it, write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Pretrain METHOD on DATASET, evaluate it beside the controls, and record every number."""
    add_plugins(plugins)
    from harness.arms import Request
    from harness.config import Layers, load_recipe, parse_overrides

    recipes = [load_recipe(name) for name in recipe or []]
    flags = {"encoder.name": encoder, "epochs": epochs, "seed": seed, "data.image_size": image_size, "compile": compile}
    flags["stack_seeds"] = stack_seeds
    if stack_seeds == "on" and seeds is None:
        raise typer.BadParameter("--stack-seeds on trains several seeds together; name them with --seeds")
    request = Request(
        method=_needed("--method", method, recipes, "method"), dataset=_needed("--dataset", dataset, recipes, "dataset"),
        layers=Layers(recipes, {k: v for k, v in flags.items() if v is not None}, parse_overrides(overrides or [])),
        workspace=workspace.resolve(), data_dir=data_dir, labels=labels or _labels_of(recipes), label_seed=label_seed,
        evaluators=words(evaluators), device=device, deterministic=deterministic, offline=offline,
        control=not no_control, tracking=tracking, checkpoint_seconds=checkpoint_seconds,
    )  # fmt: skip
    _carry_out(request, dry_run, as_json, seeds, words(transfer) or ())


@app.command()
def evaluate(
    word: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="`latest` or the first letters of a pretrain_id.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="State dict of an outside encoder (.safetensors or .pt).")
    ] = None,
    encoder: Annotated[str | None, typer.Option("--encoder", help="What the outside weights are for.")] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", help="What to measure on (default for a RUN: what it was pretrained on)."),
    ] = None,
    labels: Labels = "all",
    label_seed: LabelSeed = None,
    evaluators: Eval = None,
    overrides: Set = None,
    data_dir: DataDir = None,
    workspace: Workspace = Path("."),
    no_control: Annotated[bool, typer.Option("--no-control", help="Leave out the controls and floors.")] = False,
    tracking: Tracking = None,
    plugins: Plugins = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Resolve and check everything, print it, write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Evaluate a finished pretraining, or an outside encoder, by the same protocol."""
    add_plugins(plugins)
    from harness.config import parse_overrides
    from harness.runner import evaluation_request

    request = evaluation_request(
        word, weights, encoder, dataset, workspace.resolve(), parse_overrides(overrides or []), data_dir=data_dir,
        labels=labels, label_seed=label_seed, evaluators=words(evaluators), control=not no_control, tracking=tracking,
    )  # fmt: skip
    _carry_out(request, dry_run, as_json)


def _labels_of(recipes: list[Any]) -> str:
    """The label budget that the last recipe names which names one."""
    return next((recipe.run["labels"] for recipe in reversed(recipes) if "labels" in recipe.run), "all")


def _needed(flag: str, value: str | None, recipes: list[Any], key: str) -> str:
    from harness.contracts import HarnessError

    for recipe in reversed(recipes):
        value = value or recipe.run.get(key)
    if not value:
        kind: registry.Kind = "method" if key == "method" else "dataset"
        raise HarnessError(f"{flag} is missing; known: {', '.join(registry.names(kind))}")
    return value


def _carry_out(
    request: Request, dry_run: bool, as_json: bool, seeds: str | None = None, elsewhere: tuple[str, ...] = ()
) -> None:
    from harness import runner, transfer
    from harness import seeds as many
    from harness.arms import make_plan
    from harness.console import TerminalReporter

    transfer.check(request, elsewhere, fetch=not dry_run)
    requests = [] if seeds is None else many.with_seeds(request, seeds)
    if dry_run:
        _print_plan([*many.make_plans(requests)] if requests else [make_plan(request)], as_json)
        return
    plan = None if requests else make_plan(request, fetch=True)
    with TerminalReporter() as reporter:
        outcome = many.execute(requests, reporter) if requests else runner.execute(request, reporter, plan)
        outcomes = [outcome, *runner.execute_elsewhere(outcome, elsewhere, reporter)]
    if as_json:
        typer.echo(json.dumps({"rows": [row.model_dump(mode="json") for one in outcomes for row in one.rows]}))
    for one in outcomes:
        if not as_json:
            _print_outcome(one)
        for problem in one.problems:
            typer.echo(f"harness: {problem}", err=True)
    if outcomes[-1].owed:
        typer.echo(f"harness: {outcomes[-1].owed.line}", err=True)
    if any(one.problems for one in outcomes):
        raise typer.Exit(1)


def _print_plan(plans: list[Any], as_json: bool) -> None:
    from harness.arms import cells
    from harness.config import dotted
    from harness.console import print_table

    arms = [
        {"method": arm.method, "role": arm.role, "seed": plan.seed, "pretrain_id": arm.pretrain_id, "encoder": arm.encoder,
         "steps": arm.steps, "batch_size": arm.batch_size, "config": dotted(arm.config),
         "evaluations": [{"evaluator": c.evaluator, "labels": c.budget.spec if c.budget else None, "eval_id": c.eval_id}
                         for c in cells(arm, plan)]}
        for plan in plans for arm in plan.arms
    ]  # fmt: skip
    if as_json:
        typer.echo(json.dumps({"arms": arms}))
        return
    columns = ["method", "role", "seed", "encoder", "steps", "batch", "pretrain_id", "evaluations"]
    print_table(columns, [[a["method"], a["role"], a["seed"], a["encoder"], a["steps"], a["batch_size"], a["pretrain_id"],
                           ", ".join(dict.fromkeys(str(e["evaluator"]) for e in a["evaluations"]))] for a in arms],
                f"dry run on {plans[0].device.type}: nothing was written", ["seed", "steps", "batch"])  # fmt: skip
    print_table(["setting", "value"], arms[0]["config"].items(), f"settings of {arms[0]['method']}")


def _print_outcome(outcome: Outcome) -> None:
    from harness.console import console, print_pretext, print_seeds, print_summary
    from harness.report.summary import over_seeds, summarise

    plan, request = outcome.plan, outcome.plan.request
    dataset = plan.dataset_name
    if (origin := plan.arms[0].origin) is not None:
        dataset = f"{dataset}, {request.method} pretrained on {origin.pretrain_data}"
    print_pretext(row for row in outcome.rows if row.method == plan.arms[0].method)
    if outcome.seeds:
        for spread in over_seeds(outcome.rows):
            print_seeds(spread, dataset, request.method)
    else:
        for summary in summarise(outcome.rows):
            print_summary(summary, dataset, request.method, plan.seed)
    out = console()
    if any(row.collapsed for row in outcome.rows):
        out.print(
            "collapsed: " + ", ".join(dict.fromkeys(row.method for row in outcome.rows if row.collapsed)), markup=False
        )
    if overlap := max((row.test_overlap or 0 for row in outcome.rows), default=0):
        out.print(
            f"{overlap} test images are also among the pretraining or training images (test_overlap)", markup=False
        )
    if not any(row.split == "test" for row in outcome.rows):
        out.print("no test split was opened: validation rows only", markup=False)
    arms = {row.pretrain_id for row in outcome.rows}
    out.print(f"{len(outcome.rows)} rows of {len(arms)} arms in {request.workspace}/results/runs; "
              f"{outcome.steps_executed:,} steps were executed now", markup=False)  # fmt: skip
    if request.tracking is None:
        where = "" if request.workspace == Path.cwd() else f" --workspace {request.workspace}"
        out.print(f"MLflow: harness ui{where}", markup=False)


@app.command("profile")
def profile_(
    method: Annotated[
        str | None, typer.Option("--method", help="Registered method.", autocompletion=complete("method"))
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", help="Registered data set, or folder:PATH.", autocompletion=complete("dataset")),
    ] = None,
    encoder: Annotated[str | None, typer.Option("--encoder", help="Network (default: the data set's).")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Images per step.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Fixes initialisation, order and views.")] = None,
    recipe: Recipe = None,
    overrides: Set = None,
    data_dir: DataDir = None,
    image_size: Annotated[int | None, typer.Option("--image-size", help="Side in pixels, for folder: data.")] = None,
    device: Device = "auto",
    offline: Offline = False,
    steps: Annotated[int, typer.Option("--steps", help="Steps that are timed.")] = 20,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Where the Chrome trace goes (default profile-METHOD-DATASET.json).")
    ] = None,
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """Show where a training step's time and memory go, and how near it is to the device's limit."""
    for name, quiet in (("KINETO_LOG_LEVEL", "99"), ("TORCH_CPP_LOG_LEVEL", "ERROR")):
        os.environ.setdefault(name, quiet)  # before torch is loaded: its profiler talks on stderr
    add_plugins(plugins)
    from harness.arms import Request
    from harness.config import Layers, load_recipe, parse_overrides
    from harness.console import print_profile
    from harness.profiling import profile

    recipes = [load_recipe(name) for name in recipe or []]
    flags = {"encoder.name": encoder, "batch_size": batch_size, "seed": seed, "data.image_size": image_size}
    request = Request(
        method=_needed("--method", method, recipes, "method"), dataset=_needed("--dataset", dataset, recipes, "dataset"),
        layers=Layers(recipes, {k: v for k, v in flags.items() if v is not None}, parse_overrides(overrides or [])),
        data_dir=data_dir, device=device, offline=offline,
    )  # fmt: skip
    found = profile(request, steps, trace)
    if as_json:
        typer.echo(json.dumps(found.facts()))
    else:
        print_profile(found)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="methods, datasets, encoders, evaluators, recipes, grids or runs.")],
    workspace: Workspace = Path("."),
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """List what is registered, or the runs of a workspace."""
    add_plugins(plugins)
    from harness import listing
    from harness.console import print_table

    records = listing.records(what, workspace.resolve())
    if as_json:
        typer.echo(json.dumps({what: records}))
    elif records:
        columns = [column for column in records[0] if column not in listing.JSON_ONLY[what]]
        print_table(columns, [[record[c] for c in columns] for record in records], grouped=what == "methods")
    else:
        typer.echo(f"no {what} yet")


@app.command()
def describe(
    method: Annotated[str, typer.Argument(help="Registered method.", autocompletion=complete("method"))],
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """Show every setting of METHOD: key, default, meaning, search range, source."""
    add_plugins(plugins)
    from harness import listing
    from harness.console import console, print_table

    description = listing.describe(method)
    if as_json:
        typer.echo(json.dumps(description, default=str))
        return
    console().print(f"{description['method']}: {description['title']}\n{description['source']}", markup=False)
    columns = ["key", "type", "default", "meaning", "search", "source"]
    print_table(columns, [[record[c] for c in columns] for record in description["settings"]])


@app.command()
def show(run: RunWord = "latest", workspace: Workspace = Path("."), as_json: Json = False) -> None:
    """Show one pretraining: its settings, steps, digests and rows."""
    from harness import listing
    from harness.console import print_table

    facts = listing.show(workspace.resolve(), run)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    print_table(["fact", "value"], [[k, v] for k, v in facts.items() if k not in ("rows", "curve", "config")])
    print_table(["setting", "value"], facts["config"].items(), "settings")
    columns = ["evaluator", "readout", "labels", "fold", "split", "metric", "value"]
    print_table(columns, [[row[c] for c in columns] for row in facts["rows"]], "rows")


@data_app.command("fetch")
def data_fetch(
    dataset: str, data_dir: DataDir = None, offline: Annotated[bool, typer.Option("--offline")] = False
) -> None:
    """Download what is missing of DATASET, verified."""
    from harness.arms import open_dataset

    for line in open_dataset(dataset, data_dir, None, offline).fetch(offline=offline):
        typer.echo(line)


@data_app.command("verify")
def data_verify(dataset: str, data_dir: DataDir = None, as_json: Json = False) -> None:
    """Check every file of DATASET: published, readable but not the published file, broken, or missing."""
    from harness.arms import open_dataset
    from harness.console import print_table

    reports = open_dataset(dataset, data_dir, None, True).verify()
    if as_json:
        typer.echo(json.dumps({"files": [{"name": r.name, "state": r.state, "detail": r.detail} for r in reports]}))
    else:
        print_table(["file", "state", "detail"], [[r.name, r.state, r.detail] for r in reports])
    if any(r.state in ("broken", "missing") for r in reports):
        raise typer.Exit(1)


@data_app.command("info")
def data_info(
    dataset: str,
    data_dir: DataDir = None,
    image_size: Annotated[int | None, typer.Option("--image-size")] = None,
    as_json: Json = False,
) -> None:
    """Describe DATASET as its files are: counts, sizes, statistics, licence."""
    from dataclasses import asdict

    from harness.arms import open_dataset
    from harness.console import print_table

    facts = asdict(open_dataset(dataset, data_dir, image_size, True).info)
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        print_table(["fact", "value"], facts.items())


@app.command()
def export(
    run: RunWord,
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    workspace: Workspace = Path("."),
    data_dir: DataDir = None,
) -> None:
    """Write the encoder of RUN as safetensors and, for a ResNet, as a torchvision state dict with the probe as its fc."""
    from harness import runs
    from harness.export import export as write

    for line in write(runs.find(workspace.resolve(), run), out, data_dir).lines():
        typer.echo(line)


@app.command()
def embed(
    run: RunWord,
    images: Annotated[Path, typer.Argument(help="Folder of images, one image, or a uint8 .npy array.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.parquet")],
    workspace: Workspace = Path("."),
) -> None:
    """Write the features that the probe used for images of yours."""
    from harness import runs
    from harness.embed import embed as write

    count = write(runs.find(workspace.resolve(), run), images, out)
    typer.echo(f"{count} images embedded into {out}")


@app.command()
def ui(
    workspace: Workspace = Path("."),
    host: Annotated[
        str, typer.Option("--host", help="Loopback unless you mean otherwise: MLflow has no login.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 5000,
) -> None:
    """Open MLflow's pages on this workspace's store."""
    from harness import tracking

    raise typer.Exit(tracking.serve_ui(workspace.resolve(), host, port))


@app.command()
def sync(workspace: Workspace = Path("."), tracking: Tracking = None) -> None:
    """Deliver to MLflow what earlier commands could not; rebuild its store from the journals if it is gone."""
    from harness import delivery

    report = delivery.sync(workspace.resolve(), tracking)
    typer.echo(f"tracking: {report.delivered:,} records delivered")
    for refused in report.owed.refused:
        typer.echo(f"harness: MLflow refused {refused}", err=True)
    if report.owed:
        typer.echo(f"harness: {report.owed.line}", err=True)
        raise typer.Exit(1)


@app.command()
def doctor(
    workspace: Workspace = Path("."),
    data_dir: DataDir = None,
    repair: Annotated[bool, typer.Option("--repair", help="Sweep leftovers, end dead runs.")] = False,
    as_json: Json = False,
) -> None:
    """Examine versions, device, disk, data, rows, checkpoints and dead runs."""
    from dataclasses import asdict

    from harness.arms import data_root
    from harness.console import print_table
    from harness.doctor import examine

    findings = examine(workspace.resolve(), data_root(data_dir), repair)
    if as_json:
        typer.echo(json.dumps({"findings": [asdict(f) for f in findings]}))
    else:
        print_table(
            ["level", "what", "advice"], [[f.level, f.what, "repaired" if f.repaired else f.advice] for f in findings]
        )
    if any(f.level == "problem" and not f.repaired for f in findings):
        raise typer.Exit(1)


@app.command()
def clean(
    workspace: Workspace = Path("."),
    days: Annotated[float, typer.Option("--older-than-days", help="Age of the checkpoints to remove.")] = 30.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove checkpoints by age; rows are never removed."""
    from harness.clean import clean as remove

    for line in remove(workspace.resolve(), days, dry_run).lines():
        typer.echo(line)


def _terminated(signum: int, frame: object) -> NoReturn:
    signal.signal(signum, signal.SIG_IGN)  # a second one must not interrupt the way out
    raise Terminated


LAST_RESORT_SECONDS = 8.0  # after a signal, when the main thread is inside a long call into C


def _watch_signals() -> None:
    """End the process some seconds after SIGTERM or Ctrl-C even if no Python code gets to run in the main thread.

    Signal handlers run between two bytecodes of the main thread; a kernel machine's solver may not return to one for a
    minute. The open journals are ended first, so that no run stays RUNNING.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        codes = {signal.SIGTERM: 143, signal.SIGINT: 130}
        while (number := os.read(reader, 1)[0]) not in codes:
            pass
        time.sleep(LAST_RESORT_SECONDS)
        runner = sys.modules.get("harness.runner")
        for journal in list(runner.open_journals) if runner else []:
            journal.end("INTERRUPTED")
        os._exit(_stopped("ended from outside a long call", codes[signal.Signals(number)]))

    threading.Thread(target=watch, name="signal-watch", daemon=True).start()


def main() -> None:
    """Entry point: 0 done, 1 an arm failed, 2 a mistake of the caller's, 130 Ctrl-C, 143 SIGTERM."""
    signal.signal(signal.SIGTERM, _terminated)
    _watch_signals()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without a letter must not cost the table
    code = 0
    try:
        code = app(standalone_mode=False) or 0
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
    except _UsageMistake as error:
        hint = ""
        if (near := getattr(error, "possibilities", None)) and "did you mean" not in error.format_message().lower():
            hint = f"; did you mean {', '.join(sorted(near))}?"
        code = _mistake(error.format_message().strip().replace("\n", " ") + hint)
    except (KeyboardInterrupt, typer.Abort):
        code = _stopped("interrupted", 130)
    except Terminated:
        code = _stopped("terminated", 143)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        from harness.contracts import HarnessError

        if isinstance(error, OSError) and error.filename:
            error = HarnessError(f"{error.filename}: {(error.strerror or 'cannot be used').lower()}")
        if not isinstance(error, HarnessError):
            raise
        code = _mistake(str(error).replace("\n", " "))
    sys.stdout.flush()
    sys.stderr.flush()
    # no library's exit handler or thread may hold the process up: everything durable is on disk by now
    os._exit(int(code))


def _mistake(text: str) -> int:
    typer.echo(f"harness: {text}", err=True)
    return 2


def _stopped(word: str, code: int) -> int:
    typer.echo(f"harness: {word}; the same command continues where it stopped", err=True)
    return code
