"""`harness report`: every comparison that the rows allow, in a terminal, a document or a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.verbs.options import Plugins, Workspace, add_plugins, words

if TYPE_CHECKING:
    import pandas as pd

File = Path | None


def report(
    html: Annotated[File, typer.Option("--html", metavar="FILE", help="Write one self-contained page.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print LaTeX tables (booktabs).")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV, one line per entry and seed.")] = False,
    parquet: Annotated[File, typer.Option("--parquet", metavar="FILE", help="Write Parquet, lines as of --csv.")] = None,
    filters: Annotated[
        list[str] | None,
        typer.Option("--filter", metavar="KEY=VALUE[,VALUE]", help="Rows to use, by field or setting; repeatable. A filter "
                     "on method keeps controls and floors."),
    ] = None,
    baseline: Annotated[str, typer.Option("--baseline", help="Method that differences are taken to.")] = "random_init",
    primary: Annotated[
        str | None,
        typer.Option("--primary", metavar="METHOD,...", help="The declared comparisons, which get verdicts "
                     "(default: the ranked methods)."),
    ] = None,
    workspace: Workspace = Path("."),
    rows: Annotated[
        File, typer.Option("--rows", metavar="FOLDER", help="Row files to read in place of the workspace's.")
    ] = None,
    plugins: Plugins = None,
) -> None:  # fmt: skip
    """Compare all methods on all data sets: intervals, paired differences, verdicts, floors, cost, warnings."""
    if sum((markdown, latex, csv)) > 1:
        raise typer.BadParameter("--markdown, --latex and --csv each print a document; give one of them")
    add_plugins(plugins)
    from harness import records
    from harness.report import assembly
    from harness.report.selection import select

    found = records.load_rows(rows) if rows else records.load_results(workspace.resolve())
    found = select(found, filters or [])
    boards = assembly.build(found, baseline, words(primary))
    _write(boards, found, workspace.resolve(), html, parquet)
    if markdown or latex:
        from harness.report import text

        typer.echo(text.markdown(boards) if markdown else text.latex(boards), nl=False)
    elif csv:
        from harness.report import lines

        typer.echo(lines.csv(boards), nl=False)
    elif not (html or parquet):
        from harness.report import text

        text.show(boards)
    if not boards:
        typer.echo("harness: no measured evaluation to compare; make one with `harness run`", err=True)


def _write(boards: list[Any], rows: pd.DataFrame, workspace: Path, html: File, parquet: File) -> None:
    if html:
        from harness.report import page

        page.write(boards, rows, workspace, html)
        typer.echo(f"{len(boards)} boards on {html}", err=True)
    if parquet:
        from harness.report import lines

        lines.parquet(boards, parquet)
        typer.echo(f"{len(boards)} boards in {parquet}", err=True)
