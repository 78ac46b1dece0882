"""Keeps freed memory in the process, so that a training step on a CPU does not ask the kernel for its tensors anew.

glibc hands blocks above 32 MiB, and what is free at the top of its heap, back to the kernel at once; the next step then
gets them as untouched pages, each of which costs a fault and a clearing. One bf16 step of ResNet-18 on 128 images of
96 px made 80,000 faults and spent a tenth of its time on them (docs/speed.md). Numbers are not affected.
Source: the GNU C Library manual, "Malloc Tunable Parameters".
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # names of malloc.h
LARGEST = 2**31 - 1  # these parameters are C ints
FROM_KERNEL = 2**30  # bytes from which a block still comes from the kernel and goes back to it: data sets, not maps


@cache
def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, for the rest of the process; whether this C library can be told so."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = {MMAP_THRESHOLD: FROM_KERNEL, TRIM_THRESHOLD: LARGEST, TOP_PAD: 64 * 2**20}
    return all(mallopt(parameter, value) == 1 for parameter, value in wanted.items())
