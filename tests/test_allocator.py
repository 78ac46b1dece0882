"""Freed memory stays in the process where the C library can be told so: counted in page faults, in a fresh process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from harness.allocator import keep_freed_memory
told = keep_freed_memory() if sys.argv[1] == "kept" else None

def step():
    for megabytes in (64, 40):  # more than glibc keeps by itself
        held = [torch.ones(megabytes * 2**18) for _ in range(3)]

for _ in range(4):  # the heap needs some steps to find its shape
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_large_tensors_are_made_of_pages_that_the_process_has() -> None:
    faults = {}
    for kind in ("as it comes", "kept"):
        done = subprocess.run([sys.executable, "-c", CODE, kind], capture_output=True, text=True, check=True)
        told, count = done.stdout.split()
        assert told == {"kept": "True", "as it comes": "None"}[kind]
        faults[kind] = int(count)
    pages = 3 * 3 * (64 + 40) * 2**20 // 4096
    assert faults["kept"] < pages / 20 < pages / 2 < faults["as it comes"]
