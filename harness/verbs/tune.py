"""`harness tune`: a fair, resumable search of settings that never sees the test split."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.verbs.options import (
    DataDir,
    Device,
    Json,
    Labels,
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
    from harness.search import Asked, Result
    from harness.trials import Search


def tune(
    method: Annotated[str, typer.Option("--method", help="Registered methods, comma-separated.")],
    trials: Annotated[int, typer.Option("--trials", help="Trials of each method.")],
    dataset: Annotated[str | None, typer.Option("--dataset", help="Registered data set, or folder:PATH.")] = None,
    tune_on: Annotated[str | None, typer.Option("--tune-on", help="Data set to choose settings on.")] = None,
    report_on: Annotated[str | None, typer.Option("--report-on", help="Data set to judge them on.")] = None,
    compute: Annotated[
        float | None, typer.Option("--compute", help="Device seconds of each method's trials, at most.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=100, help="Validation seeds of a trial.")] = 1,
    objective: Annotated[
        list[str] | None,
        typer.Option("--objective", help="EVALUATOR[.READOUT].top1 on validation, or cost; repeatable "
                     "(default linear_probe.top1: its better readout)."),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option("--sampler", help="tpe, gp, random or qmc (default tpe; for several methods qmc).")
    ] = None,
    pruner: Annotated[
        str | None, typer.Option("--pruner", help="asha, hyperband, median, wilcoxon or none (default asha if it can).")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, max=256, help="Processes at work at the same time.")] = 1,
    storage: Annotated[
        str | None, typer.Option("--storage", help="sqlite:///FILE.db or postgresql://... (default optuna.db here).")
    ] = None,
    study: Annotated[str | None, typer.Option("--study", help="Name under results/studies/.")] = None,
    confirm_seeds: Annotated[
        int, typer.Option("--confirm-seeds", min=0, max=1000, help="Fresh seeds for winner and default; 0: none.")
    ] = 5,
    space: Annotated[str | None, typer.Option("--space", help="TOML file of search ranges (docs/tune.md).")] = None,
    labels: Labels = "all",
    label_seed: LabelSeed = None,
    recipe: Recipe = None,
    overrides: Set = None,
    data_dir: DataDir = None,
    workspace: Workspace = Path("."),
    device: Device = "auto",
    offline: Offline = False,
    tracking: Tracking = None,
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Search the settings of METHODs on validation, then compare winner and default on fresh seeds."""
    add_plugins(plugins)
    from harness.arms import Request
    from harness.config import load_recipe, parse_overrides
    from harness.contracts import HarnessError
    from harness.search import Asked, make_searches
    from harness.search_space import SpaceFile, load_space

    if (dataset is None) == (tune_on is None):
        raise HarnessError("name the data set once: --dataset, or --tune-on (and --report-on)")
    if compute is not None and not compute > 0:
        raise HarnessError(f"--compute {compute:g}: seconds must be above zero")
    on = dataset or tune_on or ""
    asked = Asked(
        words(method) or (), on, report_on or on, trials, compute, seeds, tuple(objective or ["linear_probe.top1"]),
        sampler, pruner, storage, study, confirm_seeds, tuple(load_recipe(name) for name in recipe or []),
        parse_overrides(overrides or []), load_space(space) if space else SpaceFile(),
    )  # fmt: skip
    base = Request(method="", dataset="", workspace=workspace.resolve(), data_dir=data_dir, labels=labels,
                   label_seed=label_seed, device=device, offline=offline, tracking=tracking)  # fmt: skip
    searches = make_searches(asked, base)
    results = _execute(asked, searches, workers, plugins or [])
    _print(asked, results, as_json)
    if any(result.winner is None for result in results):
        raise typer.Exit(1)


def _execute(asked: Asked, searches: Sequence[Search], workers: int, plugins: list[Path]) -> list[Result]:
    """Trials, then more seeds for the best, then winner and default on fresh seeds; everything done before is kept."""
    from harness import bench, journal, search, tuning
    from harness.arms import environment
    from harness.search_workers import Workers
    from harness.verbs.bench import local_work

    base = searches[0].request
    pool, logs, status = Workers(searches, workers, plugins), [], "INTERRUPTED"
    with contextlib.ExitStack() as held, local_work(base, workers, plugins, retry_failed=True) as (tracker, carry):
        try:
            for one in searches:
                tuning.prepare(one)
                held.enter_context(journal.hold(journal.lock_path(base.workspace, one.journal)))
                logs.append(tracker.open(
                    one.journal, name=f"{one.study}-{one.method}", params={"study": one.study, "method": one.method},
                    tags={"study": one.study, "method": one.method, "role": "study", "trials": str(one.trials)},
                    config=tuning.definition(one), environment=environment(),
                ))  # fmt: skip
            tracker.start()
            pool.run(_watcher(searches, tracker))
            results = [search.collect(one) for one in searches]
            ids = [name for result in results for t in result.records for name in t.attrs.get("eval_ids", [])]
            bench.list_in_study(base.workspace, searches[0].study, ids)
            search.write(asked, results)
            _judge(asked, results, carry)
            status = "FINISHED"
        finally:
            pool.close()
            for log in logs:
                log.end(status)
    return results


def _judge(asked: Asked, results: list[Result], carry: Any) -> None:
    """Name the winners on more validation seeds, then compare them with the defaults on fresh ones."""
    from harness import bench, search

    workspace, study = results[0].search.request.workspace, results[0].search.study
    for result in results:
        bench.list_in_study(workspace, study, search.rescore(result, carry))
        search.write(asked, results)
    if not asked.confirm_seeds:
        return
    first = 1 + max(max(result.search.seeds + search.more_seeds(result)) for result in results)
    fresh = range(first, first + asked.confirm_seeds)
    for result in results:
        if result.winner is not None:
            ids = search.confirm(
                result, asked.report_on, fresh, carry, lambda text: typer.echo(f"note: {text}", err=True)
            )
            bench.list_in_study(workspace, study, ids)
        search.write(asked, results)


def _watcher(searches: Sequence[Search], tracker: Any) -> Any:
    from harness.search_workers import Began

    ended: dict[str, int] = {}
    best: dict[str, float] = {}
    totals = {one.method: one.trials for one in searches}

    def hear(message: Any) -> None:
        if isinstance(message, Began):
            for name in message.journals:
                tracker.follow(name)
            return
        name = message.method
        ended[name] = ended.get(name, 0) + 1
        if message.values and message.state == "COMPLETE":
            best[name] = max(best.get(name, message.values[0]), message.values[0])
        shown = ", ".join(f"{value:.4f}" for value in message.values or ()) or message.state
        more = f" ({message.reason})" if message.reason else ""
        so_far = f"; best {best[name]:.4f}" if name in best else ""
        typer.echo(f"{name} trial {message.number} of {totals[name]}: {shown}{more}{so_far}", err=True)

    return hear


def _print(asked: Asked, results: list[Result], as_json: bool) -> None:
    from harness import search
    from harness.console import console, print_table
    from harness.statistics import paired
    from harness.studies import agreement_warnings

    if as_json:
        typer.echo(json.dumps(search.document(asked, results)))
        return
    rows = []
    for result in results:
        trial = None if result.winner is None else result.records[result.winner]
        line = [result.search.method, "" if trial is None else trial.number,
                "" if trial is None or trial.values is None else f"{trial.values[0]:.4f}"]  # fmt: skip
        done = result.confirmed
        both = [] if done is None else [s for s in done["tuned"]["values"] if s in done["default"]["values"]]
        if done is not None and both:
            values = {kind: [done[kind]["values"][seed] for seed in both] for kind in ("default", "tuned")}
            gap = paired([t - d for t, d in zip(values["tuned"], values["default"], strict=True)])
            spread = "" if gap.low is None or gap.high is None else f" [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"
            line += [f"{sum(values[kind]) / len(both):.4f}" for kind in ("default", "tuned")] + [
                f"{100 * gap.mean:+.1f}{spread}"
            ]
        else:
            line += ["", "", ""]
        rows.append([*line, f"{result.seconds:,.0f} s", result.binds])
    first = results[0].search
    split = next((r.confirmed["split"] for r in results if r.confirmed), "test")
    columns = [
        "method",
        "trial",
        "validation",
        f"default, {split}",
        f"tuned, {split}",
        "difference, points",
        "cost",
        "budget",
    ]
    where = "" if asked.dataset == asked.report_on else f", chosen on {asked.dataset}, judged on {asked.report_on}"
    print_table(columns, rows, f"{first.study}: {first.objectives[0].name}{where}", columns[1:7])
    out = console()
    for result in results:
        failed = [t for t in result.records if t.state == "FAIL"]
        if failed:
            why = ", ".join(sorted({str(t.attrs.get("reason", "")).partition(":")[0] for t in failed}))
            out.print(f"{result.search.method}: {len(failed)} trials failed ({why})", markup=False)
        for text in agreement_warnings(result.search.method, search.rank_agreement(result)):
            out.print(f"warning: {text}", markup=False)
    out.print(
        f"recipes and trials: {first.request.workspace}/results/studies/{first.study}", markup=False, soft_wrap=True
    )


def tune_worker(plugins: Plugins = None) -> None:
    """A worker of `harness tune`: takes searches from its parent (harness/search_workers.py)."""
    add_plugins(plugins)
    from harness.search_workers import serve

    serve()


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(tune)
    app.command("tune-worker", hidden=True)(tune_worker)
