"""The journal: whole lines only, nothing told twice, readable after any kill."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import journal as journals
from harness.contracts import HarnessError
from harness.journal import Journal


def new(workspace: Path, pretrain_id: str = "abc") -> Journal:
    return Journal(journals.journal_path(workspace, pretrain_id))


def row(**changes: object) -> dict[str, object]:
    base: dict[str, object] = {
        "evaluator": "linear_probe", "readout": "gap", "split": "test", "metric": "top1", "value": 0.5,
        "labels": "10pc", "fold": None, "label_seed": 3, "seed": 3, "steps": 40,
        "finished_at": "2026-01-02T03:04:05+00:00",
    }  # fmt: skip
    return base | changes


def test_records_come_back_in_order_and_nothing_is_written_before_the_first(tmp_path: Path) -> None:
    journal = new(tmp_path)
    assert list(tmp_path.iterdir()) == []
    journal.begin("sc-digits-s0", {"optim.lr": "0.1"}, {"harness.method": "sc"}, [{"name": "digits", "digest": "d"}])
    journal.metrics(10, {"loss": 1.5})
    journal.end("FINISHED")
    kinds = [record["kind"] for record in journal.records()]
    assert kinds == ["start", "params", "tags", "dataset", "metrics", "end"]
    assert all(record["time"] > 1e12 for record in journal.records())
    assert journal.records()[4]["values"] == {"loss": 1.5}


def test_a_second_attempt_repeats_only_what_is_new(tmp_path: Path) -> None:
    first = new(tmp_path)
    first.begin("n", {"a": "1"}, {"t": "x"}, [{"name": "digits", "digest": "d"}])
    for step in (10, 20, 30):
        first.metrics(step, {"loss": 1 / step, "wild": float("inf")})
    first.rows([row()])
    second = new(tmp_path)
    second.begin("n", {"a": "2", "b": "1"}, {"t": "y"}, [{"name": "digits", "digest": "d"}])
    for step in (20, 30, 40):
        second.metrics(step, {"loss": 1 / step, "wild": float("inf")})
    second.rows([row(), row(metric="nll")])
    assert (first.identity, second.attempts) == (second.identity, 2)
    told = [
        (key, record["step"]) for record in second.records() if record["kind"] == "metrics" for key in record["values"]
    ]
    assert len(told) == len(set(told)) == 8
    assert [r["values"] for r in second.records() if r["kind"] == "params"] == [{"a": "1"}, {"b": "1"}]
    assert sum(len(r["points"]) for r in second.records() if r["kind"] == "rows") == 2
    assert sum(r["kind"] == "dataset" for r in second.records()) == 1


def test_a_step_told_with_another_value_is_kept(tmp_path: Path) -> None:
    journal = new(tmp_path)
    journal.metrics(1, {"loss": 1.0})
    journal.metrics(1, {"loss": 2.0})
    assert len(journal.records()) == 2


def test_executed_steps_count_repeated_work(tmp_path: Path) -> None:
    for executed in (30, 25):
        journal = new(tmp_path)
        journal.steps("pretrain", executed)
        journal.steps("fine_tune 0.1", 7)
        journal.steps("pretrain", 0)
    assert journal.steps_executed() == 69
    assert journal.steps_executed("pretrain") == 55
    assert len(journal.records()) == 4


def test_a_torn_last_line_is_ignored_and_closed_off(tmp_path: Path) -> None:
    journal = new(tmp_path)
    for step in range(5):
        journal.metrics(step, {"loss": float(step)})
    whole = journal.path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in range(1, len(last) + 1):
        journal.path.write_bytes(whole[: len(whole) - cut])
        resumed = new(tmp_path)
        assert len(resumed.records()) == 4
        resumed.metrics(4, {"loss": 4.0})
        # A line that lost only its end of line is whole again once that is closed off; any other cut is dropped.
        assert [r["step"] for r in resumed.records()] == [0, 1, 2, 3, 4] + ([4] if cut == 1 else [])


def test_an_altered_line_is_skipped(tmp_path: Path) -> None:
    journal = new(tmp_path)
    for step in range(3):
        journal.metrics(step, {"loss": 0.25})
    journal.path.write_bytes(journal.path.read_bytes().replace(b'"step":1,', b'"step":7,'))
    assert [record["step"] for record in journal.records()] == [0, 2]


def test_two_writers_share_a_journal(tmp_path: Path) -> None:
    one, two = new(tmp_path), new(tmp_path)
    for step in range(50):
        one.metrics(step, {"a": 1.0})
        two.metrics(step, {"b": 1.0})
    assert len(one.records()) == 100


def test_rows_become_named_points_with_the_rows_own_time() -> None:
    point = journals.row_point(row())
    assert point == journals.Point("linear_probe.gap.test.top1 labels:10pc", 0.5, 40, 1767323045000)
    assert journals.row_point(row(value=None)) is None
    named = journals.row_point(row(readout=None, labels="folds", fold=3, label_seed=9))
    assert named is not None and named.key == "linear_probe.test.top1 labels:folds fold:3 label_seed:9"


def test_a_journal_says_whether_its_last_attempt_ended(tmp_path: Path) -> None:
    journal = new(tmp_path)
    journal.begin("n", {}, {})
    journal.tags({"long": "x" * 10_000})
    assert not journals.finished(journal.path)
    journal.end("INTERRUPTED")
    assert journals.finished(journal.path)
    journal.begin("n", {}, {})
    assert not journals.finished(journal.path)


def test_identities_with_a_path_in_them_are_refused(tmp_path: Path) -> None:
    for name in ("../up", "a/b", "", ".hidden"):
        with pytest.raises(HarnessError, match="plain name"):
            journals.journal_path(tmp_path, name)


def test_a_full_disk_is_one_clear_line_and_costs_one_record(tmp_path: Path) -> None:
    journal = new(tmp_path)
    journal.metrics(0, {"loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 20, limits[1]))
    try:
        with pytest.raises(HarnessError, match="the disk is full"):
            journal.metrics(1, {"loss": 1.0})
        with pytest.raises(HarnessError, match="cannot write the journal"):
            journal.metrics(2, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    journal.metrics(3, {"loss": 1.0})
    assert [record["step"] for record in journal.records()] == [0, 3]


CHILD = """
import sys
from pathlib import Path
import harness.figures
from harness import journal as journals, tracking
assert not {"mlflow", "matplotlib"} & set(sys.modules), "these are imported by the first use, not before"
workspace = Path(sys.argv[1])
with journals.hold(journals.lock_path(workspace, "abc")) as mine:
    journal = journals.Journal(journals.journal_path(workspace, "abc"))
    journal.begin("n", {}, {})
    print("started", mine, flush=True)
    step = 0
    while True:
        journal.metrics(step, {"loss": 1.0 / (1 + step), "text": float("nan")})
        step += 1
"""


def test_sigkill_leaves_a_readable_journal_and_frees_the_lock(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "started True\n"
    lock = journals.lock_path(tmp_path, "abc")
    assert journals.is_alive(lock)
    with journals.hold(lock) as mine:
        assert not mine
    time.sleep(0.3)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not journals.is_alive(lock)
    steps = [record["step"] for record in new(tmp_path).records() if record["kind"] == "metrics"]
    assert steps == list(range(len(steps))) and len(steps) > 100
    resumed = new(tmp_path)
    resumed.begin("n", {}, {})
    resumed.metrics(len(steps) - 1, {"loss": 1.0 / len(steps), "text": float("nan")})
    assert len([r for r in resumed.records() if r["kind"] == "metrics"]) == len(steps)
    assert resumed.attempts == 2
