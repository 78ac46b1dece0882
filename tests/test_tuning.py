"""Searches: what they vary, that no test image is seen, that a trial is a run, and that any kill leaves exactly N trials."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import optuna
import pytest

import harness
from harness import registry, search, search_files, tuning
from harness.arms import Request
from harness.config import load_recipe
from harness.contracts import Choice, HarnessError, Range
from harness.journal import finished as ended
from harness.journal import is_alive, journals_folder, lock_path
from harness.search import Asked, make_searches
from harness.search_space import Dimension, PairedDraws, SpaceFile, digest, load_space
from harness.search_workers import Ended, work
from harness.trials import Search, measure

TINY = {"epochs": 3, "num_threads": 1, "precision": "fp32", "data.num_pretrain_images": 256}
NARROW = SpaceFile(False, {"optim.lr": Range(0.01, 0.1, log=True), "schedule.name": Choice(("step", "cosine"))})


def asked(*methods: str, **words: Any) -> Asked:
    given: dict[str, Any] = {"dataset": "digits", "report_on": "digits", "trials": 3, "overrides": TINY, "space": NARROW,
                             "objectives": ("linear_probe.gap.top1",)} | words  # fmt: skip
    return Asked(methods or ("sc",), **given)


@pytest.fixture
def base(tmp_path: Path) -> Request:
    return Request("", "", workspace=tmp_path, labels="10pc", tracking="none")


def carried_out(words: Asked, base: Request) -> list[Search]:
    searches = make_searches(words, base)
    for one in searches:
        tuning.prepare(one)
    work(searches, lambda message: None)
    return searches


def records(one: Search) -> list[tuning.TrialRecord]:
    return tuning.read_trials(one.storage, one.name)


# ------------------------------------------------------------------------------------------- what is varied, and by what


def test_ranges_come_from_the_settings_and_a_file_overrides_them(base: Request, tmp_path: Path) -> None:
    [one] = make_searches(asked(space=SpaceFile()), base)
    keys = {dimension.key for dimension in one.space}
    assert {"optim.lr", "optim.weight_decay", "schedule.name", "batch_size", "method.temperature"} <= keys
    (tmp_path / "space.toml").write_text(
        "[space]\noptim.lr = { low = 0.1, high = 0.2 }\n[method.sc]\npatches_per_image = [2, 3]\n"
    )
    file = load_space(str(tmp_path / "space.toml"))
    [two] = make_searches(asked(space=file), base)
    assert {d.key: d.search for d in two.space}["optim.lr"] == Range(0.1, 0.2)
    assert {d.key: d.search for d in two.space}["method.patches_per_image"] == Choice((2, 3))
    assert digest(one.space) != digest(two.space)


def test_what_is_set_is_not_varied_and_adamw_has_rates_of_its_own(base: Request) -> None:
    words = asked("sc", "mae", space=SpaceFile(), overrides=TINY | {"schedule.name": "step"})
    spaces = {one.method: {d.key: d.search for d in one.space} for one in make_searches(words, base)}
    assert all("schedule.name" not in space for space in spaces.values())
    assert spaces["sc"]["optim.lr"] == Range(1e-3, 1.0, log=True) and spaces["mae"]["optim.lr"].high == 1e-2  # type: ignore[union-attr]


@pytest.mark.parametrize("search_", [Range(1, 5), Range(1e-3, 1.0, log=True), Range(0.1, 0.9), Choice(("a", None, 3))])
def test_a_share_becomes_a_value_inside_its_range(search_: Any) -> None:
    whole = search_ == Range(1, 5)
    values = [Dimension("x", search_, whole).at(share) for share in np.linspace(0, 1, 200, endpoint=False)]
    if isinstance(search_, Choice):
        assert set(values) == set(search_.values)
    else:
        assert min(values) >= search_.low and max(values) <= search_.high
        assert not whole or set(values) == {1, 2, 3, 4, 5}


def test_draws_of_a_key_depend_on_nothing_but_the_study_and_the_number() -> None:
    one, two = PairedDraws(["a", "b", "c"], 7), PairedDraws(["c", "b", "a"], 7)
    assert [one.share("b", n) for n in range(9)] == [two.share("b", n) for n in range(9)]
    shares = np.array([[one.share(key, n) for key in "abc"] for n in range(64)])
    assert ((shares >= 0) & (shares < 1)).all() and (np.histogram(shares[:, 0], 8, (0, 1))[0] >= 7).all()
    assert one.share("a", 3) != PairedDraws(["a", "b", "c"], 8).share("a", 3)


def test_methods_that_are_compared_share_trials_seeds_and_draws(base: Request) -> None:
    searches = make_searches(asked("sc", "simclr", space=SpaceFile(), trials=4), base)
    assert {(one.sampler, one.trials, one.seeds) for one in searches} == {("qmc", 4, (0,))}
    settings = []
    for one in searches:
        study = tuning.prepare(one)
        taken = [tuning.claim(one, study) for _ in range(5)]
        assert taken[4] is None
        settings.append([tuning.suggest(one, trial) for trial in taken[:4] if trial is not None])
    for left, right in zip(*settings, strict=True):
        shared = set(left) & set(right)
        assert {"optim.lr", "optim.weight_decay", "schedule.name", "batch_size"} <= shared
    for key in ("optim.lr", "optim.weight_decay", "schedule.name", "batch_size"):
        assert [s[key] for s in settings[0]] == [s[key] for s in settings[1]]


def test_the_untrained_network_takes_part_where_fine_tuning_is_tuned(base: Request) -> None:
    searches = make_searches(asked("sc", objectives=("fine_tune.top1",), space=SpaceFile()), base)
    assert [(one.method, one.trials) for one in searches] == [("sc", 3), ("random_init", 3)]
    assert {d.key for d in searches[1].space} == {d.key for d in searches[0].space if d.key.startswith("eval.")}
    assert searches[1].pruner == "none"


# --------------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"trials": 0}, "--trials 0"),
        ({"objectives": ("linear_prob.top1",)}, "unknown objective 'linear_prob.top1'.*did you mean linear_probe"),
        ({"objectives": ("linear_probe.gap.loss",)}, "the metric is top1"),
        ({"objectives": ("linear_probe.gab.top1",)}, "unknown objective.*linear_probe.gap.top1"),
        ({"objectives": ("representation.top1",)}, "uses no labels"),
        ({"objectives": ("fine_tune.gap.top1",)}, "has no readouts"),
        ({"objectives": ("cost",)}, "cost alone"),
        ({"sampler": "tpee"}, "unknown --sampler 'tpee'; did you mean tpe"),
        ({"pruner": "ash"}, "unknown --pruner 'ash'; did you mean asha"),
        ({"pruner": "wilcoxon", "seeds": 2}, "--pruner wilcoxon: it compares seeds.*--seeds 5"),
        ({"pruner": "asha", "overrides": TINY | {"epochs": 1}}, "trials of 1 epoch have no intermediate values"),
        ({"pruner": "median", "objectives": ("knn.top1", "cost")}, "several objectives"),
        ({"space": SpaceFile(False, {"optim.lr": Range(-1.0, 1.0)})}, "search range of optim.lr: .*greater than 0"),
        ({"space": SpaceFile(False, {"schedule.name": Choice(("cosine", "linear"))})}, "search range of schedule.name"),
        ({"space": SpaceFile(False, {"optim.lrr": Range(0.1, 1.0)})}, "unknown setting 'optim.lrr'.*did you mean optim.lr"),
        ({"space": SpaceFile(False, {"seed": Range(0, 9)})}, "no hyperparameter"),
        ({"space": SpaceFile(False)}, "nothing to vary"),
        ({"overrides": TINY | {"optim.lr": 0.1}}, "optim.lr has a range in --space and is set as well"),
        ({"study": "a/b"}, "must be a plain name"),
        ({"storage": "mysql://x:secret@nowhere/y"}, r"--storage mysql://x:\*\*\*@nowhere/y: give"),
        ({"storage": "sqlite:////nonexistent/folder/x.db"}, "cannot be reached"),
    ],
)  # fmt: skip
def test_a_wrong_word_of_a_search_is_one_clear_line(words: dict[str, Any], says: str, base: Request) -> None:
    with pytest.raises(HarnessError, match=says) as caught:
        for one in make_searches(asked(**words), base):
            tuning.prepare(one)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("epochs", "looks"), [(1, ()), (2, (1,)), (3, (1,)), (4, (1, 2)), (7, (2, 3)), (9, (2, 3, 4)), (60, (15, 20, 30))]
)
def test_half_of_the_trials_go_on_after_a_quarter_a_third_and_half_of_the_epochs(
    epochs: int, looks: tuple[int, ...], base: Request
) -> None:
    [one] = make_searches(asked(pruner="asha"), base)
    assert tuning.rungs(one, epochs) == looks


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_better_half_goes_on(direction: str, base: Request) -> None:
    """Against a count by hand, trial after trial; at a rung of factor 2 as Optuna's own successive halving decides."""
    [one] = make_searches(asked(pruner="asha"), base)
    values = [0.5, 0.4, 0.6, 0.6, 0.55, 0.1, 0.7, 0.58, 0.62, math.nan]
    gone = [False, True, False, False, True, True, False, False, False, True]
    sign = 1 if direction == "maximize" else -1
    study, theirs = (optuna.create_study(direction=direction, pruner=pruner) for pruner in
                     (tuning._make_pruner(one), optuna.pruners.SuccessiveHalvingPruner(1, 2)))  # fmt: skip
    for value, ends in zip(values, gone, strict=True):
        trials = study.ask(), theirs.ask()
        assert not trials[0].should_prune()  # nothing was said yet
        for trial in trials:
            trial.report(sign * value, 1)
        assert trials[0].should_prune() == ends
        assert math.isnan(value) or trials[1].should_prune() == ends


def test_pruning_what_trains_nothing_is_refused(base: Request) -> None:
    space = SpaceFile(False, {"eval.knn.temperature": Range(0.01, 1.0)})
    with pytest.raises(HarnessError, match="trains nothing"):
        make_searches(asked("random_init", pruner="asha", objectives=("knn.top1",), space=space), base)


def test_the_command_ends_with_2_and_one_line_without_the_password(tmp_path: Path) -> None:
    words = ["tune", "--method", "sc", "--dataset", "digits", "--trials", "1", "--workspace", str(tmp_path),
             "--storage", "postgresql://me:secret@127.0.0.1:1/there"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", "from harness.cli import main; main()", *words], text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "secret" not in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert re.search(r"--storage postgresql://me:\*\*\*@127.0.0.1:1/there", done.stderr)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[space]\noptim.lr = { low = 1 }", "optim.lr must be"),
        ("[space]\noptim.lr = { low = 1, high = 0.1 }", "low must be below high"),
        ("[space]\noptim.lr = { low = 0.0, high = 0.1, log = true }", "above 0 in the logarithm"),
        ("[spaces]\n", "unknown spaces"),
        ("[method.scc]\n", "did you mean sc"),
        ("[space]\noptim.lr = []", "optim.lr must be"),
        ("not toml", "is not valid TOML"),
    ],
)
def test_a_wrong_space_file_is_named(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text(text)
    with pytest.raises(HarnessError, match=says):
        load_space(str(path))


# ------------------------------------------------------------------------------------------------------ a trial is a run


def test_the_best_recipe_gives_the_stored_validation_values_in_an_empty_workspace(
    base: Request, tmp_path: Path
) -> None:
    words = asked(trials=4, seeds=2, pruner="median", confirm_seeds=0)
    [one] = carried_out(words, base)
    result = search.collect(one)
    assert result.best is not None and any(t.intermediate for t in result.records)
    search.write(words, [result])
    best = result.records[result.best]
    recipe = load_recipe(str(search_files.study_folder(tmp_path, one.study) / "best.toml"))
    assert recipe.run["labels"] == "10pc" and recipe.run["method"] == "sc"
    rows = harness.run(recipe=str(search_files.study_folder(tmp_path, one.study) / "best.toml"), labels="10pc",
                       seeds=[0, 1], evaluators=["linear_probe"], workspace=tmp_path / "empty", control=False,
                       tracking="none")  # fmt: skip
    for seed, values in best.attrs["seeds"].items():
        mine = rows[(rows.seed == int(seed)) & (rows.split == "validation") & (rows.readout == "gap")]
        assert list(mine.value) == values
        assert set(mine.pretrain_id) <= set(best.attrs["pretrain_ids"])
    assert best.values == (sum(v[0] for v in best.attrs["seeds"].values()) / 2,)


def test_probes_change_no_weight(base: Request, tmp_path: Path) -> None:
    [one] = make_searches(asked(), base)
    looks: list[tuple[int, float]] = []
    digests = []
    for name, look in (("with", lambda epoch, value: looks.append((epoch, value))), ("without", None)):
        request = replace(one.request_of({"optim.lr": 0.05}, 0), workspace=tmp_path / name)
        found = measure(one, request, search.Planner(), harness.runner.Silent(), look, (1, 2))
        rows = harness.records.load_results(tmp_path / name)
        digests.append((found.values, set(rows.weights_sha256)))
    assert digests[0] == digests[1] and [epoch for epoch, _ in looks] == [1, 2]
    assert all(0 <= value <= 1 for _, value in looks)


def test_optuna_alone_opens_the_study(base: Request) -> None:
    [one] = carried_out(asked(trials=3, pruner="median"), base)
    study = optuna.load_study(study_name=one.name, storage=f"sqlite:///{base.workspace}/optuna.db")
    assert len(study.trials) == 3 and {t.state.name for t in study.trials} <= {"COMPLETE", "PRUNED"}
    assert set(study.trials[0].params) == {"optim.lr", "schedule.name"} and study.trials[0].intermediate_values
    assert study.user_attrs["sampler"] == "tpe" and study.user_attrs["space_digest"] == digest(one.space)
    files = {p.stem for p in (base.workspace / "results" / "runs").glob("*/*.json")}
    assert set(study.best_trial.user_attrs["eval_ids"]) <= files
    assert tuning.study_names(one.storage) == [one.name] and tuning.best_numbers(one.storage, one.name) == [
        study.best_trial.number
    ]


def test_failures_are_recorded_and_do_not_end_the_study(base: Request) -> None:
    space = SpaceFile(False, {"optim.lr": Choice((1e30, 0.05))})
    [one] = carried_out(asked(trials=6, space=space, sampler="random", pruner="none"), base)
    reasons = {t.params["optim.lr"]: (t.state, t.attrs.get("reason")) for t in records(one)}
    assert reasons[1e30] in [("FAIL", "NONFINITE"), ("FAIL", "COLLAPSED")] and reasons[0.05] == ("COMPLETE", None)
    assert len(records(one)) == 6


def test_settings_that_do_not_fit_are_a_failed_trial(base: Request) -> None:
    space = SpaceFile(False, {"batch_size": Choice((64, 2048))})
    [one] = carried_out(asked(trials=6, space=space, sampler="random", pruner="none"), base)
    failed = [t for t in records(one) if t.state == "FAIL"]
    assert failed and all(t.attrs["reason"].startswith("REFUSED: batch_size 2048") for t in failed)


def test_accuracy_against_cost_has_a_pareto_set(base: Request) -> None:
    words = asked(trials=3, objectives=("cost", "knn.top1"), space=SpaceFile(False, {"epochs": Choice((1, 4))}),
                  overrides={k: v for k, v in TINY.items() if k != "epochs"}, confirm_seeds=0)  # fmt: skip
    [one] = carried_out(words, base)
    result = search.collect(one)
    assert [o.name for o in one.objectives] == ["knn.top1", "cost"]
    assert set(search.pareto(result)) == set(tuning.best_numbers(one.storage, one.name))


def test_several_seeds_under_wilcoxon_report_one_value_each(base: Request) -> None:
    words = asked(trials=2, seeds=5, pruner="wilcoxon", overrides=TINY | {"epochs": 1})
    [one] = carried_out(words, base)
    for trial in records(one):
        assert set(trial.intermediate) == set(range(len(trial.attrs["seeds"]))) and trial.state == "COMPLETE"


# ------------------------------------------------------------------------------------------------- the test split is shut


def settings_and_values(one: Search) -> list[Any]:
    return [(t.state, t.params, t.values, t.intermediate) for t in records(one)]


def test_other_test_labels_change_no_trial(base: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    plugin, _ = registry.load_dataset("digits")
    decoded = plugin._decoded  # type: ignore[attr-defined]
    for name in ("as_they_are", "permuted"):
        [one] = carried_out(asked(trials=3), replace(base, workspace=tmp_path / name))
        found.append(settings_and_values(one))

        def permuted(self: Any) -> Any:
            splits = decoded(self)
            test = splits["test"]
            assert test.labels is not None
            return {**splits, "test": type(test)(test.images, test.labels.flip(0))}

        monkeypatch.setattr(plugin, "_decoded", permuted)
    assert found[0] == found[1]


def test_opening_the_test_split_raises_while_tuning(base: Request) -> None:
    [one] = make_searches(asked(), base)
    plan = search.Planner().plan(one.request_of({}, 0))
    assert not plan.material.has_test
    with pytest.raises(HarnessError, match="the test split is closed"):
        plan.material.split("test")


@pytest.mark.parametrize("state", ["missing", "unreadable"])
def test_a_search_completes_without_a_test_split(
    state: str, base: Request, tmp_path: Path, published_formats: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    published_formats.write_idx(tmp_path / "data", np.random.default_rng(0), num_train=300)
    for file in (tmp_path / "data" / "MNIST" / "raw").glob("t10k*"):
        if state == "missing":
            file.unlink()
        else:
            file.write_bytes(b"no idx file")
    words = asked(dataset="mnist", report_on="mnist", overrides=TINY | {"data.num_pretrain_images": 256, "epochs": 1,
                  "encoder.name": "convnet_small"})  # fmt: skip
    [one] = carried_out(words, replace(base, data_dir=tmp_path / "data", offline=True))
    assert [t.state for t in records(one)] == ["COMPLETE"] * 3


# -------------------------------------------------------------------------------------------------- resuming and killing


def test_the_same_command_goes_on_and_a_larger_number_adds(base: Request) -> None:
    [one] = carried_out(asked(trials=2), base)
    before = settings_and_values(one)
    [one] = carried_out(asked(trials=2), base)
    assert settings_and_values(one) == before
    [one] = carried_out(asked(trials=3), base)
    assert settings_and_values(one)[:2] == before and len(records(one)) == 3
    assert len({tuple(sorted(t.params.items())) for t in records(one)}) == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            {"space": SpaceFile(False, {"optim.lr": Range(0.02, 0.1)})},
            r"another search space \(optim.lr, schedule.name\)",
        ),
        ({"objectives": ("knn.top1",)}, "another objective"),
        ({"seeds": 2}, "another seeds"),
        ({"overrides": TINY | {"epochs": 4}}, "another settings"),
        ({"sampler": "random"}, "another sampler"),
    ],
)
def test_another_search_under_the_same_name_is_refused(words: dict[str, Any], says: str, base: Request) -> None:
    [one] = make_searches(asked(study="mine"), base)
    tuning.prepare(one)
    [other] = make_searches(asked(study="mine", **words), base)
    with pytest.raises(HarnessError, match=f"study 'mine' was made with {says}.*--study"):
        tuning.prepare(other)


def test_a_trial_whose_worker_is_gone_is_begun_again_with_its_settings(base: Request) -> None:
    [one] = make_searches(asked(trials=2, pruner="none"), base)
    study = tuning.prepare(one)
    trial = tuning.claim(one, study)
    assert trial is not None and trial.number == 0
    settings = tuning.suggest(one, trial)
    assert tuning.revive(one, study) == []  # no lock of it is there, and it has a heartbeat
    lock = lock_path(base.workspace, one.trial_journal(0))
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()  # its worker was here, and holds it no more
    assert tuning.revive(one, study) == [0]
    work([one], lambda message: None)
    assert [t.state for t in records(one)] == ["COMPLETE", "COMPLETE"] and records(one)[0].params == settings
    assert not tuning.finish(study, trial, "COMPLETE", [0.5]), "the first worker was alive after all: it is too late"


def test_a_stopped_worker_gives_its_trial_back(base: Request) -> None:
    [one] = make_searches(asked(trials=1, pruner="median"), base)
    tuning.prepare(one)

    class Stop(BaseException):
        pass

    def tell(message: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        work([one], tell)
    assert [t.state for t in records(one)] == ["WAITING"]
    assert all(ended(path) for path in journals_folder(base.workspace).glob("*.jsonl"))


def test_a_cap_on_compute_ends_a_search(base: Request) -> None:
    [one] = carried_out(asked(trials=5, compute=1e-6), base)
    result = search.collect(one)
    assert sum(t.state == "COMPLETE" for t in result.records) == 1 and "compute=1e-06 binds after 1" in result.binds


def command(workspace: Path, *words: str) -> list[str]:
    fixed = ["tune", "--dataset", "digits", "--labels", "10pc", "--workspace", str(workspace), "--set", "num_threads=1",
             "--set", "data.num_pretrain_images=256", "--set", "precision=fp32"]  # fmt: skip
    return [sys.executable, "-c", "from harness.cli import main; main()", *fixed, *words]


@contextmanager
def begun(words: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, all of which is gone afterwards."""
    process = subprocess.Popen(
        words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


def states(storage: str, name: str) -> list[str]:
    if storage.startswith("sqlite") and not Path(storage.removeprefix("sqlite:///")).exists():
        return []
    try:
        return [t.state for t in tuning.read_trials(storage, name)]
    except HarnessError:
        return []


def workers_of(parent: int) -> list[int]:
    """Worker processes, by their command line, whose parent is `parent`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            below = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if below == parent and b"tune-worker" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie that nobody has waited for."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers under /proc")
def test_a_killed_worker_and_a_killed_parent_leave_exactly_the_trials_asked_for(tmp_path: Path) -> None:
    words = command(tmp_path, "--method", "sc,simclr", "--trials", "4", "--workers", "2", "--set", "epochs=40", "--study", "s",
                    "--confirm-seeds", "1", "--pruner", "none")  # fmt: skip
    storage = tuning.default_storage(tmp_path)
    with begun(words) as first:
        wait_until(lambda: "COMPLETE" in states(storage, "s/sc"), 300)
        wait_until(lambda: "RUNNING" in states(storage, "s/sc") + states(storage, "s/simclr"), 300)
        victim = workers_of(first.pid)[0]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: len(workers_of(first.pid)) == 2 and victim not in workers_of(first.pid), 120)
        orphans = workers_of(first.pid)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        wait_until(lambda: not any(alive(pid) for pid in orphans), 60)
    with begun(words) as second:
        out, _ = second.communicate(timeout=1500)
    assert second.returncode == 0, out
    for method in ("sc", "simclr"):
        assert len(states(storage, f"s/{method}")) == 4
        assert set(states(storage, f"s/{method}")) <= {"COMPLETE", "FAIL"}
        assert all(t.state == "COMPLETE" or t.attrs["reason"] for t in tuning.read_trials(storage, f"s/{method}"))
    assert not any(is_alive(path) for path in (tmp_path / ".harness" / "locks").glob("*.lock"))
    assert all(ended(path) for path in journals_folder(tmp_path).glob("*.jsonl"))
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = {run.info.run_id: run for run in client.search_runs(["1"], max_results=1000)}
    assert runs and {run.info.status for run in runs.values()} <= {"FINISHED", "FAILED"}
    roles = {run_id: run.data.tags["harness.role"] for run_id, run in runs.items()}
    for run in runs.values():  # study -> trial -> run; the winners' further runs lie below the study
        parent = run.data.tags.get("mlflow.parentRunId")
        if run.data.tags["harness.pretrain_id"].startswith("study-"):
            assert (parent is None) == ("-trial-" not in run.data.tags["harness.pretrain_id"])
        else:
            assert parent in roles


SPACE = "[space]\neval.knn.temperature = { low = 0.01, high = 1.0, log = true }\n"


def eight_by_twenty(workspace: Path, *words: str) -> list[str]:
    (workspace / "space.toml").write_text("declared = false\n" + SPACE)
    return command(workspace, "--method", "random_init", "--objective", "knn.top1", "--space", str(workspace / "space.toml"),
                   "--trials", "160", "--workers", "8", "--study", "many", "--confirm-seeds", "0", "--tracking", "none",
                   *words)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "pruner"), [("gp", "hyperband"), ("tpe", "median")])
def test_settings_found_on_one_data_set_are_judged_on_another(
    sampler: str, pruner: str, tmp_path: Path, published_formats: ModuleType
) -> None:
    published_formats.write_idx(tmp_path / "data", np.random.default_rng(0), folder="FashionMNIST/raw")
    words = [
        "tune", "--method", "rotation", "--tune-on", "digits", "--report-on", "fashion_mnist", "--trials", "3", "--recipe",
        "quick", "--sampler", sampler, "--pruner", pruner, "--labels", "2pc", "--confirm-seeds", "2", "--tracking", "none",
        "--study", "across", "--workspace", str(tmp_path / "ws"), "--data-dir", str(tmp_path / "data"), "--offline", "--set",
        "data.num_pretrain_images=40", "--set", "batch_size=20", "--set", "num_threads=1",
    ]  # fmt: skip
    code = "from harness.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "chosen on digits, judged on fashion_mnist" in done.stdout
    rows = harness.load_results(tmp_path / "ws")
    assert set(rows[rows.split == "test"].dataset) == {"fashion_mnist"}
    assert set(rows[rows.dataset == "digits"].split) <= {"validation", "pretrain"}
    assert set(rows[rows.dataset == "fashion_mnist"].seed).isdisjoint(rows[rows.dataset == "digits"].seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_eight_workers_share_a_sqlite_study(tmp_path: Path) -> None:
    with begun(eight_by_twenty(tmp_path)) as process:
        out, _ = process.communicate(timeout=3500)
    assert process.returncode == 0, out
    assert states(tuning.default_storage(tmp_path), "many/random_init") == ["COMPLETE"] * 160


@pytest.mark.postgres
@pytest.mark.timeout(3600)
def test_eight_workers_share_a_postgresql_study_across_its_restart(tmp_path: Path, postgres: Any) -> None:
    with begun(eight_by_twenty(tmp_path, "--storage", postgres.url)) as process:
        wait_until(lambda: finished_trials(postgres.url) >= 40, 1200)
        postgres.restart()
        out, _ = process.communicate(timeout=2400)
    assert process.returncode == 0 and "secret" not in out, out
    assert states(postgres.url, "many/random_init") == ["COMPLETE"] * 160
    assert "secret" not in (search_files.study_folder(tmp_path, "many") / "tuning.json").read_text()


def finished_trials(url: str) -> int:
    try:
        return states(url, "many/random_init").count("COMPLETE")
    except Exception:  # the command has not made its tables yet
        return 0


@pytest.mark.postgres
def test_optuna_alone_opens_a_postgresql_study(base: Request, postgres: Any) -> None:
    [one] = carried_out(asked(trials=2, storage=postgres.url), base)
    study = optuna.load_study(study_name=one.name, storage=postgres.url.replace("postgresql:", "postgresql+psycopg:"))
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 2


def test_a_trial_given_back_is_judged_once_at_each_rung(base: Request, recwarn: pytest.WarningsRecorder) -> None:
    [one] = make_searches(asked(pruner="asha", trials=3, overrides=TINY | {"epochs": 4}), base)
    study = tuning.prepare(one)

    def taken(number: int) -> optuna.Trial:
        trial = tuning.claim(one, study)
        assert trial is not None and trial.number == number
        return trial

    first = taken(0)
    assert tuning.goes_on(first, 1, 0.5) and tuning.goes_on(first, 2, 0.4)
    tuning.release(study, first._trial_id)
    again, better = taken(0), taken(1)
    assert tuning.goes_on(better, 1, 0.6) and tuning.goes_on(better, 2, 0.6)
    assert tuning.goes_on(again, 1, 0.5) and tuning.goes_on(again, 2, 0.4)  # as before, whatever came meanwhile

    third = taken(2)
    assert not tuning.goes_on(third, 1, 0.1)
    tuning.release(study, third._trial_id)  # killed before it was ended: told, and nothing decided
    assert not tuning.goes_on(taken(2), 1, 0.1)
    assert not [one for one in recwarn if "already reported" in str(one.message)]


def test_a_trial_that_another_worker_has_finished_is_dropped(base: Request) -> None:
    [one] = make_searches(asked(trials=1, pruner="none"), base)
    study = tuning.prepare(one)
    heard: list[Any] = []

    def tell(message: Any) -> None:
        heard.append(message)
        if len(heard) == 1:  # begun: it is held for lost, and somebody else ends it meanwhile
            tuning.finish(study, optuna.Trial(study, study.get_trials()[0]._trial_id), "COMPLETE", [0.25])

    work([one], tell)
    assert [(t.state, t.values) for t in records(one)] == [("COMPLETE", (0.25,))]
    assert not any(isinstance(message, Ended) for message in heard)
