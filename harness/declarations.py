"""What plugins declare of themselves, read from their files without running them.

A report wants titles and roles; importing a method would import torch for them, which takes seconds and half a gigabyte.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness import registry

ROOTS = {"method": ("harness.contracts", "Method"), "dataset": ("harness.contracts", "Dataset")}
METHOD = ("role", "family", "tier", "year", "null_control")
DATASET = ("title", "caution", "takes_argument")


class _UnsureError(Exception):
    """What a file says cannot be told without running it."""


@cache
def of_method(name: str) -> dict[str, Any]:
    """{attribute: value} of METHOD, and `title`. Raises HarnessError where the method is not installed, ImportError where
    it has to be imported and cannot be."""
    found = _declared("method", name, METHOD)
    return {"year": None, **found, "title": registry.first_line(found["__doc__"])}


def of_dataset(spec: str) -> tuple[dict[str, Any], str | None]:
    """({attribute: value} of DATASET, argument) of `name` or `name:ARGUMENT`. Raises HarnessError as registry.load_dataset."""
    found = _declared("dataset", spec.partition(":")[0], DATASET)
    return found, registry.argument_of(spec, found["takes_argument"])


@cache
def _declared(kind: registry.Kind, name: str, wanted: tuple[str, ...]) -> dict[str, Any]:
    """From the file where that is sure, else from the imported class."""
    try:
        if registry.is_file(kind, name):
            return _in_file(kind, f"harness.{kind}s.{name}", wanted)
    except (_UnsureError, SyntaxError):
        pass
    plugin = registry.load(kind, name)
    own = {key: getattr(plugin, key) for key in wanted if hasattr(plugin, key)}
    return {**own, "__doc__": inspect.getdoc(plugin) or plugin.__name__}


def _in_file(kind: registry.Kind, module: str, wanted: tuple[str, ...]) -> dict[str, Any]:
    if any(_may_change(line, wanted) for line in _tree(module).body):
        raise _UnsureError
    names = [node.name for node in _tree(module).body if isinstance(node, ast.ClassDef) and node.name[0] != "_"]
    found = [told for name in names if (told := _of_class(module, name, ROOTS[kind], wanted)) is not None]
    if len(found) != 1:
        raise _UnsureError
    return found[0]


def _may_change(line: ast.stmt, wanted: tuple[str, ...]) -> bool:
    """Whether a statement of a module could change a class that was written before: `Name.role = ...`, or any call."""
    if isinstance(line, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return False
    return _stores(line, wanted) or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Call))


def _of_class(module: str, name: str, root: tuple[str, str], wanted: tuple[str, ...]) -> dict[str, Any] | None:
    """Attributes of a class with what it inherits from `root` on; None where it does not plainly descend from there."""
    node = next((n for n in _tree(module).body if isinstance(n, ast.ClassDef) and n.name == name), None)
    if node is None:
        return None
    if (module, name) == root:
        return _own(node, wanted)
    if len(node.bases) != 1 or node.keywords or node.decorator_list:
        return None
    place = _defined(module, node.bases[0])
    inherited = None if place is None else _of_class(*place, root, wanted)
    return None if inherited is None else {**inherited, **_own(node, wanted)}


def _own(node: ast.ClassDef, wanted: tuple[str, ...]) -> dict[str, Any]:
    """What the class's own body sets, and its docstring."""
    found: dict[str, Any] = {}
    for target, value in (pair for line in node.body for pair in _assigned(line)):
        if isinstance(target, ast.Name) and target.id in wanted:
            try:
                found[target.id] = ast.literal_eval(value)
            except ValueError:
                raise _UnsureError from None
        elif _stores(target, wanted):
            raise _UnsureError
    doc = ast.get_docstring(node)
    return found if doc is None else {**found, "__doc__": doc}


def _assigned(line: ast.stmt) -> Iterator[tuple[ast.AST, ast.expr]]:
    """(target, value) of a statement in a class's body; `a, b = 1, 2` is two. The statement itself is the target where
    names could be set in it that cannot be told apart."""
    if isinstance(line, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return
    if isinstance(line, ast.AnnAssign):
        if line.value is not None:
            yield line.target, line.value
    elif isinstance(line, ast.Assign):
        for target in line.targets:
            if isinstance(target, ast.Tuple) and isinstance(line.value, ast.Tuple):
                parts = [*target.elts, *line.value.elts]
                if len(target.elts) == len(line.value.elts) and not any(isinstance(p, ast.Starred) for p in parts):
                    yield from zip(target.elts, line.value.elts, strict=True)
                    continue
            yield target, line.value
    else:
        yield line, ast.Constant(None)


def _stores(node: ast.AST, wanted: tuple[str, ...]) -> bool:
    """Whether something in it is set, or deleted, that has one of the wanted names."""
    for part in ast.walk(node):
        name = part.id if isinstance(part, ast.Name) else part.attr if isinstance(part, ast.Attribute) else None
        if name in wanted and not isinstance(part.ctx, ast.Load):  # type: ignore[attr-defined]
            return True
    return False


def _defined(module: str, base: ast.expr) -> tuple[str, str] | None:
    """(module, name) of a base class that is written in harness or in a plugin, else None."""
    first = base.value if isinstance(base, ast.Attribute) else base
    if not isinstance(first, ast.Name):
        return None
    imported = {
        alias.asname or alias.name: (line.module or "", alias.name)
        for line in _tree(module).body if isinstance(line, ast.ImportFrom) for alias in line.names
    }  # fmt: skip
    package, name = imported.get(first.id, (module, first.id))
    package, name = (f"{package}.{name}", base.attr) if isinstance(base, ast.Attribute) else (package, name)
    return (package, name) if package.startswith("harness.") else None


@cache
def _tree(module: str) -> ast.Module:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise _UnsureError
    return ast.parse(Path(spec.origin).read_bytes())
