"""What `harness run` costs besides training and evaluation: CPU seconds of imports, set-up, figures, records, MLflow.

    python benchmarks/startup.py [--rounds 3] [--json] [--method sc] [--dataset digits] [--epochs N]

Every round is one whole command in a fresh process and a fresh workspace, the process that mirrors into MLflow and its
first-use migrations included. In that process the pretraining and the evaluators are bracketed by the CPU clock; what
is outside the brackets is the start-up and the bookkeeping.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import cpu_seconds, median, options, spread


def measure(arguments: list[str]) -> dict[str, float]:
    """CPU seconds of one command in this process: by phase, and the whole with its children."""
    began = cpu_seconds()
    from harness import cli, evaluation, pretrain, registry, runner

    parts = {"training": 0.0, "evaluation": 0.0, "figures": 0.0}
    imported = cpu_seconds() - began

    def bracket(owner: Any, name: str, phase: str) -> None:
        real = getattr(owner, name)

        def timed(*words: Any, **named: Any) -> Any:
            start = cpu_seconds()
            try:
                return real(*words, **named)
            finally:
                parts[phase] += cpu_seconds() - start

        setattr(owner, name, timed)

    bracket(pretrain, "train", "training")
    for name in registry.names("evaluator"):
        bracket(registry.load_evaluator(name), "evaluate", "evaluation")
    bracket(runner, "log_evaluation_figures", "figures")
    bracket(runner, "log_pretraining_figures", "figures")
    # fine-tuning calls the training loop from inside an evaluator: count it once
    real_trainer = evaluation.Task.trainer

    def trainer(self: Any, *words: Any, **named: Any) -> Any:
        before = parts["training"]
        try:
            return real_trainer(self, *words, **named)
        finally:
            parts["training"] = before

    evaluation.Task.trainer = trainer  # type: ignore[method-assign]
    cli.app(arguments, standalone_mode=False)  # not main: it ends the process without a word
    whole = cpu_seconds() - began
    return {"whole": whole, "first imports": imported, **parts}


def main() -> None:
    """Measure and print."""
    if os.environ.get("STARTUP_MEASURE"):
        report = Path(os.environ["STARTUP_MEASURE"])
        report.write_text(json.dumps(measure(sys.argv[1:])))
        return
    chosen, bench = options("startup", __doc__ or "", method={"default": "sc"}, dataset={"default": "digits"},
                            epochs={"type": int, "default": None})  # fmt: skip
    words = ["run", "--method", chosen.method, "--dataset", chosen.dataset, "--device", chosen.device]
    words += ["--epochs", str(chosen.epochs)] if chosen.epochs else []
    rounds: list[dict[str, float]] = []
    for _ in range(chosen.rounds):
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            before = cpu_seconds()
            subprocess.run(
                [sys.executable, os.path.abspath(__file__), *words, "--workspace", f"{folder}/w"], check=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "STARTUP_MEASURE": str(report)},
            )  # fmt: skip
            found = json.loads(report.read_text())
            found["process and its children"] = cpu_seconds() - before
            found["besides training and evaluation"] = (
                found["process and its children"] - found["training"] - found["evaluation"]
            )
            rounds.append(found)
    rows = [[name, median([r[name] for r in rounds]), spread([r[name] for r in rounds])] for name in rounds[0]]
    bench.table(f"harness {' '.join(words)}: CPU seconds", ["phase", "median", "spread"], rows)
    bench.finish()


if __name__ == "__main__":
    main()
