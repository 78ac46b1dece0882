"""Where code of our own for CUDA is used: harness.batch_norm, harness.max_pool, harness.device_views, harness.stem."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor, nn


def ordinary(*tensors: Tensor) -> bool:
    """Tensors on CUDA with values of their own: no stand-ins, none inside vmap or torch.func, none of a compiler's."""
    if torch.compiler.is_compiling() or not all(t.is_cuda for t in tensors):
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return all(type(t) in (Tensor, nn.Parameter) and not wrapped(t) for t in tensors)


def applicable(*tensors: Tensor) -> bool:
    """Whether Triton kernels of ours can take these tensors, in a step that is eager or being captured."""
    return ordinary(*tensors) and usable(tensors[0].device)


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether a kernel can be started there: Triton may be absent, too old for the card, or without a C compiler.

    Tried once; a failure is said, and training goes on with torch's own kernels. Raises OutOfMemoryError, which says
    nothing about kernels.
    """
    try:
        from harness import map_kernels

        with torch.cuda.device(device):
            one = torch.ones(2, device=device)
            map_kernels.added_up[(1, 2)](one, torch.empty_like(one), 1, 1, BLOCK_P=16, BLOCK_C=16)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        unusable("Triton", device, error)
        return False
    return True


def unusable(what: str, device: torch.device, error: Exception) -> None:
    """Say that torch's own kernels are used, and why."""
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    warnings.warn(f"{what} cannot be used on {device} ({reason}); torch's own kernels are", stacklevel=3)
