"""Our Triton kernels without a GPU: interpreted, against torch's operations, in one process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_do_what_torchs_operations_do() -> None:
    """Triton interprets kernels where this is set before it is imported."""
    pytest.importorskip("triton", reason="triton is not installed here")
    files = ("test_map_kernels.py", "test_device_views.py")
    code = f"import runpy\nfor file in {files}: runpy.run_path(file)['check_all_interpreted']()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=Path(__file__).parent,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
