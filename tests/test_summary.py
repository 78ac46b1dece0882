"""The closing table: readouts chosen on validation, floors by role, unconverged comparisons left out."""

from __future__ import annotations

from typing import Any

from harness.contracts import Row
from harness.report.summary import over_seeds, summarise

PLAIN: dict[str, Any] = dict.fromkeys(Row.model_fields) | {
    "config": {}, "dataset": "digits", "data_sha256": "", "data_verified": True, "pretrain_data": "train", "encoder": "e",
    "pretrain_id": "p", "eval_id": "e", "seed": 0, "labels": "all", "steps": 0, "images_seen": 0, "views_seen": 0,
    "device": "cpu", "precision": "fp32", "num_threads": 1, "deterministic": False, "torch_version": "", "harness_version": "",
    "code_sha256": "", "numbers_version": 1, "started_at": "", "finished_at": "", "status": "FINISHED",
}  # fmt: skip


def row(
    method: str, readout: str | None, split: str, value: float, evaluator: str = "linear_probe", **more: Any
) -> Row:
    return Row(
        **{
            **PLAIN,
            "method": method,
            "readout": readout,
            "split": split,
            "value": value,
            "evaluator": evaluator,
            "metric": "top1",
            **more,
        }
    )


def both(method: str, readout: str | None, validation: float, test: float, **more: Any) -> list[Row]:
    return [row(method, readout, "validation", validation, **more), row(method, readout, "test", test, **more)]


def test_the_headline_is_chosen_on_validation_for_every_arm() -> None:
    rows = (
        both("sc", "gap", 0.9, 0.8)
        + both("sc", "spatial", 0.8, 0.95)
        + both("random_init", "gap", 0.5, 0.9)
        + both("random_init", "spatial", 0.6, 0.7)
    )
    lines = {line.method: line for line in summarise(rows)[0].lines}
    assert (lines["sc"].readout, lines["sc"].headline) == ("gap", 0.8)
    assert (lines["random_init"].readout, lines["random_init"].headline) == ("spatial", 0.7)
    gain = lines["sc"].gain
    assert gain is not None and abs(gain - 0.1) < 1e-12


def test_a_kernel_machine_on_a_network_does_not_become_its_headline() -> None:
    rows = both("sc", "spatial", 0.9, 0.88) + both("sc", "spatial", 0.85, 0.95, evaluator="svm")
    assert summarise(rows)[0].lines[0].headline == 0.88
    assert summarise(both("hog", "hog", 0.9, 0.7, evaluator="svm"))[0].lines[0].headline == 0.7


def test_folds_are_averaged_and_without_a_test_split_validation_is_shown() -> None:
    rows = [r for fold in (0, 1) for r in both("sc", "gap", 0.5, 0.2 + 0.2 * fold, fold=fold, labels="folds")]
    line = summarise(rows)[0].lines[0]
    assert line.headline is not None and abs(line.headline - 0.3) < 1e-12
    only = summarise([row("sc", "gap", "validation", 0.4)])[0]
    assert (only.split, only.lines[0].headline) == ("validation", 0.4)


def test_no_gain_is_shown_where_an_arm_has_not_converged() -> None:
    def rows(baseline_converged: bool) -> list[Row]:
        tuned = {"evaluator": "fine_tune"}
        return both("sc", None, 0.9, 0.9, converged=True, **tuned) + both(
            "random_init", None, 0.8, 0.8, converged=baseline_converged, **tuned
        )

    assert summarise(rows(True))[0].lines[0].gain_fine_tune is not None
    assert summarise(rows(False))[0].lines[0].gain_fine_tune is None


def test_the_verdict_compares_with_the_best_floor() -> None:
    rows = (
        both("sc", "gap", 0.9, 0.9)
        + both("pixels", "pixels", 0.8, 0.8)
        + both("hog", "hog", 0.95, 0.95, evaluator="svm")
    )
    verdict = summarise(rows)[0].verdict("sc")
    assert "not above the best floor, hog at 0.9500" in verdict
    assert "above the best floor, pixels" in summarise(rows[:4])[0].verdict("sc")


def seeds_of(method: str, values: dict[int, float], **more: Any) -> list[Row]:
    return [row(method, "gap", "test", value, seed=seed, **more) for seed, value in values.items()]


def test_over_seeds_differences_are_paired_and_have_an_interval_from_three_on() -> None:
    mine, base = {0: 0.9, 1: 0.8, 2: 0.85}, {0: 0.8, 1: 0.75, 2: 0.7}
    summary = over_seeds(seeds_of("sc", mine) + seeds_of("random_init", base))[0]
    lines = {(line.method, line.evaluation): line for line in summary.lines}
    line = lines["sc", "gap"]
    assert line.gain is not None and line.value.deviation is not None and line.gain.interval is not None
    assert (line.value.n, summary.seeds) == (3, (0, 1, 2))
    assert abs(line.value.mean - 0.85) < 1e-12 and abs(line.value.deviation - 0.05) < 1e-12
    # differences 0.1, 0.05, 0.15: mean 0.1, sd 0.05; t(0.975, 2) = 4.302653
    low, high = line.gain.interval
    assert abs(line.gain.mean - 0.1) < 1e-12
    assert abs((high - low) / 2 - 4.302653 * 0.05 / 3**0.5) < 1e-6
    assert lines["random_init", "gap"].gain is None
    two = over_seeds([r for r in seeds_of("sc", mine) + seeds_of("random_init", base) if r.seed < 2])[0]
    gain = two.lines[0].gain
    assert gain is not None and gain.n == 2 and gain.interval is None
    one = over_seeds(seeds_of("sc", {5: 0.9}))[0].lines[0]
    assert (one.value.n, one.value.deviation, one.gain) == (1, None, None)


def test_over_seeds_only_pairs_count_and_an_unconverged_seed_takes_the_comparison() -> None:
    rows = seeds_of("sc", {0: 0.9, 1: 0.8, 2: 0.8}) + seeds_of("random_init", {0: 0.8, 1: 0.7})
    gain = over_seeds(rows)[0].lines[0].gain
    assert gain is not None and set(gain.values) == {0, 1}
    tuned: dict[str, Any] = {"evaluator": "fine_tune", "readout": None}
    for bad in ("sc", "random_init", ""):
        rows = [
            row(method, split="test", value=0.8, seed=seed, converged=not (method == bad and seed == 1), **tuned)
            for method in ("sc", "random_init") for seed in range(3)
        ]  # fmt: skip
        line = over_seeds(rows)[0].lines[0]
        assert (line.gain is None) == bool(bad)
        assert line.converged == (bad != "sc")


def test_over_seeds_the_verdict_is_paired_with_the_floor_of_the_best_mean() -> None:
    def rows(count: int) -> list[Row]:
        return [
            r for seed in range(count)
            for r in both("sc", "gap", 0.8, 0.8 + seed / 100, seed=seed) + both("pixels", "pixels", 0.7, 0.7, seed=seed)
            + both("hog", "hog", 0.7, 0.85, seed=seed, evaluator="svm")
        ]  # fmt: skip

    assert "not above the best floor, hog at 0.8500: paired -4.50 pt over 2 seeds; below 3" in over_seeds(rows(2))[
        0
    ].verdict("sc")
    assert "95% interval -6.48 to -1.52; below 6 seeds no winner" in over_seeds(rows(3))[0].verdict("sc")
    assert "winner" not in over_seeds(rows(6))[0].verdict("sc")
