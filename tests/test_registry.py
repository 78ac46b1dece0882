"""Plugins are found by file name, entry point or an explicit folder; never from the working folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness import contracts, registry
from harness.contracts import HarnessError

KINDS = ("method", "dataset", "evaluator")
PLUGIN = '''"""A plugin."""
from harness.contracts import Method


class Mine(Method):
    """Mine"""

    year, source = 2026, "here"

    def loss(self, batch, step):
        return {"loss": batch.images.float().mean()}
'''


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in KINDS for n in registry.names(k)])
def test_every_plugin_is_complete(kind: registry.Kind, name: str) -> None:
    plugin = registry.load(kind, name)
    assert issubclass(plugin, getattr(contracts, kind.capitalize()))
    assert registry.title(plugin)
    assert plugin.__doc__
    if kind == "method":
        assert plugin.year >= 1950
        assert plugin.source
        assert plugin.family
        assert plugin.graphable or plugin.why_not_graphable
    else:
        assert plugin.name == name


def test_every_method_has_an_idea_of_its_own() -> None:
    ideas = {name: registry.idea(registry.load_method(name)) for name in registry.names("method")}
    assert all(10 < len(idea) < 200 and "\n" not in idea and not idea.endswith(".") for idea in ideas.values()), ideas
    assert len(set(ideas.values())) == len(ideas)  # a variant does not tell its ancestor's
    assert ideas["pixels"] == "the raw pixels, read by the same linear probe and neighbours as any feature"


def test_unknown_names_list_near_ones() -> None:
    with pytest.raises(HarnessError, match="unknown method 'scc'; did you mean sc"):
        registry.load("method", "scc")
    with pytest.raises(HarnessError, match="unknown dataset 'fashionmnist'; did you mean fashion_mnist"):
        registry.load_dataset("fashionmnist")
    with pytest.raises(HarnessError, match="needs an argument: folder:PATH"):
        registry.load_dataset("folder")
    with pytest.raises(HarnessError, match="takes no argument"):
        registry.load_dataset("digits:x")


def test_a_folder_of_plugins_is_used_only_when_named(forks: Any, tmp_path: Path) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "mine.py").write_text(PLUGIN)
    code = (
        "import sys, pickle; from pathlib import Path; from harness import registry\n"
        "assert 'mine' not in registry.names('method')\n"
        "registry.add_folder(Path(sys.argv[1]))\n"
        "plugin = registry.load('method', 'mine')\n"
        "assert pickle.loads(pickle.dumps(plugin)) is plugin\n"
        "print(plugin.__module__)\n"
    )
    done = forks.run(str(tmp_path), cwd=tmp_path, code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "harness.methods.mine"


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="no plugin under"):
        registry.add_folder(tmp_path)
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "sc.py").write_text(PLUGIN)
    with pytest.raises(HarnessError, match=r"'sc' in .* is already registered"):
        registry.add_folder(tmp_path)


def test_entry_points_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    point = EntryPoint("third_party", "harness.methods.random_init", "harness.methods")
    real = registry._entry_points
    monkeypatch.setattr(
        registry, "_entry_points", lambda kind: {"third_party": point} if kind == "method" else real(kind)
    )
    assert "third_party" in registry.names("method")
    assert registry._load.__wrapped__("method", "third_party").__name__ == "RandomInit"


def test_two_public_classes_are_refused(forks: Any, tmp_path: Path) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "two.py").write_text(PLUGIN + PLUGIN.replace("class Mine", "class Yours"))
    code = (
        "import sys; from pathlib import Path; from harness import registry\n"
        "registry.add_folder(Path(sys.argv[1]))\n"
        "try: registry.load('method', 'two')\n"
        "except Exception as error: print(error)\n"
    )
    done = forks.run(str(tmp_path), cwd=tmp_path, code=code)
    assert "must define exactly one public Method class; found Mine, Yours" in done.stdout
