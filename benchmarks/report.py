"""How long `harness report` takes on 10,000 row files, and how much memory.

    python benchmarks/report.py [--files 10000] [--format markdown] [--keep DIR]

The files are real ones from results/studies/quick, repeated under other methods' and seeds' names with values drawn at
random: synthetic, for timing only, never results. They lie in a temporary workspace that is removed again. Time is the wall
clock of the whole command in a process of its own, interpreter start included; memory is the highest of that process and of
those it reads files with, which have ended when it needs most. CPU seconds, of all of them, are printed beside it, because on
a machine that does other work the wall clock says little.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import durable, records

QUICK = Path(__file__).resolve().parent.parent / "results" / "studies" / "quick" / "rows"
TRAINED = ("sc", "simclr", "byol", "moco_v2", "vicreg", "barlow_twins", "dino", "rotation", "exemplar", "lejepa")
SEEDS = range(10)
COMMAND = [sys.executable, "-c", "from harness.cli import main; main()", "report"]


def templates() -> list[dict[str, Any]]:
    """One file per (data set, method, evaluator) of the study's first seed."""
    found = [durable.read_sealed(path) for path in sorted(QUICK.rglob("*.json"))]
    return [document for document in found if document is not None and document["rows"][0]["seed"] == 10]


def copies(document: dict[str, Any], labels: str) -> list[tuple[str, int, str]]:
    """(method, seed, labels) of the files made after one."""
    method = document["rows"][0]["method"]
    methods = TRAINED if method == "sc" else (method,)
    return [(name, seed, labels) for name in methods for seed in SEEDS]


def make(workspace: Path, count: int) -> int:
    """Write `count` row files; returns how many rows they hold."""
    generator, made, rows = random.Random(0), 0, 0
    budget = 0
    while made < count:
        budget += 1
        for number, document in enumerate(templates()):
            for method, seed, labels in copies(document, f"{budget * 100}"):
                if made == count:
                    return rows
                pretrain_id = f"{abs(hash((method, seed, document['rows'][0]['dataset']))):016x}"[:16]
                eval_id = f"{made:08x}{number:08x}"
                changed = []
                for row in document["rows"]:
                    config = {**row["config"], "method_name": method, "seed": seed}
                    value = None if row["value"] is None else min(1.0, row["value"] * generator.uniform(0.97, 1.03))
                    told = {"method": method, "seed": seed, "config": config, "value": value, "pretrain_id": pretrain_id,
                            "eval_id": eval_id, "label_seed": None if row["label_seed"] is None else seed,
                            "labels": None if row["labels"] is None else labels}  # fmt: skip
                    changed.append({**row, **told})
                path = records.rows_path(workspace, pretrain_id, eval_id)
                path.parent.mkdir(parents=True, exist_ok=True)
                told = {"chosen": document["chosen"], "predictions_sha256": None, "rows": changed}
                sealed = {**told, "seal": durable.seal(told)}
                path.write_text(json.dumps(sealed, indent=1, sort_keys=True) + "\n")
                made, rows = made + 1, rows + len(changed)
    return rows


def measure(workspace: Path, form: str) -> dict[str, float]:
    """Seconds by the wall and of the CPU, and MiB, of one report."""
    flags = [] if form == "terminal" else [f"--{form}"]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run([*COMMAND, "--workspace", str(workspace), *flags], stdout=subprocess.PIPE, check=True)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return {"wall_seconds": wall, "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "peak_mib": after.ru_maxrss * scale / 2**20, "printed_kib": len(done.stdout) / 1024}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--format", choices=("terminal", "markdown", "latex", "csv"), default="terminal")
    parser.add_argument("--keep", type=Path, help="make the files there and keep them")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    workspace = options.keep or Path(tempfile.mkdtemp(prefix="harness-report-"))
    try:
        rows = make(workspace, options.files)
        found = {"files": options.files, "rows": rows, "format": options.format, "cores": os.cpu_count(),
                 **measure(workspace, options.format)}  # fmt: skip
    finally:
        if not options.keep:
            shutil.rmtree(workspace)
    if options.json:
        print(json.dumps(found))
    else:
        print("synthetic rows, for timing only")
        for name, value in found.items():
            print(f"  {name:14} {value if isinstance(value, str) else f'{value:,.1f}'}")


if __name__ == "__main__":
    main()
