"""Identity: what makes two pretrainings, evaluations or weights the same.

`pretrain_id` hashes every setting that can change the weights and nothing else (no paths, no device index, no log
settings); `eval_id` adds the evaluator's. Source code enters as tokens, so comments, docstrings and layout are free.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

# Bump when the engine (orders, seeds, crops, subsets, the loop, the evaluators' arithmetic) changes any number.
NUMBERS_VERSION = 2
# Of runs on CUDA alone. 1: batch norm, pooling, views and ResNets' first convolution by code of our own (decisions 013, 015).
CUDA_REVISION = 1
ID_LENGTH = 16


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    ).hexdigest()


def short_id(value: Any) -> str:
    """The first 16 hex digits of `digest`: 64 bits, unique among billions of runs."""
    return digest(value)[:ID_LENGTH]


def source_tokens(source: str) -> str:
    """Python source without comments, docstrings and layout: the dump of its syntax tree."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return ast.dump(tree, annotate_fields=False)


@cache
def code_sha256(plugin: type[Any]) -> str:
    """Hash of the source of a plugin class and of the plugin modules it inherits from."""
    modules = []
    for ancestor in plugin.__mro__:
        module = ancestor.__module__
        ours = module.startswith(("harness.methods.", "harness.evaluators."))
        if (ours or ancestor is plugin) and module not in modules:
            modules.append(module)
    text = [source_tokens(inspect.getsource(sys.modules[module])) for module in modules]
    return digest(text)


def weights_sha256(module: nn.Module) -> str:
    """Hash over (name, dtype, shape, bytes) of a module's tensors sorted by name."""
    return tensors_sha256(module.state_dict())


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """Hash over (name, dtype, shape, bytes) of tensors sorted by name."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return total.hexdigest()
