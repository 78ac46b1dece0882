"""What a search found: the expected best, what may be said of importance, searches at work, and files for others."""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import optuna
import pytest
from typer.testing import CliRunner

from harness import durable, live_studies, studies, study_slices, tuning
from harness.cli import app, main
from harness.contracts import HarnessError

STUDY = "planted"


@pytest.fixture(scope="module")
def workspace(planted_study: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search of two methods, and one that is at work: its trials are in the storage alone."""
    folder = tmp_path_factory.mktemp("study")
    planted_study.plant(folder, STUDY)
    planted_study.write(folder, STUDY, agreement=0.2)
    planted_study.plant(folder, "at-work", ("sc",), 6, waiting=3)
    return folder


@pytest.fixture(scope="module")
def study(workspace: Path) -> studies.Study:
    return studies.read(studies.read_search(workspace, STUDY))


def harness(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def complaint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> str:
    """The one line that a command with bad input says, having ended with 2."""
    codes: list[int] = []
    monkeypatch.setattr(sys, "argv", ["harness", *map(str, words)])
    monkeypatch.setattr("os._exit", codes.append)
    monkeypatch.setattr("harness.cli._watch_signals", lambda: None)
    main()
    out, err = capsys.readouterr()
    assert codes == [2] and not out and err.count("\n") == 1, (codes, out, err)
    return err


# ------------------------------------------------------------------------------------------------------ expected best


@pytest.mark.parametrize(
    "values", [[0.7], [0.3, 0.1], [0.5, 0.5, 0.5], [0.2, 0.9, 0.9, 0.1, 0.4], list(np.linspace(0, 1, 8) ** 2)]
)
def test_the_expected_best_is_the_mean_over_all_choices_of_trials(values: list[float]) -> None:
    brute = [np.mean([max(some) for some in itertools.combinations(values, n)]) for n in range(1, len(values) + 1)]
    assert studies.expected_best(values) == pytest.approx(brute, abs=1e-14)


def test_the_expected_best_rises_from_the_mean_to_the_maximum_for_many_trials() -> None:
    values = np.random.default_rng(0).normal(size=2000)
    curve = studies.expected_best(values)
    assert curve[0] == pytest.approx(values.mean()) and curve[-1] == pytest.approx(values.max())
    assert np.all(np.diff(curve) >= -1e-12) and np.isfinite(curve).all()


def test_a_pruned_or_failed_trial_counts_as_the_worst_completed_one(study: studies.Study) -> None:
    one = study.methods[0]
    found = sorted(trial.value for trial in one.complete if trial.value is not None)
    lost = one.counts["PRUNED"] + one.counts["FAIL"]
    assert lost == 7 and len(one.expected_best) == len(found) + lost == 24
    assert one.expected_best[0] == pytest.approx((sum(found) + lost * found[0]) / 24)
    assert one.expected_best[-1] == pytest.approx(found[-1])


# -------------------------------------------------------------------------------------------------------- conclusions


def test_best_history_and_counts_are_of_completed_trials_alone(study: studies.Study) -> None:
    """Optuna keeps a pruned trial's last probe as its value; one that was planted to be high must not win."""
    one = study.methods[0]
    assert one.counts == {"COMPLETE": 17, "PRUNED": 6, "FAIL": 1, "RUNNING": 0, "WAITING": 0}
    assert one.failures == {"NONFINITE": 1}
    assert all(trial.value is None for trial in one.trials if trial.state != "COMPLETE")
    assert one.best is not None and one.best.value == max(trial.value or 0 for trial in one.complete)
    best = [value for _, value in one.history if value is not None]
    assert best == sorted(best) and best[-1] == one.best.value and one.steps[-1] is one.best


def test_importance_names_the_planted_setting_and_needs_ten_trials(study: studies.Study, workspace: Path) -> None:
    for one in study.methods:
        assert next(iter(one.importance)) == "optim.lr" and sum(one.importance.values()) == pytest.approx(1)
    few = studies.read(live_studies.document(workspace, "at-work")).methods[0]
    assert len(few.complete) == 4 and few.importance == {}
    assert "too few, 10 are needed" in harness("study", "show", "at-work", "--workspace", workspace).stdout


def test_importance_of_several_objectives_is_of_reaching_high_values_of_the_first(tmp_path: Path) -> None:
    """The same trials lead to the same shares whether the cost is an objective beside the accuracy or not."""
    storage, random = tuning.default_storage(tmp_path), np.random.default_rng(1)
    space = {key: optuna.distributions.FloatDistribution(0, 1) for key in "ab"}
    points = [{key: float(random.random()) for key in "ab"} for _ in range(20)]
    for count in (1, 2):
        made = optuna.create_study(study_name=f"s{count}/m", storage=tuning.connect(storage),
                                   directions=["maximize", "minimize"][:count])  # fmt: skip
        made.add_trials([optuna.trial.create_trial(params=p, distributions=space, values=[p["a"] ** 8, 1.0][:count])
                         for p in points])  # fmt: skip
    assert tuning.importances(storage, "s1/m") == pytest.approx(tuning.importances(storage, "s2/m"))


def test_slices_tell_apart_thirds_and_values(study: studies.Study) -> None:
    one = study.methods[0]
    found = {slice.key: slice for slice in study_slices.slices(one)}
    assert next(iter(found)) == "optim.lr" and set(found) == set(one.space)
    assert [part.name for part in found["schedule.name"].parts] == ["step", "cosine"]
    assert [part.name for part in found["method.patches"].parts] == ["2", "3", "4"]
    rates = found["optim.lr"].parts
    assert [part.name for part in rates] == ["0.01 to 0.0311", "0.0311 to 0.0965", "0.0965 to 0.3"]
    assert max(rates, key=lambda part: part.mean) is rates[1]
    assert one.best is not None
    for slice in found.values():
        assert sum(part.count for part in slice.parts) == 17 and max(p.best for p in slice.parts) == one.best.value


def test_the_difference_is_paired_over_the_seeds_that_both_have() -> None:
    facts = {"dataset": "digits", "split": "test", "default": {"values": {"5": 0.5, "6": 0.7, "7": 0.6, "8": 0.1}},
             "tuned": {"values": {"5": 0.6, "6": 0.8, "7": 0.71, "9": 0.9}}}  # fmt: skip
    done = studies._confirmed(facts)
    assert done.seeds == [5, 6, 7] and done.gap is not None and done.gap.n == 3
    assert done.gap.mean == pytest.approx(done.mean("tuned") - done.mean("default"))
    assert done.gap.low is not None and done.gap.low < done.gap.mean
    assert studies._confirmed({**facts, "tuned": {"values": {}}}).gap is None


# ----------------------------------------------------------------------------------------------------------- commands


def test_a_search_at_work_is_listed_and_shown_from_its_storage(workspace: Path) -> None:
    listed = json.loads(harness("study", "list", "--workspace", workspace, "--json").stdout)["studies"]
    assert [one["study"] for one in listed] == ["at-work", STUDY]
    shown = json.loads(harness("study", "show", "at-work", "--workspace", workspace, "--json").stdout)["methods"]["sc"]
    assert shown["counts"] == {"complete": 4, "pruned": 1, "fail": 1, "running": 0, "waiting": 3}
    assert shown["cost"]["binds"] == "3 of 9 trials are not over" and shown["confirmed"] is None
    named = harness("study", "show", "at-work", "--workspace", workspace / "elsewhere", "--storage",
                    f"sqlite:///{workspace}/optuna.db", "--json")  # fmt: skip
    assert json.loads(named.stdout)["methods"]["sc"] == shown


def test_the_file_says_what_the_storage_says_of_a_finished_search(workspace: Path, study: studies.Study) -> None:
    assert studies.read(live_studies.document(workspace, STUDY)) == study


def test_a_terminal_shows_best_importance_expected_best_and_warnings(workspace: Path, study: studies.Study) -> None:
    text = harness("study", "show", STUDY, "--workspace", workspace).stdout
    one = study.methods[0]
    assert one.best is not None
    for words in (f"{100 * one.expected_best[4]:.2f}", f"(trial {one.best.number})", "rests on 17 completed trials",
                  "Spearman +0.20", "1 failed: NONFINITE", "test split of digits", "0.0311 to 0.0965"):  # fmt: skip
        assert words in text, words


def test_an_export_holds_every_trial_and_the_recipes(workspace: Path, study: studies.Study, tmp_path: Path) -> None:
    out = json.loads(
        harness("study", "export", STUDY, "--workspace", workspace, "--out", tmp_path / "out", "--json").stdout
    )
    assert set(out["files"]) == {"trials.csv", "importance.csv", "expected_best.csv", "table.md", "best-sc.toml",
                                 "best-simclr.toml"}  # fmt: skip
    folder = Path(out["folder"])
    with open(folder / "trials.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 48
    for line, trial in zip(lines, [trial for one in study.methods for trial in one.trials], strict=True):
        assert line["state"] == trial.state and float(line["seconds"]) == trial.seconds
        assert line["linear_probe.top1"] == ("" if trial.value is None else repr(trial.value))
        assert bool(line["last_probe"]) is (trial.state == "PRUNED") and line["reason"] == (trial.reason or "")
        assert float(line["optim.lr"]) == trial.params["optim.lr"]
        assert line["seeds"].count(":") == len(trial.seeds)
    with open(folder / "expected_best.csv") as file:
        curve = [float(line["expected_best"]) for line in csv.DictReader(file) if line["method"] == "sc"]
    assert curve == study.methods[0].expected_best
    table = (folder / "table.md").read_text()
    gap = study.methods[0].confirmed
    assert gap is not None and gap.gap is not None and f"{100 * gap.gap.mean:+.2f}" in table and "17 complete" in table
    assert (folder / "best-sc.toml").read_text() == (
        studies.study_folder(workspace, STUDY) / "best-sc.toml"
    ).read_text()


def test_an_export_stands_beside_what_tune_wrote_unless_told_otherwise(workspace: Path) -> None:
    folder = studies.study_folder(workspace, STUDY)
    trials = (folder / "trials.csv").read_bytes()
    assert harness("study", "export", STUDY, "--workspace", workspace).exit_code == 0
    assert (folder / "trials.csv").read_bytes() == trials and (folder / "importance.csv").is_file()


def test_a_workspace_without_searches_says_so_and_stays_empty(tmp_path: Path) -> None:
    assert "no searches yet" in harness("study", "list", "--workspace", tmp_path).stdout
    assert json.loads(harness("study", "list", "--workspace", tmp_path, "--json").stdout) == {"studies": []}
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_line(workspace: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "did you mean planted?" in complaint(
        capsys, monkeypatch, "study", "show", "plantd", "--workspace", workspace
    )
    assert "harness tune" in complaint(capsys, monkeypatch, "study", "export", "x", "--workspace", tmp_path)
    for name in ("../planted", "..", ""):
        assert "there is no search" in complaint(capsys, monkeypatch, "study", "show", name, "--workspace", workspace)
    storage = f"sqlite:///{tmp_path}/none.db"
    said = complaint(capsys, monkeypatch, "study", "list", "--workspace", workspace, "--storage", storage)
    assert "there is no such file" in said and not (tmp_path / "none.db").exists()
    said = complaint(capsys, monkeypatch, "study", "list", "--storage", "mysql://me:secret@host/database")
    assert "secret" not in said and "postgresql://" in said


def test_a_changed_file_is_not_believed(planted_study: ModuleType, tmp_path: Path) -> None:
    planted_study.plant(tmp_path, "changed", ("sc",), 3)
    file = planted_study.write(tmp_path, "changed") / "tuning.json"
    document = json.loads(file.read_text())
    document["methods"]["sc"]["seconds"] = 0.0
    durable.write_json(file, document)
    with pytest.raises(HarnessError, match="is damaged"):
        studies.read_search(tmp_path, "changed")


def test_reading_a_finished_search_imports_no_optuna(workspace: Path) -> None:
    """The page reads the file alone."""
    code = ("import sys; from pathlib import Path; from harness.report import page, studies; "
            f"assert len(studies.views(Path({str(workspace)!r}), {{}}, ())) == 1; assert 'optuna' not in sys.modules")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
