"""`harness reproduce`: the paper's tables, published beside measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.verbs import bench
from harness.verbs.options import DataDir, Device, Json, Plugins, Tracking, Workspace, add_plugins

if TYPE_CHECKING:
    from harness.bench import Report
    from harness.grid_setups import Grid
    from harness.reproduction import Comparison


def reproduce(
    table: Annotated[str, typer.Argument(help="table1 (STL-10), table2 (CIFAR-10, 4,000 labels) or table3 (MNIST).")],
    scale: Annotated[
        str, typer.Option("--scale", help="full: the table's own budget; quick: a small one, printed as such.")
    ] = "quick",
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, max=1000, help="How many seeds (default: the grid's, 5; quick 3).")
    ] = None,
    jobs: bench.Jobs = 1,
    retry_failed: bench.RetryFailed = False,
    data_dir: DataDir = None,
    workspace: Workspace = Path("."),
    device: Device = "auto",
    tracking: Tracking = None,
    publish: Annotated[
        Path | None, typer.Option("--publish", help="Folder to copy the rows to, with the table as README.md.")
    ] = None,
    plugins: Plugins = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would run and what it costs; write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure a table of the paper (Hoffer, Hubara & Ailon 2016) and print it beside the published numbers."""
    add_plugins(plugins)
    from harness import registry, reproduction
    from harness.arms import Request
    from harness.contracts import HarnessError
    from harness.grid_files import load_grid
    from harness.grid_setups import make_grid

    if table not in reproduction.TABLES:
        raise HarnessError(f"unknown table '{table}'; {registry.near(table, reproduction.TABLES)}")
    if scale not in ("quick", "full"):
        raise HarnessError(f"--scale '{scale}': quick or full")
    paper = reproduction.TABLES[table]
    asked = load_grid(paper.grid("quick" if scale == "quick" else "full"))
    if seeds is not None:
        first = int(asked["seeds"].partition("-")[0].partition(",")[0])
        asked["seeds"] = f"{first}-{first + seeds - 1}"
    grid = make_grid(**asked)
    _need_data(table, grid, data_dir)
    request = Request(method="", dataset="", workspace=workspace.resolve(), data_dir=data_dir, device=device,
                      offline=True, tracking=tracking)  # fmt: skip
    if dry_run:
        bench.show_dry_run(grid, request, jobs, as_json)
        return
    planned, report = bench.execute(grid, request, jobs, retry_failed, plugins or [])
    comparison = reproduction.compare(paper, "quick" if scale == "quick" else "full", report.rows())
    _print(comparison, report, as_json)
    if publish is not None:
        reproduction.publish(publish, comparison, report)
    bench.close(planned, report)


def _need_data(table: str, grid: Grid, data_dir: Path | None) -> None:
    """Raises HarnessError that says how to fetch what is missing: gigabytes are not downloaded unasked."""
    from harness.arms import data_root, open_dataset
    from harness.contracts import HarnessError

    for spec in grid.datasets:
        missing = [file.name for file in open_dataset(spec, data_dir, None, True).verify() if file.state == "missing"]
        if missing:
            where = f" --data-dir {data_dir}" if data_dir else ""
            raise HarnessError(f"{table} needs the data set {spec}, and {data_root(data_dir)} lacks {', '.join(missing[:3])}; "
                               f"fetch it with `harness data fetch {spec}{where}`")  # fmt: skip


def _print(comparison: Comparison, report: Report, as_json: bool) -> None:
    from harness import reproduction
    from harness.console import console, print_table
    from harness.grid_console import print_report

    if as_json:
        lines = [{
            "name": line.name, "extra": line.extra, "published": None if line.published is None else asdict(line.published),
            "measured": {label: {"mean": found.mean, "deviation": found.deviation, "values": found.values}
                         for label, found in line.measured.items()},
            "unconverged": list(line.unconverged),
        } for line in comparison.lines]  # fmt: skip
        typer.echo(json.dumps({"table": comparison.table.name, "scale": comparison.scale, "unit": comparison.unit,
                               "lines": lines, "remarks": reproduction.remarks(comparison)}))  # fmt: skip
        return
    columns = reproduction.header(comparison)
    print_table(columns, reproduction.cells(comparison), reproduction.title(comparison), columns[1:])
    for text in reproduction.remarks(comparison):
        console().print(text, markup=False)
    print_report(report)


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(reproduce)
