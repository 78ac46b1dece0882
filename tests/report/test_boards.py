"""Boards: what is compared with what, and that nothing inside noise is called a difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from harness.contracts import HarnessError
from harness.report import text
from harness.report.assembly import build
from harness.report.boards import Board, Difference
from harness.report.selection import select

Runs = Callable[..., list[dict[str, Any]]]
Frame = Callable[..., pd.DataFrame]


def only(boards: list[Board]) -> Board:
    assert len(boards) == 1, [board.title for board in boards]
    return boards[0]


def control(board: Board, key: str = "sc") -> Difference:
    found = board.entry(key).control
    assert found is not None
    return found


def planted(count: int, gain: float, noise: float = 0.002) -> tuple[list[float], list[float]]:
    """Values of a baseline and of a method that gains `gain` over it, seed by seed."""
    random = np.random.default_rng(3)
    base = 0.7 + 0.03 * random.standard_normal(count)
    return base.tolist(), (base + gain + noise * random.standard_normal(count)).tolist()


def test_the_headline_is_what_validation_chose_run_by_run(make_row: Any, frame: Frame) -> None:
    rows = []
    for seed, (gap, spatial) in enumerate([(0.9, 0.8), (0.6, 0.7)]):  # validation values; tests say the opposite
        rows += [make_row("sc", seed, gap, split="validation"), make_row("sc", seed, 0.5)]
        rows += [
            make_row("sc", seed, spatial, readout="spatial", split="validation"),
            make_row("sc", seed, 0.6, readout="spatial"),
        ]
    entry = only(build(frame(rows))).entry("sc")
    assert entry.values == {0: 0.5, 1: 0.6} and entry.chosen == {0: "gap", 1: "spatial"}
    assert entry.readout == "gap 1, spatial 1"
    assert entry.readouts == {"gap": {0: 0.5, 1: 0.5}, "spatial": {0: 0.6, 1: 0.6}}


def test_a_planted_difference_is_bold_from_six_seeds_on_and_a_tie_never(make_runs: Runs, frame: Frame) -> None:
    for count, gain, bold in ((8, 0.03, True), (8, 0.0, False), (5, 0.03, False), (2, 0.03, False), (1, 0.03, False)):
        base, mine = planted(count, gain)
        board = only(build(frame(make_runs("sc", mine), make_runs("random_init", base, steps=0))))
        entry = board.entry("sc")
        assert entry.bold is bold, (count, gain)
        assert ("**" in text.markdown([board]).split("\n## ", 1)[1]) is bold
        assert (r"\textbf" in text.latex([board])) is bold
        assert (entry.low is None) is (count < 3) and (control(board).low is None) is (count < 3)
        assert not board.entry("random_init").bold
        assert (control(board).verdict == "gain") is bold and control(board).primary


def test_a_loss_is_no_gain(make_runs: Runs, frame: Frame) -> None:
    base, mine = planted(8, -0.03)
    board = only(build(frame(make_runs("sc", mine), make_runs("random_init", base, steps=0))))
    assert control(board).mean < 0 and control(board).verdict != "gain" and not board.entry("sc").bold


def test_only_the_declared_family_gets_verdicts(make_runs: Runs, frame: Frame) -> None:
    base, mine = planted(8, 0.03)
    rows = frame(*(make_runs(name, mine) for name in ("sc", "sc_null", "nnclr", "supervised", "not_installed")),
                 make_runs("random_init", base, steps=0))  # fmt: skip
    board = only(build(rows))
    words = {entry.key: entry.control.verdict for entry in board.entries if entry.control}
    assert words == {"sc": "gain", "sc_null": "exploratory", "nnclr": "exploratory", "supervised": "exploratory",
                     "not_installed": "exploratory"}  # fmt: skip
    assert [entry.key for entry in board.entries if entry.bold] == ["sc"]
    roles = {entry.key: entry.role for entry in board.entries}
    assert (
        roles["sc_null"] == "null control" and roles["random_init"] == "control" and roles["not_installed"] == "method"
    )
    declared = only(build(rows, primary=("nnclr",)))
    assert [entry.key for entry in declared.entries if entry.bold] == ["nnclr"]


def test_holm_is_over_the_boards_family(make_runs: Runs, frame: Frame) -> None:
    base, strong = planted(8, 0.03)
    random = np.random.default_rng(0)
    weak = [value + 0.004 + 0.008 * noise for value, noise in zip(base, random.standard_normal(8), strict=True)]
    board = only(
        build(frame(make_runs("sc", strong), make_runs("simclr", weak), make_runs("random_init", base, steps=0)))
    )
    p = {key: control(board, key).p for key in ("sc", "simclr")}
    assert p["sc"] is not None and p["simclr"] is not None and p["sc"] < p["simclr"]
    assert control(board, "sc").adjusted_p == pytest.approx(2 * p["sc"])
    assert control(board, "simclr").adjusted_p == pytest.approx(max(2 * p["sc"], p["simclr"]))


def test_seeds_are_paired_over_the_folds_and_label_draws_that_both_have(make_row: Any, frame: Frame) -> None:
    def folds(method: str, values: dict[tuple[int, int], float], **more: Any) -> list[dict[str, Any]]:
        return [
            make_row(method, seed, value, fold=fold, labels="folds", **more) for (seed, fold), value in values.items()
        ]

    board = only(build(frame(
        folds("sc", {(0, 0): 0.9, (0, 1): 0.5, (1, 0): 0.8}),
        folds("random_init", {(0, 0): 0.6, (1, 0): 0.7, (1, 1): 0.1, (2, 0): 0.3}, steps=0),
    )))  # fmt: skip
    assert control(board).values == pytest.approx({0: 0.3, 1: 0.1})
    assert board.entry("sc").values == pytest.approx({0: 0.7, 1: 0.8})
    assert board.entry("sc").missing == (2,)
    other_draw = only(build(frame([make_row("sc", 0, 0.9)], [make_row("random_init", 0, 0.5, label_seed=7, steps=0)])))
    assert other_draw.entry("sc").control is None


def test_versions_data_and_code_are_never_averaged(make_runs: Runs, frame: Frame) -> None:
    base = make_runs("random_init", [0.5, 0.6], steps=0)
    for field, value in (("numbers_version", 1), ("data_sha256", "e" * 64)):
        boards = build(frame(make_runs("sc", [0.6, 0.7]), base, make_runs("sc", [0.1, 0.2], **{field: value})))
        assert sorted(board.entry("sc").mean for board in boards) == pytest.approx([0.15, 0.65])
        assert all(any("not averaged" in warning for warning in board.warnings) for board in boards)
        assert len({board.key for board in boards}) == len({board.title for board in boards}) == 2
    board = only(build(frame(make_runs("sc", [0.6, 0.7]), base, make_runs("sc", [0.1, 0.2], code_sha256="b" * 64))))
    assert {entry.key: entry.mean for entry in board.entries if entry.method == "sc"} == pytest.approx(
        {"sc (code cccccccc)": 0.65, "sc (code bbbbbbbb)": 0.15}
    )


def test_configurations_are_entries_and_are_named_by_what_differs(make_runs: Runs, frame: Frame) -> None:
    rows = frame(
        make_runs("sc", [0.6], config={"epochs": 4, "method.patch": 0.5}),
        make_runs("sc", [0.7], config={"epochs": 8, "method.patch": 0.5}),
        # what trains nothing has the settings of the command that happened to make it
        make_runs("random_init", [0.5], steps=0, config={"epochs": 4}), make_runs("sc_null", [0.55], config={"epochs": 8}),
        make_runs("sc_null", [0.52], config={"epochs": 4}),
    )  # fmt: skip
    board = only(build(rows))
    assert [entry.key for entry in board.entries] == ["sc (epochs=8)", "sc (epochs=4)", "sc_null (epochs=8)",
                                                      "sc_null (epochs=4)", "random_init"]  # fmt: skip
    assert {e.key: e.null.other for e in board.entries if e.null} == {"sc (epochs=8)": "sc_null (epochs=8)",
                                                                      "sc (epochs=4)": "sc_null (epochs=4)"}  # fmt: skip


def test_an_unconverged_arm_makes_its_comparisons_invalid(make_runs: Runs, frame: Frame) -> None:
    base, mine = planted(8, 0.03)
    tuned: dict[str, Any] = {"evaluator": "fine_tune", "readout": None}
    for bad in ("sc", "random_init"):
        board = only(build(frame(
            make_runs("sc", mine, converged=bad != "sc", **tuned),
            make_runs("random_init", base, converged=bad != "random_init", steps=0, **tuned),
        )))  # fmt: skip
        assert control(board).verdict == "invalid" and not board.entry("sc").bold
        assert any("not converged" in flag for flag in board.entry(bad).flags)


def test_a_collapse_and_a_missing_seed_are_flagged(make_runs: Runs, make_row: Any, frame: Frame) -> None:
    board = only(build(frame(
        make_runs("sc", [0.6, 0.7]), make_runs("simclr", [0.6]), make_runs("random_init", [0.5, 0.6], steps=0),
        [make_row("sc", 1, 1.0, split="pretrain", evaluator="representation", metric="effective_rank", labels=None,
                  label_seed=None, collapsed=True)],
    )))  # fmt: skip
    assert board.entry("sc").collapsed == (1,) and board.entry("simclr").missing == (1,)
    assert any("collapsed" in flag for flag in board.entry("sc").flags)


def floors(make_runs: Runs, hog: list[float], pixels: list[float]) -> list[dict[str, Any]]:
    own = {"steps": 0, "config": {"encoder.name": "convnet_small"}}
    return make_runs("hog", hog, evaluator="svm", readout="hog", encoder="hog", **own) + make_runs(
        "pixels", pixels, readout="pixels", encoder="pixels", **own
    )


def test_works_means_above_the_best_floor_whatever_reads_it(make_runs: Runs, frame: Frame) -> None:
    base, mine = planted(4, 0.03)
    for distance, works in ((0.05, False), (-0.05, True)):
        rows = frame(make_runs("sc", mine), make_runs("random_init", base, steps=0),
                     floors(make_runs, [v + distance for v in mine], [v - 0.2 for v in mine]))  # fmt: skip
        board = only(build(rows))
        entry = board.entry("sc")
        assert board.best_floor == "hog" and entry.works is works and entry.above_floor is works
        assert "read by svm" in board.entry("hog").flags
        kept = only(build(select(rows, ["evaluator=linear_probe", "method=sc"])))
        assert kept.best_floor == "hog" and kept.entry("sc").control is not None


def test_a_repeated_measurement_counts_once_and_is_told(make_row: Any, frame: Frame) -> None:
    rows = [
        make_row("sc", 0, value, finished_at=moment) for value, moment in ((0.6, "2026-01-02"), (0.9, "2026-01-01"))
    ]
    entry = only(build(frame(rows))).entry("sc")
    assert entry.values == {0: 0.6} and any("repeated" in flag for flag in entry.flags)


def test_a_network_of_its_own_is_a_guest_unless_it_has_a_board(make_runs: Runs, frame: Frame) -> None:
    own = {"encoder": "vit_tiny"}
    base = make_runs("random_init", [0.5], steps=0)
    board = only(build(frame(make_runs("mae", [0.7], **own), base)))
    assert board.encoder == "convnet_small" and board.entry("mae").guest
    assert "other encoder: vit_tiny" in board.entry("mae").flags
    vit = make_runs("random_init", [0.4], steps=0, config={"encoder.name": "vit_tiny"}, **own)
    boards = build(frame(make_runs("mae", [0.7], **own), make_runs("sc", [0.6]), base, vit))
    assert {board.encoder: [entry.method for entry in board.entries] for board in boards} == {
        "convnet_small": ["sc", "random_init"], "vit_tiny": ["mae", "random_init"]
    }  # fmt: skip


def test_without_a_test_split_validation_is_compared_and_said_so(make_row: Any, frame: Frame) -> None:
    board = only(build(frame([make_row("sc", 0, 0.6, split="validation")])))
    assert board.split == "validation" and board.facts["split"] == "validation" and board.entry("sc").values == {0: 0.6}


def test_no_rows_no_boards(frame: Frame) -> None:
    assert build(frame()) == []


def test_published_numbers_stand_with_their_data_set_only(make_runs: Runs, frame: Frame) -> None:
    boards = build(frame(*(make_runs("sc", [0.6], dataset=name) for name in ("mnist", "fashion_mnist", "cifar10"))))
    found = {board.dataset: board.published for board in boards}
    assert not found["fashion_mnist"]
    assert {number.metric for number in found["mnist"]} == {"test_error_pct"}
    said = ("best over all epochs", "best accuracy over training", "best error over training")
    for number in found["cifar10"]:
        assert number.best_epoch_on_test is any(w in f"{number.protocol} {number.note}".lower() for w in said)
    assert 36 < sum(number.best_epoch_on_test for number in found["cifar10"]) < len(found["cifar10"])


def test_filters_name_what_is_wrong(make_runs: Runs, frame: Frame) -> None:
    rows = frame(
        make_runs("sc", [0.6, 0.7], config={"method.patch": 3.0}), make_runs("random_init", [0.5, 0.6], steps=0)
    )
    assert set(select(rows, ["seed=1"])["seed"]) == {1}
    assert set(select(rows, ["method.patch=3"])["method"]) == {"sc", "random_init"}
    assert len(select(rows, ["seed=0,1", "method=sc"])) == len(rows)
    for word, message in (
        ("sead=1", "did you mean seed"),
        ("seed", "KEY=VALUE"),
        ("seed=9", "leaves no row; there are 0, 1"),
    ):
        with pytest.raises(HarnessError, match=message):
            select(rows, [word])


def test_corrupted_images_are_never_compared_with_clean_ones(make_row: Any, make_runs: Runs, frame: Frame) -> None:
    def robust(method: str, values: dict[str, float], **more: Any) -> list[dict[str, Any]]:
        metrics = {"top1_corrupted": 1.0, "top1_noise_3": 0.5, "top1_noise": 0.9}
        own: dict[str, Any] = {"evaluator": "robustness", **more}
        return [row for readout, value in values.items() for row in (
            make_row(method, 0, 1 - value, readout=readout, split="validation", **own),
            *(make_row(method, 0, value * share, readout=readout, metric=name, **own) for name, share in metrics.items()),
        )]  # fmt: skip

    calibration: dict[str, Any] = {"evaluator": "calibration"}
    rows = frame(make_runs("sc", [0.7]), robust("sc", {"gap": 0.5, "spatial": 0.4}), robust("random_init", {"gap": 0.3}, steps=0),
                 floors(make_runs, [0.9], [0.8]), robust("pixels", {"pixels": 0.2}, steps=0, encoder="pixels"),
                 [make_row("sc", 0, 0.7, split="validation", **calibration), make_row("sc", 0, 0.1, metric="ece", **calibration)])  # fmt: skip
    boards = {board.evaluator: board for board in build(rows)}
    assert set(boards) == {"linear_probe", "robustness"}
    board = boards["robustness"]
    assert (
        board.metric == "top1_corrupted"
        and board.best_floor == "pixels"
        and "hog" not in {e.key for e in board.entries}
    )
    assert board.entry("sc").chosen == {0: "spatial"}
    assert board.entry("sc").values == {0: 0.4} and set(board.entry("sc").metrics) == {"top1_noise"}
