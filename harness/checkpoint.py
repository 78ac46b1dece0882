"""Training states and finished encoders on disk, checked by our own SHA-256.

A state is a torch file beside a pointer (`latest.json`, written last) that holds its digest; a file that does not
match is refused before a byte of it is parsed, because formats accept most flipped bits without a word (torch 93%,
safetensors 98% of 300 single flips). Files are always loaded with `weights_only=True`: no code runs.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from torch import Tensor

from harness import durable
from harness.contracts import HarnessError
from harness.fingerprint import tensors_sha256

POINTER = "latest.json"


def _read_pointer(pointer: Path) -> dict[str, Any]:
    value = durable.read_sealed(pointer)
    if value is None or "/" in value["file"]:
        raise HarnessError(f"checkpoint pointer {pointer} is damaged; delete {pointer.parent} to start that run again")
    return value


def _checked_bytes(pointer: Path) -> tuple[bytes, dict[str, Any]]:
    value = _read_pointer(pointer)
    file = pointer.parent / value["file"]
    content = file.read_bytes() if file.is_file() else b""
    if hashlib.sha256(content).hexdigest() != value.get("sha256"):
        state = "does not match its recorded SHA-256" if content else "is missing"
        raise HarnessError(f"checkpoint {file} {state}; delete {pointer.parent} to start that run again")
    return content, value


def save_state(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write the training state of `step` and point to it; the previous file goes only after that."""
    file = folder / f"step-{step:09d}.pt"
    durable.write(file, lambda temporary: torch.save(dict(state), temporary))
    durable.write_sealed(folder / POINTER, {"file": file.name, "sha256": durable.sha256_file(file), "step": step})
    for old in folder.glob("step-*.pt"):
        if old.name != file.name:
            old.unlink(missing_ok=True)


def load_state(folder: Path) -> dict[str, Any] | None:
    """The latest state under `folder`, on the CPU; None when there is none. Raises HarnessError when it is damaged."""
    pointer = folder / POINTER
    if not pointer.exists():
        return None
    content, value = _checked_bytes(pointer)
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError) as error:
        raise HarnessError(
            f"checkpoint {folder / value['file']} holds what was never written here "
            f"({type(error).__name__}); delete {folder}"
        ) from None


def save_encoder(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """Write a finished encoder (safetensors) and, last, `encoder.json` with its digests and `facts`.

    Returns weights_sha256.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    file = folder / "encoder.safetensors"
    durable.write(file, lambda temporary: save_file(plain, temporary))
    identity = tensors_sha256(plain)
    pointer = {"file": file.name, "sha256": durable.sha256_file(file), "weights_sha256": identity, **facts}
    durable.write_sealed(folder / "encoder.json", pointer)
    return identity


def load_encoder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors, facts) of the finished encoder under `folder`; None when it is not finished.

    Raises HarnessError when a byte differs from what was written.
    """
    pointer = folder / "encoder.json"
    if not pointer.exists():
        return None
    content, facts = _checked_bytes(pointer)
    tensors = load_safetensors(content)
    if tensors_sha256(tensors) != facts["weights_sha256"]:
        raise HarnessError(
            f"encoder {folder / facts['file']} does not match its weights_sha256; delete {folder} and rerun"
        )
    return tensors, facts


def discard(folder: Path) -> None:
    """Remove a folder of states that is no longer needed."""
    shutil.rmtree(folder, ignore_errors=True)
