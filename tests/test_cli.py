"""The command line: light help, one-line errors, nothing written by a mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "torchvision", "mlflow", "pandas", "sklearn")


def harness(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from harness.cli import main; main()", *words],
        cwd=cwd, capture_output=True, text=True, timeout=250, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def invoke(
    words: list[str], cwd: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """The command line inside this process: (exit code, stdout, stderr). Spares an import of torch per mistake."""
    from harness import cli

    class Ended(BaseException):
        pass

    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        raise Ended

    monkeypatch.chdir(cwd)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["harness", *words])
    capfd.readouterr()
    with pytest.raises(Ended):
        cli.main()
    return codes[0], *capfd.readouterr()


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["--help"], {}), (["run", "--help"], {}), (["data", "--help"], {}), (["--version"], {}),
        (["profile", "--help"], {}),
        ([], {"_HARNESS_COMPLETE": "complete_bash", "COMP_WORDS": "harness run --method s", "COMP_CWORD": "3"}),
    ],
)  # fmt: skip
def test_help_and_completion_load_nothing_heavy(words: list[str], environment: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "sys.argv = ['harness'] + sys.argv[1:]\n"
        f"heavy = {HEAVY!r}\n"
        "def show(code): print('LOADED', [m for m in sys.modules if m in heavy]); sys.stdout.flush(); raise SystemExit\n"
        "os._exit = show\n"
        "import click\n"
        "from harness import cli\n"
        "try: cli.main()\n"
        "except SystemExit: print('LOADED', [m for m in sys.modules if m in heavy])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert "LOADED []" in done.stdout, done.stdout + done.stderr
    if environment:
        assert "sc" in done.stdout.split()


BAD = [
    (["run", "--method", "scc", "--dataset", "digits"], "unknown method 'scc'; did you mean sc"),
    (["run", "--method", "sc", "--dataset", "digit"], "unknown dataset 'digit'; did you mean digits?"),
    (["run", "--method", "sc"], "--dataset is missing; known: "),
    (["run", "--method", "../sc", "--dataset", "digits"], "'../sc'"),
    (["run", "--method", "sc", "--dataset", "../digits"], "'../digits'"),
    (["run", "--method", "sc", "--dataset", "digits", "--epochs", "-1"], "setting 'epochs': input should be greater than"),
    (["run", "--method", "sc", "--dataset", "digits", "--epochs", "two"], "input should be a valid integer"),
    (["run", "--method", "sc", "--dataset", "digits", "--set", "method.ptch=2"], "did you mean method.patch"),
    (["run", "--method", "sc", "--dataset", "digits", "--set", "method.patch=7"], "larger than"),
    (["run", "--method", "sc", "--dataset", "digits", "--set", "method.overlap=disjoint"], "P(input-disjoint) = 0"),
    (["run", "--method", "sc", "--dataset", "digits", "--set", "batch_size=5000"], "batch_size 5000 is larger than the 1,297"),
    (["run", "--method", "sc", "--dataset", "digits", "--labels", "500pc"], "500pc"),
    (["run", "--method", "sc", "--dataset", "digits", "--labels", "-3"], "-3"),
    (["run", "--method", "sc", "--dataset", "digits", "--labels", "folds"], "folds"),
    (["run", "--method", "sc", "--dataset", "digits", "--device", "cuda"], "--device cuda: torch finds no CUDA device"),
    (["run", "--method", "sc", "--dataset", "digits", "--device", "tpu9"], "is not a device"),
    (["run", "--method", "sc", "--dataset", "digits", "--recipe", "quik"], "did you mean quick?"),
    (["run", "--method", "sc", "--dataset", "digits", "--eval", "linear"], "unknown evaluator 'linear'; did you mean linear_probe?"),
    (["run", "--method", "sc", "--dataset", "digits", "--encoder", "resnet17"], "resnet1"),
    (["run", "--method", "sc", "--dataset", "digits", "--tracking", "some/folder"], "some/folder"),
    (["run", "--method", "sc", "--dataset", "digits", "--data-dri", "x"], "no such option: --data-dri"),
    (["run", "--method", "sc", "--dataset", "mnist", "--offline", "--data-dir", "nowhere"], "train-images-idx3-ubyte"),
    (["run", "--method", "sc", "--dataset", "folder:missing"], "missing"),
    (["run", "--method", "sc", "--dataset", "digits", "--seeds", "4-2"], "a range goes from a seed to a higher one"),
    (["run", "--method", "sc", "--dataset", "digits", "--seeds", "0-2", "--seed", "1"], "--seeds and --seed were both given"),
    (["run", "--method", "sc", "--dataset", "digits", "--stack-seeds", "on"], "name them with --seeds"),
    (["run", "--method", "sc", "--dataset", "digits", "--seeds", "0-1", "--stack-seeds", "yes"], "setting 'stack_seeds'"),
    (["run", "--method", "outside", "--dataset", "digits"], "harness evaluate --weights"),
    (["run", "--method", "sc", "--dataset", "digits", "--plugins", "nowhere"], "no plugin under"),
    (["runn"], "no such command 'runn'"),
    (["show", "latest"], "there is no finished run"),
    (["show", "../x"], "names no run"),
    (["evaluate"], "takes either a RUN"),
    (["profile", "--dataset", "digits"], "--method is missing; known: "),
    (["profile", "--method", "scc", "--dataset", "digits"], "unknown method 'scc'; did you mean sc"),
    (["profile", "--method", "pixels", "--dataset", "digits"], "'pixels' trains nothing: it has no step to profile"),
    (["profile", "--method", "sc", "--dataset", "digits", "--steps", "0"], "--steps 0: at least one step"),
    (["profile", "--method", "sc", "--dataset", "digits", "--batch-size", "5000"], "is larger than the 1,297"),
    (["profile", "--method", "sc", "--dataset", "digits", "--trace", "no/where.json"], "give a file in a folder that exists"),
    (["evaluate", "--weights", "w.pt"], "needs --encoder"),
    (["list", "method"], "did you mean methods?"),
    (["describe", "scc"], "did you mean sc"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "expected"), BAD, ids=lambda v: " ".join(v)[:60] if isinstance(v, list) else "")
def test_a_mistake_is_one_line_exit_2_and_nothing_written(
    words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in words:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device here")
    code, out, err = invoke(words, tmp_path, monkeypatch, capfd)
    assert code == 2, out + err
    assert expected.lower() in err.lower()
    assert len(err.strip().splitlines()) == 1, err
    assert out == ""
    assert os.listdir(tmp_path) == []


def test_the_process_itself_ends_with_2(tmp_path: Path) -> None:
    done = harness("run", "--method", "rotatoin", "--dataset", "digits", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("harness: unknown method 'rotatoin'; did you mean rotation")
    assert done.stderr.endswith("?\n") and done.stderr.count("\n") == 1


def test_dry_run_writes_nothing_and_json_is_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--method", "sc", "--dataset", "digits", "--dry-run", "--json"]
    code, out, err = invoke(words, tmp_path, monkeypatch, capfd)
    assert code == 0, err
    arms = json.loads(out)["arms"]
    assert arms[0]["method"] == "sc"
    assert {arm["role"] for arm in arms} == {"method", "null control", "control", "floor"}
    assert len({arm["pretrain_id"] for arm in arms}) == len(arms)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("what", ["methods", "datasets", "encoders", "evaluators", "recipes", "grids", "runs"])
def test_lists(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = invoke(["list", what, "--json"], tmp_path, monkeypatch, capfd)
    assert code == 0, err
    records = json.loads(out)[what]
    assert records or what == "runs"


def test_methods_are_listed_by_family_and_year(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = invoke(["list", "methods", "--json"], tmp_path, monkeypatch, capfd)
    records = json.loads(out)["methods"]
    assert set(records[0]) >= {"method", "title", "family", "year", "tier", "idea", "source", "role"}
    groups = list(dict.fromkeys(record["role"] for record in records))
    assert groups == ["method", "null control", "control", "floor", "outside"]
    ordered = [(groups.index(r["role"]), r["family"], r["year"]) for r in records]
    assert ordered == sorted(ordered)
    assert all(record["idea"] for record in records)
    _, out, _ = invoke(["list", "methods"], tmp_path, monkeypatch, capfd)
    assert "dictionary" in out and "coates_kmeans" in out and "idea" in out


def test_describe_shows_every_setting_with_its_meaning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = invoke(["describe", "sc", "--json"], tmp_path, monkeypatch, capfd)
    assert code == 0, err
    settings = json.loads(out)["settings"]
    assert {"method.patch", "optim.lr", "epochs", "eval.fine_tune.schedule.name"} <= {s["key"] for s in settings}
    assert all(s["meaning"] for s in settings)
