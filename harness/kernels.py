"""Where Triton kernels of our own can be used: harness.batch_norm, harness.max_pool, harness.device_views."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor


def applicable(*tensors: Tensor) -> bool:
    """Plain tensors on CUDA, in a step that is eager or being captured; a compiler fuses by itself."""
    if torch.compiler.is_compiling() or not all(t.is_cuda for t in tensors):
        return False
    if any(type(t) is not Tensor or torch._C._functorch.is_batchedtensor(t) for t in tensors):
        return False
    return usable(tensors[0].device)


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether a kernel can be started there: Triton may be absent, too old for the card, or without a C compiler.

    Tried once; a failure is said, and training goes on with torch's own kernels.
    """
    try:
        from harness import map_kernels

        with torch.cuda.device(device):
            one = torch.ones(2, device=device)
            map_kernels.added_up[(1, 2)](one, torch.empty_like(one), 1, 1, BLOCK_P=16, BLOCK_C=16)
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        warnings.warn(f"Triton cannot be used on {device} ({reason}); torch's own kernels are", stacklevel=2)
        return False
    return True
