"""The installed wheel: plugins are inside, `import datasets` is never ours, recipes and reference numbers are shipped."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, built from a copy of what git tracks or would track."""
    source, out, folder = (tmp_path_factory.mktemp(name) for name in ("source", "wheel", "site"))
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    # the backend of this environment: a build must not need the network
    code = f"import setuptools.build_meta as b; print(b.build_wheel({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        wheel.extractall(folder)
    assert not [n for n in names if n.split("/")[0] not in {"harness"} and ".dist-info/" not in n], names
    return folder


def run(code: str, site: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Python with the wheel's content first and the checkout nowhere."""
    paths = [str(site)]
    prologue = (
        f"import sys; sys.path = [p for p in sys.path if p != {str(ROOT)!r}]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    )
    return subprocess.run(
        [sys.executable, "-c", prologue + code],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


def test_wheel_works_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    code = (
        "import harness, pathlib\n"
        f"assert pathlib.Path(harness.__file__).is_relative_to({str(site)!r}), harness.__file__\n"
        "from harness import registry\n"
        "from harness.config import recipe_names\n"
        "assert 'sc' in registry.names('method') and 'stl10' in registry.names('dataset') and 'knn' in registry.names('evaluator')\n"
        "assert registry.load('method', 'sc').__module__ == 'harness.methods.sc'\n"
        "assert 'quick' in recipe_names()\n"
        "from harness.grid_files import load_grid\n"
        "assert load_grid('quick-methods')['methods']\n"
        "from importlib.resources import files\n"
        "assert files('harness.results.reference').joinpath('paper_table1_stl10.csv').is_file()\n"
        "assert files('harness').joinpath('py.typed').is_file()\n"
        "assert all(files('harness.report').joinpath(f'page.{kind}').is_file() for kind in ('html.j2', 'css', 'js'))\n"
        "print('ok')\n"
    )
    done = run(code, site, tmp_path)
    assert done.stdout.strip() == "ok", done.stderr


@pytest.mark.parametrize("present", [False, True])
def test_a_bare_import_of_datasets_is_never_ours(site: Path, tmp_path: Path, present: bool) -> None:
    """`present`: a package with the name and layout of Hugging Face's `datasets` lies beside the wheel."""
    import shutil

    beside = tmp_path / "site"
    shutil.copytree(site, beside)
    if present:
        (beside / "datasets").mkdir()
        (beside / "datasets" / "__init__.py").write_text("THEIRS = True\n")
    code = (
        "import harness.registry\n"
        "harness.registry.load('dataset', 'digits')\n"
        "try:\n"
        "    import datasets\n"
        "    print('theirs' if getattr(datasets, 'THEIRS', False) else 'ours')\n"
        "except ImportError: print('none')\n"
    )
    (tmp_path / "empty").mkdir()
    done = run(code, beside, tmp_path / "empty")
    assert done.stdout.strip() == ("theirs" if present else "none"), done.stderr
