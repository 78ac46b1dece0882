"""Row files as a table: sealed ones only, with or without the predictions they speak of."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

from harness import durable, records
from harness.contracts import HarnessError, Row

ROWS = Path(__file__).resolve().parents[2] / "results" / "studies" / "quick" / "rows"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three committed row files."""
    for file in sorted(ROWS.rglob("*.json"))[:3]:
        target = tmp_path / "study" / "rows" / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return tmp_path


def first(folder: Path) -> Path:
    return sorted((folder / "study").rglob("*.json"))[0]


def test_the_table_holds_what_row_objects_would(folder: Path) -> None:
    table = records.load_rows(folder)
    files = sorted((folder / "study").rglob("*.json"))
    expected = records.frame(Row(**row) for file in files for row in json.loads(file.read_text())["rows"])
    pd.testing.assert_frame_equal(table, expected)
    assert list(table.columns) == list(Row.model_fields)
    assert len({id(config) for config in table["config"]}) <= len(files)  # rows of one file share it


def test_a_workspace_wants_the_predictions_that_rows_speak_of(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    runs = records.runs_folder(folder)
    runs.parent.mkdir(parents=True)
    shutil.copytree(folder / "study" / "rows", runs)
    speaking = [f for f in runs.rglob("*.json") if json.loads(f.read_text())["predictions_sha256"]]
    kept = records.load_results(folder)
    assert speaking and {f.stem for f in speaking}.isdisjoint(kept["eval_id"])
    assert sum("damaged" in str(warning.message) for warning in recwarn) == len(speaking)


@pytest.mark.skipif(sys.platform != "linux", reason="read by one process elsewhere")
def test_many_files_are_read_by_several_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = first(folder)
    file.write_bytes(file.read_bytes().replace(b'"seed": 10', b'"seed": 11', 1))
    with pytest.warns(UserWarning, match=f"{file} is damaged"):
        alone = records.load_rows(folder)
    monkeypatch.setattr(records, "FILES_PER_PROCESS", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    with pytest.warns(UserWarning, match=f"{file} is damaged"):
        pd.testing.assert_frame_equal(records.load_rows(folder), alone)


def test_damage_and_other_formats_are_left_out_with_a_warning(folder: Path) -> None:
    whole = len(records.load_rows(folder))
    file = first(folder)
    document = durable.read_sealed(file)
    assert document is not None
    lost = len(document["rows"])
    good = file.read_bytes()
    file.write_bytes(good.replace(b'"seed": 10', b'"seed": 11', 1))
    with pytest.warns(UserWarning, match="damaged"):
        assert len(records.load_rows(folder)) == whole - lost
    (file.with_suffix(".predictions.npz")).write_bytes(b"not these")
    file.write_bytes(good)
    if document["predictions_sha256"]:
        with pytest.warns(UserWarning, match="damaged"):
            assert len(records.load_rows(folder)) == whole - lost
        file.with_suffix(".predictions.npz").unlink()
    durable.write_sealed(file, {**document, "rows": [{**document["rows"][0], "unknown": 1}]})
    with pytest.warns(UserWarning, match="another format"):
        assert len(records.load_rows(folder)) == whole - lost


def test_other_json_is_no_row_file(folder: Path) -> None:
    whole = len(records.load_rows(folder))
    (folder / "study" / "eval_ids.json").write_text("[]")
    assert len(records.load_rows(folder)) == whole
    with pytest.raises(HarnessError, match="no row file"):
        records.load_rows(folder / "nowhere")
