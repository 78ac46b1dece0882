"""names(kind) and load(kind, name): the only module that imports plugins.

A plugin is one file; its name is the file's. Ours lie in `methods/`, `datasets/` and `harness/evaluators/`. Third
parties add theirs by entry point (`harness.methods`, `harness.datasets`, `harness.evaluators`) or by an explicit
folder with `methods/`, `datasets/` or `evaluators/` inside (`--plugins DIR`); never from the working folder unasked.
`names` imports no plugin and nothing heavy, so that help, completion and near-name hints are instant.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import harness
from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.contracts import Dataset, Evaluator, Method

Kind = Literal["method", "dataset", "evaluator"]
DEFAULT_EVALUATORS = ("linear_probe", "knn", "fine_tune", "representation")  # of a run that names none
_BASES = {"method": "Method", "dataset": "Dataset", "evaluator": "Evaluator"}


def _folders(kind: Kind) -> list[Path]:
    return [folder for root in harness.__path__ if (folder := Path(root) / f"{kind}s").is_dir()]


@cache
def _entry_points(kind: Kind) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"harness.{kind}s")}


def names(kind: Kind) -> tuple[str, ...]:
    """Every registered name of `kind` (`method`, `dataset`, `evaluator`), sorted, without importing any."""
    files = {file.stem for folder in _folders(kind) for file in folder.glob("*.py") if not file.stem.startswith("_")}
    return tuple(sorted(files | set(_entry_points(kind))))


def is_file(kind: Kind, name: str) -> bool:
    """Whether the plugin `name` is a file of ours or of an added folder, and no entry point."""
    return name in names(kind) and name not in _entry_points(kind)


def near(word: str, known: Iterable[str]) -> str:
    """`did you mean a, b?` or the whole list, for one-line errors."""
    known = sorted(known)
    matches = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(matches)}?" if matches else f"known: {', '.join(known)}"


def add_folder(folder: Path) -> None:
    """Register the plugins under `folder`. Raises HarnessError if there are none, or one takes a name already used."""
    folder = folder.resolve()
    if str(folder) in harness.__path__:
        return
    found = False
    for kind in _BASES:
        for file in sorted((folder / f"{kind}s").glob("*.py")):
            found = True
            if file.stem in names(kind):  # type: ignore[arg-type]
                raise HarnessError(f"--plugins: {kind} '{file.stem}' in {file} is already registered; rename the file")
    if not found:
        raise HarnessError(
            f"--plugins: no plugin under {folder}; put files into methods/, datasets/ or evaluators/ there"
        )
    harness.__path__.append(str(folder))  # methods and datasets are namespace packages: they follow their parent
    if (folder / "evaluators").is_dir():
        import_module("harness.evaluators").__path__.append(str(folder / "evaluators"))


@cache
def _load(kind: Kind, name: str) -> type[Any]:
    from harness import contracts

    if name not in names(kind):
        raise HarnessError(f"unknown {kind} '{name}'; {near(name, names(kind))}")
    point = _entry_points(kind).get(name)
    plugin = point.load() if point else import_module(f"harness.{kind}s.{name}")
    base = getattr(contracts, _BASES[kind])
    if inspect.isclass(plugin):
        classes = [plugin]
    else:
        classes = [
            value for key, value in vars(plugin).items()
            if inspect.isclass(value) and issubclass(value, base) and value.__module__ == plugin.__name__
            and not key.startswith("_")
        ]  # fmt: skip
    if len(classes) != 1:
        found = ", ".join(c.__name__ for c in classes) or "none"
        raise HarnessError(f"{kind} '{name}' must define exactly one public {base.__name__} class; found {found}")
    return classes[0]


def load(kind: Kind, name: str) -> type[Any]:
    """The one public class of plugin `name`. Raises HarnessError, listing near names, when there is none."""
    return _load(kind, name)


def load_method(name: str) -> type[Method]:
    return load("method", name)


def load_evaluator(name: str) -> type[Evaluator]:
    return load("evaluator", name)


def load_dataset(spec: str) -> tuple[type[Dataset], str | None]:
    """`name` or `name:ARGUMENT` -> (class, argument). Raises HarnessError when the argument is missing or unexpected."""
    plugin = load("dataset", spec.partition(":")[0])
    return plugin, argument_of(spec, plugin.takes_argument)


def argument_of(spec: str, takes_argument: bool) -> str | None:
    """The part of a data set's `name:ARGUMENT` after the colon. Raises HarnessError when it is missing or unexpected."""
    name, colon, argument = spec.partition(":")
    if takes_argument and not argument:
        raise HarnessError(f"data set '{name}' needs an argument: {name}:PATH")
    if colon and not takes_argument:
        raise HarnessError(f"data set '{name}' takes no argument; leave out ':{argument}'")
    return argument or None


def methods_with_role(role: str) -> tuple[str, ...]:
    """Names of the registered methods that declare this role (`control`, `floor`)."""
    return tuple(name for name in names("method") if load_method(name).role == role)


def title(plugin: type[Any]) -> str:
    """First line of the class's docstring, without a full stop."""
    return first_line(inspect.getdoc(plugin) or plugin.__name__)


def first_line(docstring: str) -> str:
    return docstring.splitlines()[0].rstrip(".")


def idea(plugin: type[Method]) -> str:
    """The method's idea in one line: its own, not an ancestor's; else the first sentence of its file."""
    own: str = vars(plugin).get("idea", "")
    if own:
        return own
    text = " ".join((inspect.getdoc(sys.modules[plugin.__module__]) or plugin.source).split("\n\n")[0].split())
    kind, colon, rest = text.partition(": ")
    text = rest if colon and kind.lower() == plugin.role else text  # the group says `floor` already
    return text[:1].lower() + text[1:].partition(". ")[0].rstrip(".")
