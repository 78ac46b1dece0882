"""The product through its command line, on real data (digits): rows, cache, bits, leaks, signals."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import cli
from harness.contracts import Row

SMALL = (
    "--set", "eval.fine_tune.min_steps=20", "--labels", "10pc", "--epochs", "2", "--set", "num_threads=1", "--set", "precision=fp32",
)  # fmt: skip
COMMAND = ("run", "--method", "sc", "--dataset", "digits", *SMALL)


Harness = Callable[..., str]
Done = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def harness(forks: Any) -> Harness:
    """harness(*words, cwd=...) -> stdout of the command, which must end with 0."""

    def run(*words: str, cwd: Path) -> str:
        done: subprocess.CompletedProcess[str] = forks.run(*words, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def mlflow_runs(workspace: Path) -> tuple[Any, list[Any]]:
    """Its store as MLflow's own client reads it, and the runs in it."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{workspace}/mlflow.db")
    experiment = client.get_experiment_by_name("harness")
    return client, list(client.search_runs([experiment.experiment_id], max_results=100)) if experiment else []


def essence(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What must be equal between two runs: identity, value and weights; not times."""
    keys = ("method", "evaluator", "readout", "labels", "fold", "split", "metric", "seed", "value", "pretrain_id", "eval_id",
            "weights_sha256", "label_subset_sha256", "data_sha256", "steps", "status", "collapsed", "converged")  # fmt: skip
    return sorted((tuple(row[k] for k in keys) for row in rows), key=str)


@pytest.fixture(scope="module")
def done(forks: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """One finished command: its workspace and rows."""
    workspace = tmp_path_factory.mktemp("done")
    done = forks.run(*COMMAND, "--json", cwd=workspace, code=forks.command)  # with all its pictures
    assert done.returncode == 0, done.stderr
    yield workspace, json.loads(done.stdout)["rows"]


def test_rows_are_complete_unique_and_plain(done: Done) -> None:
    workspace, rows = done
    assert {row["method"] for row in rows} == {
        "sc",
        "sc_null",
        "random_init",
        "supervised",
        "pixels",
        "pixels_svm",
        "hog",
    }
    keys = [
        tuple(row[k] for k in ("method", "evaluator", "readout", "labels", "fold", "split", "metric", "seed"))
        for row in rows
    ]
    assert len(set(keys)) == len(keys)
    for row in rows:
        assert set(row) == set(Row.model_fields)
        assert row["value"] is not None or row["metric"] == "status"
        text = json.dumps(row)
        assert str(workspace) not in text and str(Path.home()) not in text and f'"{os.uname().nodename}"' not in text
    assert {row["evaluator"] for row in rows if row["method"] == "sc"} == {
        "pretext",
        "linear_probe",
        "knn",
        "fine_tune",
        "representation",
    }
    assert {row["readout"] for row in rows if row["evaluator"] == "linear_probe" and row["method"] == "sc"} == {
        "gap",
        "spatial",
        "spatial_pca",
    }
    assert {row["split"] for row in rows if row["evaluator"] == "linear_probe"} == {"validation", "test"}
    subsets = {row["label_subset_sha256"] for row in rows if row["labels"]}
    assert len(subsets) == 1  # every arm is measured with the same labelled images


def test_rerun_trains_nothing_and_returns_the_same_rows(done: Done, harness: Harness) -> None:
    workspace, rows = done
    files = {p: p.stat().st_mtime_ns for p in (workspace / "results" / "runs").rglob("*.json")}
    again = json.loads(harness(*COMMAND, "--json", cwd=workspace))["rows"]
    assert essence(again) == essence(rows)
    assert {p: p.stat().st_mtime_ns for p in (workspace / "results" / "runs").rglob("*.json")} == files
    shown = json.loads(harness("show", "latest", "--json", cwd=workspace))
    assert shown["steps"] == shown["steps_executed"] == 2 * (1297 // 128)


def test_same_seed_same_bits_in_another_workspace(done: Done, harness: Harness, tmp_path: Path) -> None:
    again = json.loads(harness(*COMMAND, "--no-control", "--tracking", "none", "--json", cwd=tmp_path))["rows"]
    assert {row["method"] for row in again} == {"sc"}
    assert essence(again) == essence([row for row in done[1] if row["method"] == "sc"])


def test_every_mlflow_run_is_finished_and_holds_the_numbers(done: Done) -> None:
    workspace, rows = done
    client, found = mlflow_runs(workspace)
    runs = [
        [
            r.info.status,
            r.data.tags,
            r.data.params,
            r.data.metrics,
            [a.path for a in client.list_artifacts(r.info.run_id)],
        ]
        for r in found
    ]
    assert len(runs) == len({row["pretrain_id"] for row in rows})
    assert {run[0] for run in runs} == {"FINISHED"}
    sc = next(run for run in runs if run[1]["harness.method"] == "sc")
    assert sc[2]["optim.lr"] == "0.1" and sc[2]["method.patch"] == "0.5"
    value = next(
        r["value"]
        for r in rows
        if r["method"] == "sc"
        and r["readout"] == "gap"
        and r["split"] == "test"
        and r["metric"] == "top1"
        and r["evaluator"] == "linear_probe"
    )
    assert value in sc[3].values()
    assert {"config.json", "environment.json", "figures"} <= set(sc[4])


def test_the_table_names_controls_and_where_things_are(done: Done, harness: Harness) -> None:
    out = harness(*COMMAND, cwd=done[0])
    for word in (
        "sc",
        "random_init",
        "pixels_svm",
        "hog",
        "headline",
        "kNN",
        "fine-tune",
        "results/runs",
        "harness ui",
        "one seed",
    ):
        assert word in out


def test_evaluate_reuses_the_pretraining(done: Done, harness: Harness) -> None:
    workspace, _ = done
    rows = json.loads(
        harness("evaluate", "latest", "--labels", "5pc", "--eval", "knn", "--no-control", "--json", cwd=workspace)
    )["rows"]
    mine = [row for row in rows if row["evaluator"] == "knn"]
    assert mine and {row["labels"] for row in mine} == {"5pc"}
    assert json.loads(harness("show", "latest", "--json", cwd=workspace))["attempts"] <= 2


def test_python_api_reads_what_the_command_wrote(done: Done) -> None:
    import torch

    import harness as package

    workspace, rows = done
    frame = package.load_results(workspace)
    assert list(frame.columns) == list(Row.model_fields)
    assert len(frame) >= len(rows)
    encoder = package.load_encoder("latest", workspace)
    assert encoder(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)).shape == (2, 64, 6, 6)


def test_supervised_identity_depends_on_its_labels(harness: Harness, tmp_path: Path) -> None:
    ids = []
    for labels in ("10pc", "all"):
        out = harness(
            "run",
            "--method",
            "supervised",
            "--dataset",
            "digits",
            "--labels",
            labels,
            "--dry-run",
            "--json",
            cwd=tmp_path,
        )
        ids.append({arm["method"]: arm["pretrain_id"] for arm in json.loads(out)["arms"]})
    assert ids[0]["supervised"] != ids[1]["supervised"]
    assert ids[0]["random_init"] == ids[1]["random_init"]


LEAKY = '''"""Digits whose test split raises when it is opened before the end."""
from harness.contracts import HarnessError
from harness.datasets.digits import Digits


class NoTest(Digits):
    """Digits whose test split must not be opened"""

    name = "no_test"

    def split(self, name):
        if name == "test":
            raise RuntimeError("the test split was opened")
        return super().split(name)
'''


def test_a_test_split_that_raises_disturbs_nothing_before_the_end(forks: Any, tmp_path: Path) -> None:
    from harness import registry

    digits, _ = registry.load_dataset("digits")
    plugins = tmp_path / "plugins"
    (plugins / "datasets").mkdir(parents=True)
    (plugins / "datasets" / "no_test.py").write_text(
        LEAKY.replace("Digits)", f"{digits.__name__})").replace("import Digits", f"import {digits.__name__}")
    )
    code = (
        "import sys; from pathlib import Path; from harness import registry; registry.add_folder(Path(sys.argv[1]))\n"
        "from harness.arms import Request; from harness.config import Layers; from harness.runner import execute\n"
        "request = Request('sc', 'no_test', Layers(flags={'epochs': 1}), Path('w').resolve(), evaluators=('linear_probe', 'knn'),"
        " labels='10pc', control=False, tracking='none', allow_test=False)\n"
        "rows = execute(request).rows\n"
        "assert {r.split for r in rows if r.labels} == {'validation'}, rows\n"
        "request = Request(**{**vars(request), 'allow_test': True, 'evaluators': ('linear_probe',)})\n"
        "outcome = execute(request)\n"
        "assert 'the test split was opened' in outcome.problems[0], outcome.problems\n"
        "print('ok')\n"
    )
    done = forks.run(str(plugins), cwd=tmp_path, code=code)
    assert done.stdout.strip() == "ok", done.stderr


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_cleanly_and_it_continues(signum: int, code: int, forks: Any, tmp_path: Path) -> None:
    long = (
        "run",
        "--method",
        "sc",
        "--dataset",
        "digits",
        "--epochs",
        "400",
        "--eval",
        "knn",
        "--no-control",
        "--labels",
        "10pc",
    )
    process = forks.start(*long, cwd=tmp_path)
    journals = tmp_path / ".harness" / "journals"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any('"metrics"' in p.read_text() for p in journals.glob("*.jsonl")):
        time.sleep(0.2)
    process.send_signal(signum)
    asked = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert time.monotonic() - asked < 10
    assert "the same command continues" in err
    assert "Traceback" not in err
    records = [json.loads(line) for line in next(journals.glob("*.jsonl")).read_text().splitlines()]
    assert records[-1]["kind"] == "end" and records[-1]["status"] == "INTERRUPTED"
    assert not cli.app(["sync", "--workspace", str(tmp_path)], standalone_mode=False)
    assert [run.info.status for run in mlflow_runs(tmp_path)[1]] == ["KILLED"]


def test_a_signal_during_a_long_call_into_c_still_ends_the_process(forks: Any, tmp_path: Path) -> None:
    """The main thread never returns to Python (a blocked read); the watching thread ends it and closes the journal."""
    code = (
        "import os, signal, sys; from pathlib import Path; from harness import cli, runner, journal\n"
        "cli.LAST_RESORT_SECONDS = 1.0\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"  # the handler never gets to interrupt anything
        "cli._watch_signals()\n"
        "j = journal.Journal(journal.journal_path(Path.cwd(), 'abc')); j.begin('n', {}, {}); runner.open_journals.append(j)\n"
        "never = os.pipe()[0]; Path('ready').touch()\n"
        "while True: os.read(never, 1)\n"
    )
    process = forks.start(cwd=tmp_path, code=code)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (tmp_path / "ready").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    last = json.loads((tmp_path / ".harness" / "journals" / "abc.jsonl").read_text().splitlines()[-1])
    assert (last["kind"], last["status"]) == ("end", "INTERRUPTED")


KILLED = ("run", "--method", "sc", "--dataset", "digits", "--epochs", "100", "--labels", "10pc", "--eval", "linear_probe,knn,fine_tune",
          "--set", "num_threads=1", "--set", "eval.fine_tune.min_steps=60", "--tracking", "none", "--checkpoint-seconds", "0.5")  # fmt: skip


def start(*words: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from harness.cli import main; main()", *words], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def kill_until_done(command: tuple[str, ...], workspace: Path, kills: int, longest: float) -> int:
    """Run `command` again and again, SIGKILL at random moments, then to the end; returns the kills that struck."""
    import random

    chance, struck = random.Random(1), 0
    for _ in range(kills):
        process = start(*command, cwd=workspace)
        try:
            process.communicate(timeout=chance.uniform(4.0, longest))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            struck += 1
    return struck


def assert_little_was_repeated(workspace: Path, interval_seconds: float) -> None:
    """What each kill cost lay within one checkpoint interval (and one log interval) of the attempt that it struck.

    Attempts are told apart by steps that come again. One that was killed before its first save repeats nothing of its
    own when the next one does: the time between two attempts, with its start of a process, is nobody's training.
    """
    checked = 0
    for path in (workspace / ".harness" / "journals").glob("*.jsonl"):
        phases: dict[str, list[dict[str, Any]]] = {}
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if record["kind"] == "steps":
                phases.setdefault(record["phase"], []).append(record)
        for records in phases.values():
            attempt = [records[0]]
            for before, after in itertools.pairwise(records):
                resumed_at = after["step"] - after["executed"]
                if resumed_at < before["step"]:  # a kill lies between the two
                    lost = [r for r in attempt if r["step"] > resumed_at]
                    assert lost[-1]["time"] - lost[0]["time"] <= 1000 * (interval_seconds + 1.0), (
                        path.name,
                        lost,
                        after,
                    )
                    attempt = []
                    checked += 1
                attempt.append(after)
    assert checked > 0


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills_leave_the_numbers_of_an_undisturbed_run(harness: Harness, tmp_path: Path) -> None:
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    calm.mkdir()
    stormy.mkdir()
    began = time.monotonic()
    expected = json.loads(harness(*KILLED, "--json", cwd=calm))["rows"]
    whole = time.monotonic() - began
    struck = kill_until_done(KILLED, stormy, 20, longest=max(8.0, whole / 4))
    assert struck >= 10
    rows = json.loads(harness(*KILLED, "--json", cwd=stormy))["rows"]
    assert essence(rows) == essence(expected)
    assert_little_was_repeated(stormy, interval_seconds=0.5)
    files = sorted(p.relative_to(stormy) for p in (stormy / "results" / "runs").rglob("*.json"))
    assert files == sorted(p.relative_to(calm) for p in (calm / "results" / "runs").rglob("*.json"))
    assert not list((stormy / "results").rglob("*.tmp"))
    shutil.rmtree(stormy)
