"""What plugin files declare, read without running them, is what their classes say once they are imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import harness
from harness import declarations, registry
from harness.contracts import HarnessError


@pytest.mark.parametrize("name", registry.names("method"))
def test_a_method_is_read_as_it_is_imported(name: str) -> None:
    told, plugin = declarations.of_method(name), registry.load_method(name)
    assert told["title"] == registry.title(plugin)
    assert {key: told[key] for key in declarations.METHOD} == {
        key: getattr(plugin, key, None) for key in declarations.METHOD
    }


@pytest.mark.parametrize("name", registry.names("dataset"))
def test_a_data_set_is_read_as_it_is_imported(name: str) -> None:
    spec = f"{name}:here" if registry.load("dataset", name).takes_argument else name
    told, argument = declarations.of_dataset(spec)
    plugin, same = registry.load_dataset(spec)
    assert argument == same
    assert {key: told[key] for key in declarations.DATASET} == {
        key: getattr(plugin, key) for key in declarations.DATASET
    }


PLANTED = '''"""A planted method."""
from harness.contracts import Method

FAMILY = "made up"

class Planted(Method):
    """Planted"""
    family = FAMILY.title()
    def loss(self, batch, step):
        raise NotImplementedError
'''


def test_what_a_file_computes_is_asked_of_the_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "__path__", [*harness.__path__])
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "computing.py").write_text(PLANTED)
    registry.add_folder(tmp_path)
    told = declarations.of_method("computing")
    assert (told["family"], told["title"], told["role"], told["year"]) == ("Made Up", "Planted", None, None)


@pytest.mark.parametrize(
    ("body", "after"),
    [
        ('role, family = "floor", "planted"', ""),
        ('role = family = "floor"', ""),
        ('if True:\n        role = "floor"', ""),
        ('(role, family), tier = ("floor", "planted"), "ported"', ""),
        ('[role] = ["floor"]', ""),
        ('family = "planted"', 'Several.role = "floor"'),
        ('family = "planted"', 'setattr(Several, "role", "floor")'),
        ('role: str = "floor"', ""),
        ('family = "planted"\n    for role in ("control", "floor"):\n        pass', ""),
    ],
)
def test_however_it_is_written_it_is_read(
    body: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "__path__", [*harness.__path__])
    name = f"several{abs(hash((body, after)))}"
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / f"{name}.py").write_text(
        'from harness.contracts import Method\n\nclass Several(Method):\n    """Several"""\n'
        f"    {body}\n    def loss(self, batch, step):\n        raise NotImplementedError\n{after}\n"
    )
    registry.add_folder(tmp_path)
    assert declarations.of_method(name)["role"] == registry.load_method(name).role == "floor"


def test_what_is_not_installed_is_an_error() -> None:
    with pytest.raises(HarnessError, match="unknown method 'simclrr'; did you mean simclr"):
        declarations.of_method("simclrr")
    with pytest.raises(HarnessError, match="needs an argument"):
        declarations.of_dataset("folder")


def test_reports_are_made_without_torch() -> None:
    code = (
        "import sys; from harness import records; from harness.report import assembly, text;"
        "text.markdown(assembly.build(records.load_rows('results/studies/quick')));"
        "assert not {'torch', 'sklearn'} & set(sys.modules)"
    )
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=120)
