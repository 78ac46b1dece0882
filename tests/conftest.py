"""Fixtures that any test may use; nothing heavy is imported until one is asked for."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SUPPORT = Path(__file__).parent / "support"


def _support(name: str) -> ModuleType:
    """Load tests/support/NAME.py by its path: with --import-mode=importlib the tests are no package to import from."""
    full_name = f"harness_test_support_{name}"
    if full_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(full_name, SUPPORT / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full_name] = module
        spec.loader.exec_module(module)
    return sys.modules[full_name]


@pytest.fixture(scope="module", autouse=True)
def pictures() -> Iterator[None]:
    """Runs in the test's own process draw none: they are half of a small run's time, and no input to anything.

    Tests that look at them have a `pictures` of their own, which changes nothing (tests/report/conftest.py).
    """
    if "torch" not in sys.modules:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.run_figures._add", lambda *_, **__: None)
        yield


@pytest.fixture(scope="session")
def published_formats() -> ModuleType:
    """Writers of tiny data sets in their published formats (see tests/support/published_formats.py)."""
    return _support("published_formats")


@pytest.fixture(scope="session")
def file_server() -> ModuleType:
    """A local HTTP server that misbehaves on request (see tests/support/file_server.py)."""
    return _support("file_server")


@pytest.fixture(scope="session")
def planted_study() -> ModuleType:
    """Searches with planted values (see tests/support/planted_study.py)."""
    return _support("planted_study")


@pytest.fixture(scope="session")
def forks() -> Iterator[Any]:
    """Processes of their own that do not pay for their imports (see tests/support/forks.py)."""
    served = _support("forks").Forks()
    yield served
    served.close()


@pytest.fixture
def postgres() -> Iterator[Any]:
    """A PostgreSQL server of this test's own (see tests/support/postgres.py); skips where there is none."""
    server = _support("postgres").serve()
    yield server
    server.close()
