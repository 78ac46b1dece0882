"""harness: pretrain a network without labels, measure it beside honest controls, and keep every number.

`harness.run(method="sc", dataset="digits")` is the whole product as one call; `harness.load_results` and
`harness.load_encoder` read back what it left. Importing the package loads nothing heavy.
"""

from __future__ import annotations

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout the plugins lie beside the package (methods/, datasets/); in a wheel they are mapped into it.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "methods").is_dir():
    __path__.append(str(_root))

_public = {
    "run": "harness.runner",
    "evaluate": "harness.runner",
    "load_encoder": "harness.runs",
    "load_results": "harness.records",
}
__all__ = ["__version__", "evaluate", "load_encoder", "load_results", "run"]


def __getattr__(name: str) -> object:
    if name in _public:
        from importlib import import_module

        return getattr(import_module(_public[name]), name)
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
