"""Figures over several boards: planted rows come out where they belong. The numbers are made up and no results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from harness.contracts import Row
from harness.report import assembly, page, plots, rerun

MakeRow = Callable[..., dict[str, Any]]


def as_rows(records: list[dict[str, Any]]) -> list[Row]:
    return page._rows(pd.DataFrame(records, columns=list(Row.model_fields)))


def test_transfer_is_read_from_pretrain_data_and_averaged_over_seeds(make_row: MakeRow) -> None:
    records = []
    for seed in (0, 1):
        records.append(make_row("sc", seed, 0.8 + 0.1 * seed))
        records.append(make_row("sc", seed, 0.4 + 0.1 * seed, dataset="mnist", pretrain_data="digits:train"))
    (matrix,) = plots.transfer(as_rows(records))
    assert matrix.sources == ["digits"] and matrix.targets == ["digits", "mnist"]
    assert [cell[0] for cell in matrix.cells[0] if cell] == ["85.00", "45.00"]
    assert plots.transfer(as_rows(records[::2])) == []  # nothing crosses


def test_transfer_never_averages_configurations(make_row: MakeRow) -> None:
    records = [
        make_row("sc", 0, value, dataset="mnist", pretrain_data="folder:pets:train", config={"method.patch": patch})
        for value, patch in ((0.4, 3), (0.6, 4))
    ]
    found = plots.transfer(as_rows(records))
    assert [m.cells[0][0] for m in found] == [("40.00", 2), ("60.00", 2)]
    assert {m.sources[0] for m in found} == {"folder:pets"}
    assert len({m.title for m in found}) == 2


def test_a_transferred_run_is_made_again_from_its_own_data(make_row: MakeRow) -> None:
    records = [make_row("sc", 0, 0.8), make_row("sc", 0, 0.4, dataset="mnist", pretrain_data="digits:train")]
    (command,) = rerun.commands(as_rows(records))
    assert "--dataset digits" in command and "--transfer mnist" in command


def test_severity_curves_are_read_at_the_validated_readout(make_row: MakeRow) -> None:
    records = [make_row("sc", 0, 0.9, split=split) for split in ("validation", "test")]
    for readout, validation, clean, noisy in (("gap", 0.7, 0.71, 0.61), ("spatial", 0.8, 0.75, 0.35)):
        shared = {"evaluator": "robustness", "readout": readout}
        records.append(make_row("sc", 0, validation, split="validation", metric="top1_clean", **shared))
        records.append(make_row("sc", 0, clean, metric="top1_clean", **shared))
        for corruption, drop in (("noise", 0.0), ("blur", 0.1)):
            records.append(make_row("sc", 0, noisy - drop, metric=f"top1_{corruption}_2", **shared))
    frame = pd.DataFrame(records, columns=list(Row.model_fields))
    boards = [board for board in assembly.build(frame) if board.evaluator == "linear_probe"]
    found = {plate.title: plate.rows for plate in plots.robustness(boards, page._rows(frame), plots.looks(boards))}
    assert found["digits, noise"] == [["sc", "75.00", "35.00"]]
    assert found["digits, blur"] == [["sc", "75.00", "25.00"]]
    assert found["digits, mean over corruptions"] == [["sc", "75.00", "30.00"]]


@pytest.mark.parametrize(
    ("budgets", "places", "log"),
    [
        (["10pc", "100pc", "30pc"], {"10pc": 10, "30pc": 30, "100pc": 100}, True),
        (["1000", "100"], {"100": 100, "1000": 1000}, True),
        (["0.1", "0.01"], {"0.01": 0.01, "0.1": 0.1}, True),
        (["all", "1000", "100"], {"100": 0, "1000": 1, "all": 2}, False),
        (["10pc", "1000"], {"10pc": 0, "1000": 1}, False),
    ],
)
def test_budgets_of_one_kind_are_drawn_to_scale(budgets: list[str], places: dict[str, float], log: bool) -> None:
    assert plots._budget_axis(budgets) == (places, log)
