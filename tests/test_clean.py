"""clean: checkpoints go by age, whole; rows, journals and runs at work stay, also after a kill in the middle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from harness import checkpoint, durable, journal
from harness.clean import clean
from harness.contracts import HarnessError

DAY = 86_400.0


def make_run(workspace: Path, pretrain_id: str, age_days: float) -> Path:
    """A finished encoder, a training state, a figure, a journal and a row file, all `age_days` old."""
    folder = workspace / ".harness" / "checkpoints" / pretrain_id
    checkpoint.save_encoder(folder, {"weight": torch.ones(1000)}, {"finished_at": "2026-01-01", "method": "sc"})
    checkpoint.save_state(folder / "state", 7, {"module": {"weight": torch.ones(1000)}})
    durable.write_bytes(folder / "figures" / "loss.png", b"picture")
    durable.write_sealed(workspace / "results" / "runs" / pretrain_id / "0123456789abcdef.json", {"rows": []})
    log = journal.Journal(journal.journal_path(workspace, pretrain_id))
    log.begin("name", {}, {})
    log.end("FINISHED")
    then = time.time() - age_days * DAY
    for file in folder.rglob("*"):
        os.utime(file, (then, then))
    os.utime(folder, (then, then))
    return folder


def kept(workspace: Path) -> dict[str, bytes]:
    """Everything that clean must never touch."""
    places = (workspace / "results", workspace / ".harness" / "journals")
    return {str(f): f.read_bytes() for place in places for f in place.rglob("*") if f.is_file()}


def test_old_ones_go_and_rows_stay(tmp_path: Path) -> None:
    old, young = make_run(tmp_path, "a" * 16, 40), make_run(tmp_path, "b" * 16, 20)
    size = sum(file.stat().st_size for file in old.rglob("*") if file.is_file())
    before = kept(tmp_path)
    report = clean(tmp_path)
    assert [item.pretrain_id for item in report.removed] == ["a" * 16]
    assert report.freed_bytes == size > 8000
    assert report.removed[0].age_days == pytest.approx(40, abs=0.01)
    assert not old.exists() and checkpoint.load_encoder(young) is not None
    assert kept(tmp_path) == before
    assert report.lines()[0].startswith("removed aaaa")
    assert not clean(tmp_path).removed


def test_age_is_that_of_the_newest_file(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a" * 16, 40)
    durable.write_bytes(folder / "figures" / "late.png", b"evaluated again today")
    assert not clean(tmp_path).removed and folder.exists()


def test_dry_run_removes_nothing(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a" * 16, 40)
    report = clean(tmp_path, 30, dry_run=True)
    assert [item.pretrain_id for item in report.removed] == ["a" * 16]
    assert report.lines()[-1].startswith("would remove 1 checkpoints")
    assert checkpoint.load_encoder(folder) is not None and checkpoint.load_state(folder / "state") is not None


def test_a_run_at_work_is_left_alone_until_it_dies(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a" * 16, 40)
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from harness import durable, journal
        with durable.locked(journal.lock_path(Path(sys.argv[1]), "a" * 16)):
            print("locked", flush=True)
            time.sleep(60)
    """)
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == b"locked\n"
        for dry_run in (True, False):
            report = clean(tmp_path, 0, dry_run)
            assert report.live == ("a" * 16,) and not report.removed and report.freed_bytes == 0
        assert checkpoint.load_encoder(folder) is not None
        owner.kill()
    assert [item.pretrain_id for item in clean(tmp_path, 0).removed] == ["a" * 16]


def test_a_kill_in_the_middle_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path, "a" * 16, 40)

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        clean(tmp_path)
    assert checkpoint.load_encoder(folder) is None and checkpoint.load_state(folder / "state") is None
    assert (folder / "encoder.safetensors").exists()
    clean(tmp_path)
    assert not folder.exists()


def test_what_cannot_be_removed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, "a" * 16, 40)
    make_run(tmp_path, "b" * 16, 40)
    real = shutil.rmtree

    def refuse(folder: Path) -> None:
        if folder.name.startswith("a"):
            raise PermissionError(13, "Permission denied")
        real(folder)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    report = clean(tmp_path)
    assert report.failed == (f"could not remove all of {'a' * 16}: Permission denied",)
    assert [item.pretrain_id for item in report.removed] == ["b" * 16]


def test_links_are_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "encoder.json").write_text("precious")
    top = tmp_path / "workspace" / ".harness" / "checkpoints"
    top.mkdir(parents=True)
    (top / ("a" * 16)).symlink_to(elsewhere)
    assert not clean(tmp_path / "workspace", 0).removed
    inside = top / ("b" * 16)
    inside.mkdir()
    (inside / "figures").symlink_to(elsewhere)
    assert [item.pretrain_id for item in clean(tmp_path / "workspace", 0).removed] == ["b" * 16]
    assert (elsewhere / "encoder.json").read_text() == "precious"


@pytest.mark.parametrize("days", [-1.0, -0.001, float("nan"), float("inf")])
def test_ages_that_are_none(tmp_path: Path, days: float) -> None:
    folder = make_run(tmp_path, "a" * 16, 40)
    with pytest.raises(HarnessError, match="--older-than-days"):
        clean(tmp_path, days)
    assert folder.exists()


def test_an_empty_workspace(tmp_path: Path) -> None:
    report = clean(tmp_path, 0)
    assert not report.removed and report.lines() == ["removed 0 checkpoints, 0.0 MB; rows are kept"]
    assert not list(tmp_path.iterdir())
