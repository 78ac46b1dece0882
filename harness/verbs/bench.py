"""`harness bench`: the missing runs of a grid, in worker processes of this machine."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.verbs.options import (
    CheckpointSeconds,
    DataDir,
    Deterministic,
    Device,
    Eval,
    Json,
    LabelSeed,
    Offline,
    Plugins,
    Recipe,
    Set,
    Tracking,
    Workspace,
    add_plugins,
    words,
)

if TYPE_CHECKING:
    from harness.arms import Request
    from harness.bench import Report
    from harness.grid import Cell, Planned
    from harness.grid_setups import Grid
    from harness.mirror import Tracking as Tracker

Jobs = Annotated[int, typer.Option("--jobs", min=1, max=256, help="Cells at work at the same time, as cores allow.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Run cells again that failed in an earlier command.")]


def bench(
    methods: Annotated[str | None, typer.Option("--methods", help="Registered methods, comma-separated.")] = None,
    datasets: Annotated[str | None, typer.Option("--datasets", help="Data sets, comma-separated.")] = None,
    encoders: Annotated[
        str | None, typer.Option("--encoders", help="Networks, comma-separated (default: each data set's).")
    ] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="0-4 or 3,5,7-9, ends included (default 0).")] = None,
    labels: Annotated[
        str | None, typer.Option("--labels", help="Label budgets, comma-separated: all, 1000, 0.1, 10pc, folds.")
    ] = None,
    grid: Annotated[
        str | None, typer.Option("--grid", help="Shipped grid (harness list grids) or FILE.toml; flags win over it.")
    ] = None,
    recipe: Recipe = None,
    overrides: Set = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="images=5e6, epochs=50, seconds=600 or several: the least of them binds."),
    ] = None,
    evaluators: Eval = None,
    label_seed: LabelSeed = None,
    study: Annotated[
        str | None, typer.Option("--study", help="List the grid's eval_ids in results/studies/NAME/study.json.")
    ] = None,
    jobs: Jobs = 1,
    retry_failed: RetryFailed = False,
    data_dir: DataDir = None,
    workspace: Workspace = Path("."),
    device: Device = "auto",
    deterministic: Deterministic = False,
    offline: Offline = False,
    tracking: Tracking = None,
    checkpoint_seconds: CheckpointSeconds = 10.0,
    plugins: Plugins = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would run and what it costs; write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run what is missing of a grid of methods, data sets, seeds and label budgets, beside all controls."""
    add_plugins(plugins)
    from harness.arms import Request
    from harness.config import load_recipe, parse_overrides
    from harness.grid_files import load_grid
    from harness.grid_setups import make_grid

    asked: dict[str, Any] = load_grid(grid) if grid else {}
    flags = {"methods": words(methods), "datasets": words(datasets), "encoders": words(encoders), "seeds": seeds,
             "labels": words(labels), "evaluators": words(evaluators), "budget": budget}  # fmt: skip
    asked |= {key: value for key, value in flags.items() if value is not None}
    asked.setdefault("methods", ())
    asked.setdefault("datasets", ())
    asked["recipes"] = (*asked.get("recipes", ()), *(load_recipe(name) for name in recipe or []))
    request = Request(
        method="", dataset="", workspace=workspace.resolve(), data_dir=data_dir, label_seed=label_seed, device=device,
        deterministic=deterministic, offline=offline, tracking=tracking, checkpoint_seconds=checkpoint_seconds,
    )  # fmt: skip
    whole = make_grid(**asked, overrides=parse_overrides(overrides or []))
    if dry_run:
        show_dry_run(whole, request, jobs, as_json)
        return
    planned, report = execute(whole, request, jobs, retry_failed, plugins or [], study)
    _print(planned, report, as_json)
    close(planned, report)


def execute(
    grid: Grid, base: Request, jobs: int, retry_failed: bool, plugins: list[Path], study: str | None = None
) -> tuple[Planned, Report]:
    """Plan a grid and carry it out with local workers, watched on stderr."""
    from harness.bench import write_study
    from harness.grid import plan_cells

    planned = plan_cells(grid, base, fetch=True, bound_of=_bounds(grid, base.workspace, record=True))
    if study is not None:
        write_study(base.workspace, study, planned.cells)
    with local_work(base, jobs, plugins, retry_failed) as (tracker, carry):
        tracker.start()
        report = carry(planned.cells)
    return planned, report


@contextlib.contextmanager
def local_work(
    base: Request, jobs: int, plugins: list[Path], retry_failed: bool
) -> Iterator[tuple[Tracker, Callable[[Sequence[Cell]], Report]]]:
    """The tracking of a command, not started yet, and what carries cells out with local workers, watched on stderr.

    Afterwards the workers are ended, and what tracking could not deliver in time is said.
    """
    from harness.bench import carry_out
    from harness.engines.local import LocalEngine
    from harness.grid import standing
    from harness.grid_console import BenchConsole
    from harness.mirror import Tracking

    workspace = base.workspace
    engine, tracker, clean = LocalEngine(jobs, plugins), Tracking(workspace, base.tracking), False

    def carry(cells: Sequence[Cell]) -> Report:
        with BenchConsole(cells, {cell.pretrain_id: standing(workspace, cell) for cell in cells}) as watcher:
            return carry_out(cells, workspace, engine, watcher, retry_failed=retry_failed, jobs=jobs,
                             follow=tracker.follow)  # fmt: skip

    try:
        yield tracker, carry
        clean = True
    finally:
        engine.close()
        owed = tracker.close(30.0) if clean else tracker.close(2.0, leave=True)
    if owed:
        typer.echo(f"harness: {owed.line}", err=True)


def _bounds(grid: Grid, workspace: Path, record: bool) -> Any:
    from harness.compute_budgets import resolve_budget

    budget = grid.budget
    return None if budget is None else lambda plan: resolve_budget(budget, plan, workspace, record)


def show_dry_run(grid: Grid, base: Request, jobs: int, as_json: bool) -> None:
    """Print what a grid lacks and what that costs; writes nothing."""
    from harness import records
    from harness.costs import Timings
    from harness.grid import plan_cells, standing
    from harness.grid_console import print_dry_run

    planned = plan_cells(grid, base, flops=True, bound_of=_bounds(grid, base.workspace, record=False))
    standings = {cell.pretrain_id: standing(base.workspace, cell) for cell in planned.cells}
    timings = Timings(records.read_all(base.workspace))
    if not as_json:
        print_dry_run(planned, standings, timings, jobs)
        return
    cells = []
    for cell in planned.cells:
        found = standings[cell.pretrain_id]
        cells.append(facts(cell) | {
            "state": found.state, "status": found.status, "missing": list(found.missing),
            "flops": None if cell.flops_per_image is None else cell.flops_per_image * cell.images,
            "seconds": timings.estimate(cell, found.missing),
        })  # fmt: skip
    typer.echo(json.dumps({"cells": cells, **_said(planned)}))


def facts(cell: Any) -> dict[str, Any]:
    """A cell as plain values."""
    return {
        "pretrain_id": cell.pretrain_id, "method": cell.method, "role": cell.role, "dataset": cell.dataset,
        "encoder": cell.encoder, "seed": cell.seed, "axes": dict(cell.point), "steps": cell.steps,
        "images_seen": cell.images, "evaluations": [asdict(evaluation) for evaluation in cell.evaluations],
    }  # fmt: skip


def _said(planned: Planned) -> dict[str, Any]:
    return {"refused": planned.refused, "budget": {setup: asdict(bound) for setup, bound in planned.bounds.items()}}


def _print(planned: Planned, report: Report, as_json: bool) -> None:
    from harness.grid_console import print_planned, print_report

    if as_json:
        cells = [facts(cell) | {"status": report.status(cell), "problem": report.problems.get(cell.pretrain_id)}
                 for cell in report.cells]  # fmt: skip
        rows = [row.model_dump(mode="json") for row in report.rows()]
        typer.echo(
            json.dumps({"cells": cells, "rows": rows, "steps_executed": report.steps_executed, **_said(planned)})
        )
        return
    print_planned(planned)
    print_report(report)


def close(planned: Planned, report: Report) -> None:
    """Say what failed; exit code 1 when anything did or was refused."""
    for cell in report.failed:
        typer.echo(f"harness: {cell}: {report.problems.get(cell.pretrain_id, 'not run')}", err=True)
    if report.failed or planned.refused:
        raise typer.Exit(1)


def bench_worker(plugins: Plugins = None) -> None:
    """A worker of `harness bench`: takes cells from its parent (harness/engines/local.py)."""
    add_plugins(plugins)
    from harness.engines.local import serve

    serve()


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(bench)
    app.command("bench-worker", hidden=True)(bench_worker)
