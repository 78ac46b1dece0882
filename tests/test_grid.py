"""Grids: which cells they have, which are missing, and that killed and concurrent commands leave every row once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import bench, durable, records, registry
from harness.arms import Request, failure_id, make_plan, pretext_id
from harness.compute_budgets import Budget, measure, parse_budget, resolve_budget
from harness.config import Layers, load_recipe
from harness.contracts import HarnessError
from harness.costs import Timings
from harness.engines import CellOutcome, Watcher, run_cell
from harness.grid import Cell, Planner, plan_cells, standing
from harness.grid_files import grid_names, load_grid
from harness.grid_setups import Grid, make_grid, request_of, settings_of, setups
from harness.journal import hold, journal_path, lock_path, read

TINY = {"epochs": 1, "num_threads": 1, "precision": "fp32", "data.num_pretrain_images": 256}


def tiny(**words: Any) -> Grid:
    asked = {"methods": ["sc", "simclr"], "datasets": ["digits"], "seeds": "0-1", "labels": ["5pc", "10pc"],
             "evaluators": ["knn"], "overrides": TINY} | words  # fmt: skip
    return make_grid(**asked)


@pytest.fixture
def base(tmp_path: Path) -> Request:
    return Request("", "", workspace=tmp_path, tracking="none")


# ------------------------------------------------------------------------------------------------------- pure parts


def test_every_combination_is_a_request_once_with_seeds_inside_a_point() -> None:
    grid = tiny(
        methods=["sc", "simclr", "sc"], encoders=["convnet_small", "paper_mnist"], axes={"batch_size": (32, 64)}
    )
    groups = list(setups(grid))
    assert len(groups) == 4 and all([s.method for s in group] == ["sc", "simclr"] for group in groups)
    assert {(g[0].encoder, dict(g[0].point)["batch_size"]) for g in groups} == {
        (e, b) for e in ("convnet_small", "paper_mnist") for b in (32, 64)
    }
    request = request_of(grid, Request("", ""), groups[1][0], 3, "5pc", 7)
    assert request.layers.flags == {"seed": 3, "encoder.name": "convnet_small", "epochs": 7}
    assert request.layers.overrides["batch_size"] == 64 and request.labels == "5pc" and request.evaluators == ("knn",)


def test_a_setting_of_one_method_reaches_that_method_only() -> None:
    grid = tiny(overrides={"method.simclr.temperature": 0.2}, axes={"method.sc.patch": (2, 3)})
    request = request_of(grid, Request("", ""), next(setups(grid))[1], 0, "5pc", None)
    assert request.layers.overrides == {}
    assert dict(request.layers.recipes[-1].methods) == {"simclr": {"temperature": 0.2}, "sc": {"patch": 2}}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"methods": []}, "names no methods"),
        ({"methods": ["simclrr"]}, "did you mean simclr"),
        ({"datasets": ["digit"]}, "did you mean digits"),
        ({"labels": ["10px"]}, "labels '10px' is not understood"),
        ({"evaluators": ["kn"]}, "did you mean knn"),
        ({"seeds": "0:4"}, "--seeds '0:4' is not understood"),
        ({"budget": "hours=3"}, "images=5e6, epochs=50 or seconds=600"),
        ({"overrides": {"seed": 1}}, "named by --seeds"),
        ({"overrides": {"epochs": 1}, "budget": "images=1e4"}, "leave one out"),
        ({"overrides": {"batch_size": 32}, "axes": {"batch_size": (32,)}}, "axis of the grid and set as well"),
        ({"overrides": {"method.patch": 3}}, "write method.NAME.patch"),
        ({"overrides": {"method.byol.momentum": 0.9}}, "byol is no method of this grid"),
    ],
)
def test_a_wrong_word_of_a_grid_is_named(words: dict[str, Any], says: str) -> None:
    with pytest.raises(HarnessError, match=says.replace("*", r"\*")):
        tiny(**words)


def test_a_wrong_setting_ends_the_grid_before_any_work(base: Request) -> None:
    with pytest.raises(HarnessError, match=r"unknown setting 'method.pacth'"):
        plan_cells(tiny(overrides={"method.sc.pacth": 3}), base)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("images=5e6", Budget(images=5e6)),
        ("epochs=50", Budget(epochs=50)),
        ("seconds=1.5, epochs=3", Budget(epochs=3, seconds=1.5)),
    ],
)
def test_budgets_are_read(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    "text", ["", "images", "images=0", "images=-1", "images=nan", "images=inf", "epochs=1.5", "epochs=2,epochs=3"]
)
def test_budgets_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(HarnessError, match="is not understood"):
        parse_budget(text)


# ------------------------------------------------------------------------------------------------------- grid files


@pytest.mark.parametrize("name", grid_names())
def test_shipped_grids_resolve(name: str) -> None:
    grid = make_grid(**load_grid(name))
    for group in setups(grid):
        for setup in group:
            request = request_of(grid, Request("", ""), setup, grid.seeds[0], grid.labels[0], None)
            settings_of(request)


def test_a_grid_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[grid]\nmethods = ["sc"]\ndatasets = "digits"\nseeds = [3, 5]\nlabels = [100, "all"]\neval = ["knn"]\n'
        'budget = "images=1000"\nrecipe = ["quick"]\n[run]\nbatch_size = 64\n[method.sc]\npatch = 2\n'
        '[axes]\n"data.num_pretrain_images" = [500, "none"]\noptim.lr = [0.1]\n'
    )
    asked = load_grid(str(path))
    assert asked["datasets"] == ("digits",) and asked["labels"] == ("100", "all") and asked["seeds"] == "3,5"
    assert asked["axes"] == {"data.num_pretrain_images": (500, None), "optim.lr": (0.1,)}
    assert [recipe.name for recipe in asked["recipes"]] == ["quick", str(path)]
    assert asked["recipes"][1].methods == {"sc": {"patch": 2}} and asked["recipes"][1].run == {"batch_size": 64}
    assert make_grid(**asked).seeds == (3, 5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[grid]\nmethod = ['sc']", "did you mean methods"),
        ("[gird]\n", "unknown table .gird."),
        ("[grid]\nmethods = 1.5", "must be a list of words"),
        ("[axes]\nepochs = 3", "must be a list of values"),
        ("[method.scc]\npatch = 3", "did you mean sc"),
        ("[grid", "not valid TOML"),
    ],
)
def test_a_wrong_grid_file_is_one_line(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(HarnessError, match=says):
        load_grid(str(path))


# ------------------------------------------------------------------------------------------------------------ cells


def test_controls_are_shared_and_evaluations_of_a_pretraining_gathered(base: Request) -> None:
    planned = plan_cells(tiny(), base, flops=True)
    cells = planned.cells
    assert len({cell.pretrain_id for cell in cells}) == len(cells)
    by_method: dict[str, list[Cell]] = {}
    for cell in cells:
        by_method.setdefault(cell.method, []).append(cell)
    counts = {method: len(found) for method, found in by_method.items()}
    floors = dict.fromkeys(registry.methods_with_role("floor"), 2)
    controls = dict.fromkeys(registry.methods_with_role("control"), 2)
    # one per seed; a supervised network is another one for each label budget
    supervised = {name: 4 for name in controls if registry.load_method(name).supervised}
    assert counts == {"sc": 2, "sc_null": 2, "simclr": 2} | controls | floors | supervised
    for cell in by_method["sc"] + by_method["random_init"]:
        assert {e.labels for e in cell.evaluations if e.evaluator == "knn"} == {"5pc", "10pc"}
    # the same identities as the plain command's
    request = request_of(tiny(), base, next(setups(tiny()))[1], 1, "10pc", None)
    assert {arm.pretrain_id for arm in make_plan(request).arms} <= {cell.pretrain_id for cell in cells}
    assert all((cell.flops_per_image or 0) > 0 for cell in cells if cell.steps)


def test_what_cannot_run_is_refused_with_its_reason_and_the_rest_is_planned(base: Request) -> None:
    planned = plan_cells(tiny(labels=["5pc", "9000"], seeds="0"), base)
    assert {cell.evaluations[0].labels for cell in planned.cells} == {"5pc"}
    assert len(planned.refused) == 2 and all("asks for 9000" in reason for reason in planned.refused.values())
    with pytest.raises(HarnessError, match="asks for 9000"):
        plan_cells(tiny(labels=["9000"]), base)


class Inline:
    """An engine in this process: what another one has to do, in five lines."""

    def __init__(self) -> None:
        self.planner, self.given = Planner(), []  # type: ignore[var-annotated]

    def outcomes(self, cells: Sequence[Cell], watcher: Watcher) -> Iterator[CellOutcome]:
        for cell in cells:
            self.given.append(cell.pretrain_id)
            yield run_cell(cell, self.planner)

    def close(self) -> None:
        return


class Listening:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, float | None, int]] = []
        self.waits = 0

    def started(self, cell: Cell) -> None:
        return

    def progress(self, cell: Cell, text: str) -> None:
        return

    def note(self, text: str) -> None:
        return

    def finished(self, cell: Cell, outcome: CellOutcome, remaining: float | None, unknown: int) -> None:
        self.lines.append((cell.method, outcome.status, remaining, unknown))

    def waiting(self, count: int) -> None:
        self.waits += 1


def failing(base: Request, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Cell], Any]:
    """Two cells of digits, the first of which fails while `broken` is set."""
    cells = [c for c in plan_cells(tiny(methods=["simclr"], seeds="0", labels=["5pc"]), base).cells
             if c.method in ("simclr", "random_init")]  # fmt: skip
    plugin, broken = registry.load_method("simclr"), {"on": True}
    real = plugin.loss

    def loss(self: Any, batch: Any, step: Any) -> Any:
        if broken["on"]:
            raise RuntimeError("a planted fault")
        return real(self, batch, step)

    monkeypatch.setattr(plugin, "loss", loss)
    return cells, broken


def test_a_failed_cell_is_reported_and_run_again_only_when_asked(
    base: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, broken = failing(base, monkeypatch)
    workspace, first = base.workspace, cells[0]
    report = bench.carry_out(cells, workspace, Inline(), Listening())
    assert [report.status(cell) for cell in cells] == ["FAILED", "FINISHED"]
    assert "a planted fault" in report.problems[first.pretrain_id]
    broken["on"] = False
    engine = Inline()
    report = bench.carry_out(cells, workspace, engine, Listening())
    assert engine.given == [] and report.failed == [first]
    assert "--retry-failed" in report.problems[first.pretrain_id]
    report = bench.carry_out(cells, workspace, engine, Listening(), retry_failed=True)
    assert engine.given == [first.pretrain_id] and report.failed == []
    assert not records.rows_path(workspace, first.pretrain_id, failure_id(first.pretrain_id)).exists()


def test_a_loss_that_is_not_finite_is_never_run_again(base: Request) -> None:
    cell = plan_cells(tiny(methods=["simclr"], seeds="0", labels=["5pc"]), base).cells[0]
    engine = Inline()
    bench.carry_out([cell], base.workspace, engine, Listening())
    path = records.rows_path(base.workspace, cell.pretrain_id, pretext_id(cell.pretrain_id))
    document = durable.read_sealed(path)
    assert document is not None
    document["rows"] = [row | {"status": "NONFINITE", "metric": "status", "value": None} for row in document["rows"]]
    durable.write_sealed(path, document)
    again = Inline()
    report = bench.carry_out([cell], base.workspace, again, Listening(), retry_failed=True)
    assert again.given == [] and report.status(cell) == "NONFINITE"


def test_a_lost_process_leaves_a_row_that_says_so(base: Request) -> None:
    cell = plan_cells(tiny(methods=["simclr"], seeds="0", labels=["5pc"]), base).cells[0]
    outcome = run_cell(cell, Planner(), lost="the worker process was killed by signal 9 (SIGKILL)")
    assert outcome.status == "FAILED" and "SIGKILL" in (outcome.problem or "")
    assert standing(base.workspace, cell).status == "FAILED"


def test_a_cell_in_other_hands_is_left_and_come_back_for(base: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BUSY_SECONDS", 0.0)
    cells = [c for c in plan_cells(tiny(methods=["simclr"], seeds="0", labels=["5pc"]), base).cells
             if c.method in ("simclr", "random_init")]  # fmt: skip
    workspace, watcher, engine = base.workspace, Listening(), Inline()
    lock = hold(lock_path(workspace, cells[0].pretrain_id))
    lock.__enter__()

    def waiting(count: int) -> None:
        watcher.waits += 1
        lock.__exit__(None, None, None)  # the other process dies without having finished it

    watcher.waiting = waiting  # type: ignore[method-assign]
    report = bench.carry_out(cells, workspace, engine, watcher)
    assert report.failed == [] and watcher.waits == 1
    assert engine.given == [cells[0].pretrain_id, cells[1].pretrain_id, cells[0].pretrain_id]


def test_the_remaining_time_comes_from_similar_cells(base: Request) -> None:
    cells = [c for c in plan_cells(tiny(methods=["simclr"], labels=["5pc"]), base).cells if c.method == "simclr"]
    watcher = Listening()
    bench.carry_out(cells[:1], base.workspace, Inline(), watcher)
    rows = records.read_all(base.workspace)
    timings = Timings(rows)
    own = {row.eval_id: row.device_seconds for row in rows}
    first, second = cells
    spent = sum(own[eval_id] or 0.0 for eval_id in first.eval_ids)
    assert timings.estimate(second, second.eval_ids) == pytest.approx(spent)  # as many steps, the same evaluations
    assert timings.estimate(second, second.eval_ids[1:]) == pytest.approx(spent - (own[first.eval_ids[0]] or 0.0))
    assert timings.estimate(replace(second, steps=3 * second.steps), second.eval_ids[:1]) == pytest.approx(
        3 * (own[first.eval_ids[0]] or 0.0)
    )
    assert timings.estimate(replace(second, dataset="mnist"), second.eval_ids) is None
    assert timings.total(cells, lambda c: c.eval_ids) == (pytest.approx(2 * spent), 0)
    assert Timings().total(cells, lambda c: c.eval_ids) == (None, 2)


def test_a_study_lists_what_is_wanted_and_grows(base: Request) -> None:
    cells = plan_cells(tiny(methods=["simclr"], seeds="0", labels=["5pc"]), base).cells
    path = bench.write_study(base.workspace, "mine", cells[:1])
    bench.write_study(base.workspace, "mine", cells[1:])
    document = durable.read_sealed(path)
    assert document is not None and path == base.workspace / "results" / "studies" / "mine" / "study.json"
    assert document["eval_ids"] == sorted({eval_id for cell in cells for eval_id in cell.eval_ids})
    with pytest.raises(HarnessError, match="plain name"):
        bench.write_study(base.workspace, "../mine", cells)


def test_the_live_table_counts_what_is_finished_running_and_failed(base: Request) -> None:
    from io import StringIO

    from rich.console import Console

    from harness.grid import Standing
    from harness.grid_console import BenchConsole

    cells = plan_cells(tiny(methods=["simclr"], labels=["5pc"], axes={"batch_size": (32,)}), base).cells
    first, second = (cell for cell in cells if cell.method == "simclr")
    watcher = BenchConsole(cells, {cell.pretrain_id: Standing("missing") for cell in cells})
    watcher.started(first)
    watcher.finished(first, CellOutcome(first.pretrain_id, "FINISHED", seconds=1.0), 7200.0, 3)
    watcher.started(second)
    watcher.progress(second, "simclr pretrain 3/8 [bold]")
    out = StringIO()
    Console(file=out, width=160).print(watcher._table())
    line = next(line for line in out.getvalue().splitlines() if "simclr" in line)
    assert [word.strip() for word in line.strip("│").split("│")] == [
        "simclr",
        "digits batch_size=32",
        "convnet_small",
        "1/2",
        "1",
        "",
    ]
    assert "simclr pretrain 3/8 [bold]" in out.getvalue()
    assert "about 2.0 h and 3 cells of unknown length left" in out.getvalue()


# ---------------------------------------------------------------------------------------------------------- budgets


def plan_of(base: Request, method: str = "simclr") -> Any:
    layers = Layers(overrides={k: v for k, v in TINY.items() if k != "epochs"})
    return make_plan(replace(base, method=method, dataset="digits", labels="5pc", layers=layers))


def test_a_budget_of_images_is_rounded_to_epochs_and_the_least_part_binds(base: Request) -> None:
    plan = plan_of(base)
    bound = resolve_budget(Budget(images=1000), plan, base.workspace)
    assert (bound.epochs, bound.images, bound.binds) == (4, 1024, "images=1000")  # of 256 images, batches of 128
    assert resolve_budget(Budget(images=10), plan, base.workspace).epochs == 1
    bound = resolve_budget(Budget(images=1000, epochs=2), plan, base.workspace)
    assert (bound.epochs, bound.binds) == (2, "epochs=2")
    planned = plan_cells(tiny(budget="images=1000", overrides={k: v for k, v in TINY.items() if k != "epochs"}), base,
                         bound_of=lambda plan: resolve_budget(Budget(images=1000), plan, base.workspace))  # fmt: skip
    assert {cell.steps for cell in planned.cells if cell.method in ("sc", "simclr", "supervised")} == {8}
    assert len(planned.bounds) == 2


def test_a_budget_of_seconds_is_measured_once_and_kept(base: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness import compute_budgets

    speeds = iter([5120.0, 9.0])
    monkeypatch.setattr(compute_budgets, "measure", lambda plan, arm: next(speeds))
    plan = plan_of(base)
    dry = resolve_budget(Budget(seconds=0.5), plan, base.workspace, record=False)
    assert dry.epochs == 10 and not list(base.workspace.rglob("*"))
    speeds = iter([5120.0, 9.0])
    assert resolve_budget(Budget(seconds=0.5), plan, base.workspace).epochs == 10
    assert resolve_budget(Budget(seconds=0.25), plan_of(base), base.workspace).epochs == 5
    other = resolve_budget(Budget(seconds=0.25), plan_of(base, "rotation"), base.workspace)
    assert other.epochs == 1 and other.images_per_second == 9.0  # another method is another probe; never less than one


def test_the_probe_trains_for_a_moment_and_leaves_nothing(base: Request) -> None:
    plan = plan_of(base)
    assert measure(plan, plan.arms[0]) > 0
    assert not list(base.workspace.rglob("*.json*")) and not list(base.workspace.rglob("*.safetensors"))


# --------------------------------------------------------------------------------------------- through the command


def start(*words: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from harness.cli import main; main()", *words], cwd=cwd, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process: subprocess.Popen[str], code: int = 0, timeout: float = 900) -> Any:
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, err
    return json.loads(out)


def kill_when(process: subprocess.Popen[str], workspace: Path, files: int, timeout: float) -> None:
    """SIGKILL a command and its workers as soon as `files` row files are there and a training is under way."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        if len(list((workspace / "results" / "runs").glob("*/*.json"))) >= files:
            break
        time.sleep(0.05)
    assert process.poll() is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def assert_every_row_once(workspace: Path, cells: list[dict[str, Any]], documents: list[dict[str, Any]]) -> None:
    wanted = {(cell["pretrain_id"], e["eval_id"]) for cell in cells for e in cell["evaluations"]}
    wanted |= {(cell["pretrain_id"], pretext_id(cell["pretrain_id"])) for cell in cells}
    there = {(p.parent.name, p.stem) for p in (workspace / "results" / "runs").glob("*/*.json")}
    assert there == wanted
    rows = records.read_all(workspace)
    keys = [
        (r.method, r.dataset, r.pretrain_id, r.evaluator, r.readout, r.labels, r.fold, r.split, r.metric, r.seed)
        for r in rows
    ]
    assert len(set(keys)) == len(keys) and all(row.status == "FINISHED" for row in rows)
    for document in documents:
        assert {cell["status"] for cell in document["cells"]} == {"FINISHED"}
        assert {row["eval_id"] for row in document["rows"]} <= {eval_id for _, eval_id in wanted}


def assert_nothing_was_trained_twice(workspace: Path, cells: list[dict[str, Any]], struck: int) -> None:
    """Only an attempt that a kill struck may be repeated, and no more of them than there were workers to strike."""
    repeated = 0
    for cell in cells:
        kinds = [record for record, _ in read(journal_path(workspace, cell["pretrain_id"]))]
        executed = sum(r["executed"] for r in kinds if r["kind"] == "steps" and r["phase"] == "pretrain")
        attempts = [r for r in kinds if r["kind"] == "start"]
        ends = [r["status"] for r in kinds if r["kind"] == "end"]
        assert ends[-1] == "FINISHED"
        assert executed >= cell["steps"]
        if len(attempts) == 1:
            assert executed == cell["steps"], cell
        else:
            assert len(ends) < len(attempts), cell  # an attempt without an end: it was killed
            repeated += 1
    assert repeated <= struck


def killed_and_shared(
    tmp_path: Path, words: Sequence[str], kills: Sequence[int], jobs: int, timeout: float
) -> list[Any]:
    """Kill a grid when so many row files are there, restart it by two processes at once; the cells of the dry run."""
    command = ("bench", *words, "--jobs", str(jobs), "--tracking", "none", "--checkpoint-seconds", "0.5", "--json")
    cells = finish(start(*command, "--dry-run", cwd=tmp_path), timeout=timeout)["cells"]
    assert not (tmp_path / "results").exists()
    for files in kills:
        kill_when(start(*command, cwd=tmp_path), tmp_path, files, timeout)
    both = [start(*command, cwd=tmp_path) for _ in range(2)]
    documents = [finish(process, timeout=timeout) for process in both]
    assert_every_row_once(tmp_path, cells, documents)
    assert_nothing_was_trained_twice(tmp_path, cells, jobs * len(kills))
    assert all(document["steps_executed"] < sum(cell["steps"] for cell in cells) for document in documents)
    again = finish(start(*command, cwd=tmp_path), timeout=timeout)
    assert again["steps_executed"] == 0 and len(again["rows"]) == len(documents[0]["rows"])
    return list(cells)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_grid_that_is_killed_and_shared_by_two_commands_has_every_row_once(tmp_path: Path) -> None:
    settings = [word for key, value in (TINY | {"epochs": 20}).items() for word in ("--set", f"{key}={value}")]
    words = [
        "--methods",
        "sc,simclr",
        "--datasets",
        "digits",
        "--seeds",
        "0",
        "--labels",
        "5pc",
        "--eval",
        "knn",
        *settings,
    ]
    cells = killed_and_shared(tmp_path, words, [1], 1, 900)
    assert sum(cell["role"] == "control" and cell["method"] == "random_init" for cell in cells) == 1


def test_a_mistake_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    process = start("bench", "--methods", "sc", "--seeds", "0-1", cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err == "harness: the grid names no datasets; give --datasets or a grid file with them\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(900)
def test_sigterm_ends_a_bench_cleanly_and_it_says_how_to_go_on(tmp_path: Path) -> None:
    process = start("bench", "--methods", "simclr", "--datasets", "digits", "--eval", "knn", "--labels", "5pc", "--set", "epochs=400",
                    "--tracking", "none", cwd=tmp_path)  # fmt: skip
    journals = tmp_path / ".harness" / "journals"
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and not any('"metrics"' in p.read_text() for p in journals.glob("*.jsonl")):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "the same command continues" in err and "Traceback" not in err
    ends = [record for path in journals.glob("*.jsonl") for record, _ in read(path) if record["kind"] == "end"]
    assert ends[-1]["status"] == "INTERRUPTED"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_grid_on_real_data_killed_twice_and_restarted_by_two_commands(tmp_path: Path) -> None:
    """Three methods, two data sets, three seeds. The folder of MNIST and Fashion-MNIST is in HARNESS_DATA."""
    if "HARNESS_DATA" not in os.environ:
        pytest.skip("HARNESS_DATA names no folder of real data")
    load_recipe("quick")
    words = ["--methods", "sc,simclr,rotation", "--datasets", "mnist,fashion_mnist", "--seeds", "10-12", "--labels", "10pc",
             "--recipe", "quick", "--set", "data.num_pretrain_images=1000", "--set", "epochs=2", "--eval", "knn"]  # fmt: skip
    cells = killed_and_shared(tmp_path, words, [3, 30], 2, 5400)
    arms = 3 + 1 + len(registry.methods_with_role("control")) + len(registry.methods_with_role("floor"))
    assert len(cells) == 2 * 3 * arms
