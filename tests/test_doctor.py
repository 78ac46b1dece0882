"""doctor: every real fault is found and named, nothing is written unless asked, repair does what needs no judgement."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import arms, checkpoint, delivery, doctor, durable, journal, records
from harness.config import Layers, dotted, resolve
from harness.contracts import HarnessError
from harness.doctor import Finding, examine

ID = "a" * 16
HOURS = 3600.0


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A healthy workspace: one finished run with a row file and predictions, its journal closed."""
    folder = tmp_path / "workspace"
    checkpoint.save_encoder(checkpoint_of(folder), {"weight": torch.arange(1000.0)}, {"finished_at": "2026-01-01"})
    path = records.rows_path(folder, ID, "0" * 16)
    durable.write_sealed(path, {"rows": [], "chosen": {}})
    np.savez_compressed(path.with_suffix(".predictions.npz"), gap=np.arange(100))
    write_journal(folder, ID, end="FINISHED")
    return folder


def checkpoint_of(workspace: Path, pretrain_id: str = ID) -> Path:
    return workspace / ".harness" / "checkpoints" / pretrain_id


def write_journal(workspace: Path, pretrain_id: str, end: str | None) -> None:
    log = journal.Journal(journal.journal_path(workspace, pretrain_id))
    log.begin("sc-digits-s3", {"seed": "3"}, {"harness.method": "sc"})
    if end is not None:
        log.end(end)


def troubles(workspace: Path, repair: bool = False) -> list[Finding]:
    """What is not well, without the disk of the machine that runs the test and records owed (tested by themselves)."""
    found = examine(workspace, workspace / "data", repair)
    return [f for f in found if f.level != "ok" and "GiB" not in f.what and "has not got" not in f.what]


def flip(path: Path, seed: int) -> None:
    content = bytearray(path.read_bytes())
    chance = random.Random(seed)
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_healthy_workspace(workspace: Path) -> None:
    before = content_of(workspace)
    findings = examine(workspace, workspace / "data")
    assert not troubles(workspace)
    lines = [f.what for f in findings]
    assert any(line.startswith("harness ") and f"torch {torch.__version__.split('+')[0]}" in line for line in lines)
    assert any(line.startswith("cpu: ") for line in lines)
    assert "checkpoints: 1 whole" in lines and "rows: 0 whole" in lines
    assert any("digits" in line for line in lines if line.startswith("data sets here"))
    assert content_of(workspace) == before


def test_a_workspace_that_is_not_there(tmp_path: Path) -> None:
    assert not troubles(tmp_path / "nowhere", repair=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", range(20))
def test_flipped_bits_are_named(workspace: Path, seed: int) -> None:
    encoder = checkpoint_of(workspace) / ("encoder.safetensors" if seed % 2 else "encoder.json")
    rows = records.rows_path(workspace, ID, "0" * 16)
    flip(encoder, seed)
    flip(rows, seed)
    before = content_of(workspace)
    found = troubles(workspace, repair=True)
    assert {f.level for f in found} == {"problem"} and not any(f.repaired for f in found)
    assert any(f.what == f"damaged checkpoint in .harness/checkpoints/{ID}" for f in found)
    assert any(f"{ID}/{'0' * 16}.json" in f.what for f in found)
    assert content_of(workspace) == before, "damaged files are for their owner to delete"


def test_cut_files_and_damaged_predictions(workspace: Path) -> None:
    for name in ("encoder.safetensors",):
        path = checkpoint_of(workspace) / name
        path.write_bytes(path.read_bytes()[:-100])
    predictions = records.rows_path(workspace, ID, "0" * 16).with_suffix(".predictions.npz")
    predictions.write_bytes(predictions.read_bytes()[:-30])
    found = troubles(workspace)
    assert any("checkpoint" in f.what for f in found)
    assert any("predictions.npz" in f.what and ".json beside" in f.advice for f in found)


def test_a_damaged_state_is_named_by_its_folder(workspace: Path) -> None:
    folder = checkpoint_of(workspace, "b" * 16) / "state"
    checkpoint.save_state(folder, 40, {"module": {"weight": torch.ones(100)}})
    flip(folder / "step-000000040.pt", 0)
    with pytest.raises(HarnessError):
        checkpoint.load_state(folder)
    found = troubles(workspace)
    assert any(f.what == f"damaged checkpoint in .harness/checkpoints/{'b' * 16}/state" for f in found)


KILLED_WRITER = """
    import os, signal, sys
    from pathlib import Path
    from harness import durable
    def fill(temporary):
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    durable.write(Path(sys.argv[1]) / "results" / "runs" / "x" / "y.json", fill)
"""


def test_leftovers_of_a_killed_writer(workspace: Path) -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED_WRITER), str(workspace)], check=False)
    assert done.returncode == -9
    (half_store := workspace / ".harness" / "mlflow-abc").mkdir()
    (half_store / "made.db").write_bytes(b"half")
    (cursor := workspace / ".harness" / "journals" / f".{ID}.0.cursor.json.k3").write_bytes(b"half")
    [left] = (workspace / "results").rglob("*.tmp")
    assert not troubles(workspace, repair=True), "a young one may belong to a living writer"
    then = time.time() - 2 * HOURS
    for path in (left, half_store, cursor):
        os.utime(path, (then, then))
    [finding] = troubles(workspace)
    assert finding.level == "warn" and finding.what.startswith("3 leftovers") and left.exists()
    [finding] = troubles(workspace, repair=True)
    assert finding.repaired and not (left.exists() or half_store.exists() or cursor.exists())
    assert not troubles(workspace)


def interrupted(workspace: Path, settings: dict[str, object]) -> Finding:
    pretrain_id = "c" * 16
    checkpoint.save_state(checkpoint_of(workspace, pretrain_id) / "state", 120, {"module": {}})
    write_journal(workspace, pretrain_id, end="INTERRUPTED")
    durable.write_json(workspace / ".harness" / "artifacts" / pretrain_id / "config.json", settings)
    [finding] = troubles(workspace)
    return finding


def test_an_interrupted_pretraining_says_how_to_go_on(workspace: Path) -> None:
    finding = interrupted(workspace, {"method_name": "from another version"})
    assert finding.what == f"run {'c' * 16}: the pretraining was interrupted after step 120"
    assert finding.advice == "the same command goes on from there"


def test_the_command_of_an_interrupted_pretraining(workspace: Path) -> None:
    usual = arms.resolve_precision("auto", arms.resolve_device("auto"))  # the run's record is resolved, not `auto`
    layers = Layers(overrides={"epochs": 3, "seed": 7, "optim.lr": 0.5, "precision": usual})
    config = dotted(resolve("sc", "folder:cats", layers, default_encoder="convnet_small"))
    config |= {"num_threads": torch.get_num_threads(), "data.pretrain_split": "unlabeled+train"}
    assert interrupted(workspace, config).advice == (
        "the same command goes on from there: harness run --method sc --dataset folder:PATH --seed 7 "
        "--set epochs=3 --set optim.lr=0.5"
    )


OWNER = """
    import sys, time
    from pathlib import Path
    from harness import durable, journal
    workspace = Path(sys.argv[1])
    with durable.locked(journal.lock_path(workspace, "d" * 16)):
        journal.Journal(journal.journal_path(workspace, "d" * 16)).begin("sc-digits-s0", {}, {})
        print("at work", flush=True)
        time.sleep(60)
"""


def test_a_killed_run_is_ended_and_a_living_one_left_alone(workspace: Path) -> None:
    path = journal.journal_path(workspace, "d" * 16)
    command = [sys.executable, "-c", textwrap.dedent(OWNER), str(workspace)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None and run.stdout.readline() == b"at work\n"
        checkpoint.save_state(checkpoint_of(workspace, "d" * 16) / "state", 5, {"module": {}})
        assert not troubles(workspace, repair=True)
        assert not journal.finished(path)
        run.kill()
    dead = [f for f in troubles(workspace) if "killed" in f.what]
    assert len(dead) == 1 and dead[0].level == "problem" and not dead[0].repaired
    assert not journal.finished(path), "looking repairs nothing"
    dead = [f for f in troubles(workspace, repair=True) if "killed" in f.what]
    assert [f.repaired for f in dead] == [True] and journal.finished(path)
    assert not [f for f in troubles(workspace) if "killed" in f.what]


def fake_store(workspace: Path, status: str) -> None:
    """The few tables of MLflow's that doctor looks at."""
    with sqlite3.connect(workspace / "mlflow.db") as store:
        store.executescript(
            "CREATE TABLE alembic_version (version_num TEXT); INSERT INTO alembic_version VALUES ('x');"
            "CREATE TABLE runs (run_uuid TEXT, status TEXT, lifecycle_stage TEXT);"
            "CREATE TABLE tags (run_uuid TEXT, key TEXT, value TEXT);"
        )
        store.execute("INSERT INTO runs VALUES ('r1', ?, 'active')", (status,))
        store.execute("INSERT INTO tags VALUES ('r1', 'harness.pretrain_id', ?)", (ID,))
    store.close()


def test_a_run_that_only_the_store_believes_alive(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_store(workspace, "FINISHED")
    assert not troubles(workspace)
    (workspace / "mlflow.db").unlink()
    fake_store(workspace, "RUNNING")
    assert [f.what for f in troubles(workspace)] == [f"run {ID} was killed and still counts as running"]
    monkeypatch.setattr(delivery, "reap_dead", lambda _: [ID])
    assert troubles(workspace, repair=True)[0].repaired


def test_stores_that_cannot_be_used(workspace: Path) -> None:
    store = workspace / "mlflow.db"
    store.write_bytes(b"this is no database" * 100)
    [finding] = troubles(workspace)
    assert finding.level == "problem" and "harness sync" in finding.advice
    store.unlink()
    sqlite3.connect(store).close()
    store.touch()
    assert [f.level for f in troubles(workspace)] == ["problem"], "an empty file is no MLflow store"
    store.unlink()
    fake_store(workspace, "FINISHED")
    holder = sqlite3.connect(store)
    holder.execute("BEGIN EXCLUSIVE")
    original, doctor.sqlite3.connect = doctor.sqlite3.connect, lambda *a, **k: original(*a, **{**k, "timeout": 0.1})
    try:
        [finding] = troubles(workspace)
    finally:
        doctor.sqlite3.connect = original
        holder.close()
    assert finding.level == "warn" and "locked" in finding.what


def test_records_that_the_store_has_not_got(workspace: Path) -> None:
    found = [f for f in examine(workspace, workspace / "data") if "has not got" in f.what]
    assert len(found) == 1 and "of 1 runs" in found[0].what and "harness sync" in found[0].advice


def test_a_data_set_with_files_missing(workspace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    (folder / "train-images-idx3-ubyte").write_bytes(b"some")
    found = examine(workspace, tmp_path / "data")
    [finding] = [f for f in found if f.what.startswith("data set mnist")]
    assert finding.level == "warn" and "t10k-labels-idx1-ubyte" in finding.what
    assert finding.advice == "run `harness data fetch mnist`"


def test_little_room(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 300 << 20})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    found = [f for f in examine(workspace, workspace / "data") if "GiB free" in f.what]
    assert [f.level for f in found] == ["problem", "problem"] and "harness clean" in found[0].advice


def test_torchvision_for_another_torch(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor, "import_module", broken)
    assert any("torchvision does not work" in f.what for f in troubles(workspace))


def test_a_check_that_fails_is_a_finding(workspace: Path) -> None:
    journals = workspace / ".harness" / "journals"
    (journals / "folder.jsonl").mkdir()  # where a file should be
    found = troubles(workspace)
    assert any("cannot be examined" in f.what and f.level == "problem" for f in found)
    assert any(f.what == "checkpoints: 1 whole" for f in examine(workspace, workspace / "data"))


def test_no_path_is_told(workspace: Path) -> None:
    flip(checkpoint_of(workspace) / "encoder.safetensors", 1)
    flip(records.rows_path(workspace, ID, "0" * 16), 1)
    (workspace / ".harness" / "journals" / "folder.jsonl").mkdir()
    (workspace / "mlflow.db").write_bytes(b"no database")
    text = json.dumps([(f.what, f.advice) for f in examine(workspace, workspace / "data", repair=True)])
    assert str(workspace) not in text and str(Path.home()) + "/" not in text


TRACKED_OWNER = """
    import sys, time
    from pathlib import Path
    from harness import durable, journal, mirror
    workspace, key = Path(sys.argv[1]), "f" * 16
    tracker = mirror.Tracking(workspace)
    with durable.locked(journal.lock_path(workspace, key)):
        tracker.open(key, name="sc-digits-s0", params={}, tags={"pretrain_id": key}, config={}, environment={})
        tracker.start()
        cursors = workspace / ".harness" / "journals"
        while not list(cursors.glob(key + "*.cursor.json")):
            time.sleep(0.1)
        print("mirrored", flush=True)
        time.sleep(600)  # until it is killed, however busy the machine is
"""


@pytest.mark.slow
def test_mlflows_own_store(workspace: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(TRACKED_OWNER), str(workspace)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
        try:
            assert owner.stdout is not None and owner.stdout.readline() == b"mirrored\n"
            lines = [f.what for f in examine(workspace, workspace / "data", repair=True)]
        finally:
            owner.kill()
    assert any(line.startswith("mlflow.db: ") for line in lines) and not any("killed" in line for line in lines)
    assert [f.repaired for f in troubles(workspace) if "killed" in f.what] == [False]
    assert [f.repaired for f in troubles(workspace, repair=True) if "killed" in f.what] == [True]
    assert not troubles(workspace)
    with sqlite3.connect(workspace / "mlflow.db") as store:
        states = store.execute("SELECT status FROM runs").fetchall()
    store.close()
    assert ("RUNNING",) not in states and ("KILLED",) in states
