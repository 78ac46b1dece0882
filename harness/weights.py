"""Weights made elsewhere: read without running code, and fitted to one of our encoders."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from harness.contracts import Encoder, HarnessError


def read_weights(path: Path) -> dict[str, Tensor]:
    """An outside encoder's state dict: safetensors, or a torch file read with `weights_only=True` (no code runs)."""
    if not path.is_file():
        raise HarnessError(f"--weights {path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise HarnessError(f"--weights {path}: not a readable state dict ({reason})") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise HarnessError(f"--weights {path}: not a state dict (a mapping of names to tensors)")
    return state


def adopt(encoder: Encoder, state: dict[str, Tensor], path: Path) -> None:
    """Load an outside state dict into `encoder`; its statistics buffers may be missing, a classifier may be left over.

    Raises HarnessError naming the first keys or shapes that do not fit.
    """
    own = encoder.state_dict()
    for prefix in ("", "encoder.", "backbone.", "module."):
        candidate = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        candidate = {k if k in own else f"model.{k}": v for k, v in candidate.items()}
        missing = [k for k in own if k not in candidate and k not in ("mean", "std")]
        if not missing:
            wrong = [k for k in own if k in candidate and candidate[k].shape != own[k].shape]
            if wrong:
                raise HarnessError(
                    f"--weights {path}: '{wrong[0]}' is {tuple(candidate[wrong[0]].shape)}, "
                    f"encoder {encoder.name} needs {tuple(own[wrong[0]].shape)}"
                )
            encoder.load_state_dict({k: candidate.get(k, own[k]) for k in own})
            return
    absent = [k for k in own if k not in state and k not in ("mean", "std")]
    raise HarnessError(
        f"--weights {path}: {len(absent)} tensors of encoder {encoder.name} are missing, first '{absent[0]}'"
    )
