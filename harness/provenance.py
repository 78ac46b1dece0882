"""Which code and machine a number came from: commit, versions, memory. Never a path, host or user name."""

from __future__ import annotations

import resource
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

import harness


def _git(*words: str) -> str | None:
    root = Path(harness.__file__).resolve().parent.parent
    if not (root / "pyproject.toml").is_file():
        return None  # an installed wheel is not in its own repository, even when it lies inside somebody else's
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def code_state() -> dict[str, Any]:
    """git commit and whether the tree differs from it (None outside a checkout), and torch's version."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain") if commit else None
    return {
        "git_commit": commit,
        "git_dirty": None if changes is None else bool(changes),
        "torch_version": str(torch.__version__),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on a CUDA device, else resident on the host."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
