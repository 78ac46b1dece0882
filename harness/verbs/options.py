"""Options that several commands share, and how their words are read. Imports nothing heavy: help must be instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from harness import registry


def complete(kind: registry.Kind) -> Any:
    return lambda incomplete: [name for name in registry.names(kind) if name.startswith(incomplete)]


Workspace = Annotated[Path, typer.Option("--workspace", help="Folder that holds results/, .harness/ and mlflow.db.")]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Folder of the data sets (else HARNESS_DATA, else ./data).")
]
Recipe = Annotated[
    list[str] | None, typer.Option("--recipe", help="Shipped recipe or FILE.toml; repeatable, later ones win.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never download missing data.")]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="Bit-reproducible kernels on CUDA (slower).")]
CheckpointSeconds = Annotated[
    float, typer.Option("--checkpoint-seconds", min=0, help="Save the training state this often.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Plugins = Annotated[
    list[Path] | None, typer.Option("--plugins", help="Folder with methods/, datasets/ or evaluators/ of yours.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting by its dotted key (harness describe METHOD)."),
]
Eval = Annotated[
    str | None,
    typer.Option("--eval", help="Evaluators, comma-separated (default linear_probe,knn,fine_tune,representation)."),
]
Labels = Annotated[
    str, typer.Option("--labels", help="Label budget: all, a count, a fraction like 0.1, Npc per class, or folds.")
]
LabelSeed = Annotated[
    int | None, typer.Option("--label-seed", min=0, max=2**62, help="Which labelled images (default: the seed).")
]
Tracking = Annotated[
    str | None, typer.Option("--tracking", help="MLflow address, or none (default: the workspace's own store).")
]
Transfer = Annotated[
    str | None, typer.Option("--transfer", help="Data sets, comma-separated, to measure the finished encoder on too.")
]
RunWord = Annotated[str, typer.Argument(metavar="RUN", help="`latest` or the first letters of a pretrain_id.")]


def words(text: str | None) -> tuple[str, ...] | None:
    """`a,b` -> ("a", "b"), each once; None stays None."""
    return None if text is None else tuple(dict.fromkeys(w.strip() for w in text.split(",") if w.strip()))


def add_plugins(folders: list[Path] | None) -> None:
    """Register what lies under `--plugins` folders."""
    for folder in folders or []:
        registry.add_folder(folder)
