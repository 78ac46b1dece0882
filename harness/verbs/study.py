"""`harness study`: what searches have found so far, in a terminal or as files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.verbs.options import Json, Workspace

if TYPE_CHECKING:
    from harness.studies import MethodSearch, Study

Name = Annotated[str, typer.Argument(metavar="NAME", help="A study of `harness study list`.")]
Storage = Annotated[
    str | None,
    typer.Option("--storage", help="sqlite:///FILE.db or postgresql://... (default: the workspace's optuna.db)."),
]
TOP = 5  # trials shown with all their settings

app = typer.Typer(no_args_is_help=True, help="List, show or export searches of `harness tune`.", rich_markup_mode=None)


@app.command("list")
def list_studies(workspace: Workspace = Path("."), storage: Storage = None, as_json: Json = False) -> None:
    """List the searches of a workspace or a storage."""
    from harness import live_studies, studies
    from harness.console import print_table
    from harness.report import typography
    from harness.study_export import trials

    root = workspace.resolve()
    found = [studies.read(live_studies.document(root, name, storage)) for name in live_studies.names(root, storage)]
    if as_json:
        typer.echo(json.dumps({"studies": [studies.summary(study) for study in found]}))
    elif found:
        rows = [[study.name, study.dataset, study.objectives[0], one.method, trials(one),
                 "" if one.best is None else typography.value(one.best.value, study.metric)]
                for study in found for one in study.methods]  # fmt: skip
        print_table(
            ["study", "data set", "objective", "method", "trials", "best"], _clean(rows), numeric=["best"], grouped=True
        )
    else:
        typer.echo("no searches yet; make one with `harness tune`")


@app.command()
def show(name: Name, workspace: Workspace = Path("."), storage: Storage = None, as_json: Json = False) -> None:
    """Show what the search NAME has found so far."""
    from harness import live_studies, studies

    study = studies.read(live_studies.document(workspace.resolve(), name, storage))
    if as_json:
        typer.echo(json.dumps(studies.summary(study)))
    else:
        _print(study)


@app.command()
def export(
    name: Name,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write into (default: the study's own).")] = None,
    workspace: Workspace = Path("."),
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Write the search NAME as trials.csv, importance.csv, expected_best.csv, table.md and the winners' recipes."""
    from harness import live_studies, studies, study_export

    root = workspace.resolve()
    document = live_studies.document(root, name, storage)
    folder = (out or studies.study_folder(root, name)).resolve()
    files = study_export.export(root, document, folder)
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "files": files}))
        return
    typer.echo(f"{folder}: {', '.join(files)}")
    if not any(file.endswith(".toml") for file in files):
        typer.echo("no recipe yet: its `harness tune` writes one for each winner when all trials are over", err=True)


def _print(study: Study) -> None:
    from harness.console import console, print_table
    from harness.report.text import clean
    from harness.studies import agreement_warnings
    from harness.study_export import COLUMNS, judged, table

    title = f"{study.name}: {study.objectives[0]} on {study.dataset}, labels {study.labels}, sampler {study.sampler}"
    print_table(COLUMNS, _clean(table(study)), clean(title), COLUMNS[2:])
    for one in study.methods:
        _print_method(one, study)
    counts = sorted({1, 2, 3, 5, 10, 20, 50, 100, 200, 500, *(len(one.expected_best) for one in study.methods)} - {0})
    counts = [n for n in counts if n <= max((len(one.expected_best) for one in study.methods), default=0)]
    if counts:
        rows = [[one.method, *(f"{100 * one.expected_best[n - 1]:.2f}" if n <= len(one.expected_best) else "" for n in counts)]
                for one in study.methods if one.expected_best]  # fmt: skip
        words = list(map(str, counts))
        print_table(["method", *words], _clean(rows), "expected best, %, after so many trials in any order", words)
    out = console()
    for line in filter(None, [judged(study), *(f"{one.method}: {one.binds}" for one in study.methods)]):
        out.print(clean(line), markup=False)
    for one in study.methods:
        for reason, count in one.failures.items():
            out.print(clean(f"{one.method}: {count} failed: {reason}"), markup=False)
        for warning in agreement_warnings(one.method, one.rank_agreement):
            out.print(clean(f"warning: {warning}"), markup=False)


def _print_method(one: MethodSearch, study: Study) -> None:
    """The best trials with their settings, when the best was found, what mattered and where the good values lay."""
    from harness.console import console, print_table
    from harness.report import typography
    from harness.report.text import clean, sparkline
    from harness.studies import LEAST_FOR_IMPORTANCE
    from harness.study_slices import slices, written

    if not one.complete:
        return
    ranked = sorted(one.complete, key=lambda trial: (-(trial.value or 0.0), trial.number))[:TOP]
    rows = [[trial.number, typography.value(trial.value, study.metric), *(written(trial.params.get(key)) for key in one.space)]
            for trial in ranked]  # fmt: skip
    print_table(
        ["trial", "value", *one.space], _clean(rows), clean(f"{one.method}: the best trials"), ["trial", "value"]
    )
    rows = [[slice.key, f"{100 * one.importance[slice.key]:.0f}%" if one.importance else "",
             "; ".join(f"{part.name}: {typography.value(part.best, study.metric)} ({part.count})" for part in slice.parts)]
            for slice in slices(one)]  # fmt: skip
    print_table(["setting", "importance", "best value in parts of its range (trials there)"], _clean(rows),
                clean(f"{one.method}: what mattered"), ["importance"])  # fmt: skip
    rests = f"importance (PED-ANOVA) rests on {len(one.complete)} completed trials"
    if not one.importance:
        few = len(one.complete) < LEAST_FOR_IMPORTANCE
        why = f"too few, {LEAST_FOR_IMPORTANCE} are needed" if few else "nothing varied"
        rests = f"no importance from {len(one.complete)} completed trials: {why}"
    steps = ", ".join(f"{typography.value(trial.value, study.metric)} (trial {trial.number})" for trial in one.steps)
    line = sparkline([best for _, best in one.history if best is not None])
    words_of = [rests, f"best so far {line} {steps}"]
    if len(study.objectives) > 1:
        words_of.append(f"no trial beats in all of {', '.join(study.objectives)}: {', '.join(map(str, one.pareto))}")
    for words in words_of:
        console().print(clean(f"{one.method}: {words}"), markup=False, soft_wrap=True)


def _clean(rows: Iterable[Iterable[Any]]) -> list[list[str]]:
    from harness.report.text import clean

    return [[clean(str(word)) for word in row] for row in rows]


def register(app_: typer.Typer) -> None:
    """Add the commands of this file."""
    app_.add_typer(app, name="study")
