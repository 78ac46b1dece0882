"""A search as files for others: its trials, what mattered, the expected best, the winners' recipes, one table in Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import durable, search_files, studies
from harness.report import text, typography
from harness.studies import MethodSearch, Study


def export(workspace: Path, document: Mapping[str, Any], folder: Path) -> list[str]:
    """Write a search into `folder`; returns the names of the files.

    trials.csv: one line per trial; importance.csv; expected_best.csv: one line per method and number of trials; table.md;
    best.toml or best-<method>.toml as `harness tune` wrote them, where a winner is known.
    """
    study = studies.read(document)
    files = {
        "trials.csv": search_files.trials_csv(document), "importance.csv": importance_csv(study),
        "expected_best.csv": expected_best_csv(study), "table.md": markdown(study),
    }  # fmt: skip
    for name, content in files.items():
        durable.write_bytes(folder / name, content.encode())
    recipes = sorted(studies.study_folder(workspace, study.name).glob("best*.toml"))
    for recipe in recipes:
        if recipe.parent.resolve() != folder.resolve():
            durable.write_bytes(folder / recipe.name, recipe.read_bytes())
    return [*files, *(recipe.name for recipe in recipes)]


def importance_csv(study: Study) -> str:
    """method, setting, share, completed trials that it rests on; share is empty where those are too few."""
    lines = [[one.method, key, one.importance.get(key, ""), len(one.complete)]
             for one in study.methods for key in (one.importance or one.space)]  # fmt: skip
    return _csv(["method", "setting", "share", "completed_trials"], lines)


def expected_best_csv(study: Study) -> str:
    """method, trials, expected best value of so many."""
    lines = [[one.method, n, value] for one in study.methods for n, value in enumerate(one.expected_best, 1)]
    return _csv(["method", "trials", "expected_best"], lines)


def _csv(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(lines)
    return out.getvalue()


COLUMNS = (
    "method",
    "trials",
    "best on validation",
    "default",
    "tuned",
    "tuned − default, points",
    "seeds",
    "cost of tuning",
)


def table(study: Study) -> list[list[str]]:
    """One line per method, as words for COLUMNS; values in per cent, intervals are Student's t 95% of paired seeds."""
    return [[one.method, trials(one), best(one, study.metric), *comparison(one, study.metric), cost(one)]
            for one in study.methods]  # fmt: skip


def trials(one: MethodSearch) -> str:
    """`9 complete, 3 pruned`."""
    words = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
    return ", ".join(f"{count} {words[state]}" for state, count in one.counts.items() if count) or "none"


def best(one: MethodSearch, metric: str) -> str:
    """`81.25 (trial 7)`; beside it the winner on more seeds where it is another one."""
    if one.best is None:
        return "–"
    shown = f"{typography.value(one.best.value, metric)} (trial {one.best.number})"
    return shown if one.winner in (None, one.best.number) else f"{shown}; trial {one.winner} on more seeds"


def comparison(one: MethodSearch, metric: str) -> list[str]:
    """Default, tuned, difference with its interval, number of seeds."""
    done = one.confirmed
    if done is None or done.gap is None:
        return ["–", "–", "–", "0"]
    bounds = typography.interval(done.gap.low, done.gap.high, metric, signed=True)
    gap = typography.points(done.gap.mean, metric) + (f" ({bounds})" if bounds else "")
    return [typography.value(done.mean("default"), metric), typography.value(done.mean("tuned"), metric), gap,
            str(done.gap.n)]  # fmt: skip


def cost(one: MethodSearch) -> str:
    """`4.2 min of device time, 36 epochs`."""
    return f"{typography.seconds(one.seconds)}, {one.epochs:,} epochs"


def judged(study: Study) -> str:
    """What default and tuned settings were compared on, as a sentence; empty where they were not."""
    done = next((one.confirmed for one in study.methods if one.confirmed is not None), None)
    if done is None:
        return ""
    where = (
        done.dataset if done.dataset == study.dataset else f"{done.dataset} (settings were chosen on {study.dataset})"
    )
    return f"Default and tuned: mean on the {done.split} split of {where}, over seeds that chose nothing."


def markdown(study: Study) -> str:
    """The search as one table for a README."""

    def line(words: Iterable[str]) -> str:
        return "| " + " | ".join(text.in_markdown(text.clean(word)) for word in words) + " |"

    about = (f"{study.name}: {study.objectives[0]} on {study.dataset}, labels {study.labels}; {study.trials} trials of each "
             f"method, sampler {study.sampler}, validation seeds {', '.join(map(str, study.seeds))}.")  # fmt: skip
    notes = [
        f"Warning: {warning}."
        for one in study.methods
        for warning in studies.agreement_warnings(one.method, one.rank_agreement)
    ]
    words = [about, judged(study), *notes]
    rows = [line(COLUMNS), "|" + "---|" * len(COLUMNS), *map(line, table(study))]
    return "\n".join([*rows, "", *(text.in_markdown(text.clean(word)) for word in words if word)]) + "\n"


__all__ = ["COLUMNS", "expected_best_csv", "export", "importance_csv", "judged", "markdown", "table"]
