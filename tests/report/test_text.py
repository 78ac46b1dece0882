"""Documents made from boards: hostile text stays text, and what is committed is what the rows say."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness import records
from harness.report import lines, text
from harness.report.assembly import build
from harness.report.boards import Board

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = [
    "<script>alert(1)</script>", "a | b", "**bold** _it_ [x](javascript:alert(1)) `code` ![i](http://x/y.png)", "=cmd|'/C calc'!A0",
    "+1+1", "-2+3", "@SUM(A1)", "\t=1+1", r"\input{/etc/passwd} $x$ 50% #1 & ~^_{}", "line\nbreak\r\n## heading", "\x1b[31mred",
    "[bold red]markup[/]", "\u202eright to left",
]  # fmt: skip


@pytest.fixture(params=HOSTILE, ids=range(len(HOSTILE)))
def hostile(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def board(hostile: str, make_runs: Callable[..., list[dict[str, Any]]], frame: Callable[..., pd.DataFrame]) -> Board:
    """A board with the hostile text in every text that rows and plugins bring."""
    told = {
        "dataset": hostile,
        "pretrain_data": hostile,
        "labels": hostile,
        "config": {"encoder.name": hostile, "method.x": 1},
    }
    other = {**told, "config": {"encoder.name": hostile, "method.x": hostile, "method." + hostile: 2}}
    rows = frame(make_runs(hostile, [0.6, 0.7, 0.8], encoder=hostile, readout=hostile, device=hostile, **told),
                 make_runs(hostile, [0.6, 0.7, 0.8], encoder=hostile, readout=hostile, **other),
                 make_runs("random_init", [0.5, 0.6, 0.7], encoder=hostile, steps=0, **told))  # fmt: skip
    [found] = build(rows)
    return replace(found, warnings=(*found.warnings, hostile), entries=tuple(
        replace(entry, title=hostile, family=hostile, flags=(*entry.flags, hostile)) for entry in found.entries
    ))  # fmt: skip


def test_markdown_keeps_hostile_text_as_text(board: Board) -> None:
    document = text.markdown([board])
    assert not re.search(r"<(?!br)", document) and "\x1b" not in document and "\u202e" not in document
    assert not re.search(r"(?<!\\)\]\(", document) and not re.search(r"(?<!\\)`code", document)
    assert document.count("\n#") == document.count("\n## ") == 1  # the board's own heading
    for block in re.findall(r"(?:^\|.*\n)+", document, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block


def test_latex_keeps_hostile_text_as_text(board: Board) -> None:
    document = text.latex([board])
    commands = set(re.findall(r"\\([a-zA-Z]+)", document))
    assert commands <= {"begin", "end", "caption", "toprule", "midrule", "bottomrule", "usepackage", "textbackslash",
                        "textasciitilde", "textasciicircum", "textless", "textgreater", "textbar", "textquotedbl",
                        "textbf"}  # fmt: skip
    body = document.split("\n", 1)[1]
    bare = re.sub(r"\\[$#%&_{}\\]", "", re.sub(r"\$\\pm\$", "", body))
    assert not re.search(r"[$#%_^~]", bare)
    assert {line.count(" & ") for line in body.splitlines() if line.startswith("  ")} == {
        body.split("midrule")[0].count(" & ")
    }
    assert bare.count("{") == bare.count("}")


def test_csv_has_no_formula_and_keeps_its_columns(board: Board, hostile: str) -> None:
    written = list(csv.DictReader(io.StringIO(lines.csv([board]))))
    assert len(written) == 9 and all(None not in line for line in written)
    for line in written:
        for name, cell in line.items():
            if cell.lstrip("'")[:1] in ("=", "+", "-", "@") or cell.strip()[:1] in ("=", "+", "-", "@"):
                assert cell.startswith("'") or re.fullmatch(r"-?[0-9.e-]+", cell), (name, cell)
            assert "\n" not in cell and "\x1b" not in cell


def test_the_terminal_shows_hostile_text_as_text(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    text.show([board])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\u202e" not in printed
    assert "[bold red]markup[/]" in printed.replace("\n", "") or "[bold red]" not in board.dataset


def test_a_sparkline_has_the_shape_of_its_curve() -> None:
    assert text.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert text.sparkline([1, 1]) == "▁▁" and text.sparkline([]) == "" and text.sparkline([0, float("nan"), 7]) == "▁x█"
    assert text.sparkline(list(range(400)))[::39] == "▁█" and len(text.sparkline(list(range(400)))) == 40


def test_parquet_and_csv_hold_every_seed(tmp_path: Path) -> None:
    boards = build(records.load_rows(ROOT / "results" / "studies"))
    table = lines.lines(boards)
    lines.parquet(boards, tmp_path / "lines.parquet")
    back = pd.read_parquet(tmp_path / "lines.parquet")
    pd.testing.assert_frame_equal(back, table, check_dtype=False)
    assert len(table) == sum(entry.n for board in boards for entry in board.entries)
    again = pd.read_csv(io.StringIO(lines.csv(boards)))
    assert list(again.columns) == list(table.columns) and again.value.tolist() == table.value.tolist()
    compared = table[table.control_n == table.n]  # every seed of the entry has its pair
    entries = compared.groupby(["board", "method", "configuration"], dropna=False)
    assert len(entries) > 20
    for _, entry in entries:
        assert entry.control_difference.mean() == pytest.approx(entry.control_mean.iloc[0])


def test_results_readme_is_what_the_committed_rows_say() -> None:
    """Made by `make results`; a change of rows, methods' titles or tables makes it stale."""
    boards = build(records.load_rows(ROOT / "results" / "studies"))
    assert (ROOT / "results" / "README.md").read_text(encoding="utf-8") == text.markdown(boards)
