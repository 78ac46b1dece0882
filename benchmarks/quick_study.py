"""The quick check on real data: runs it (or finds it done), copies the rows, writes the table. A smoke test, no ranking.

    python benchmarks/quick_study.py --data-dir DATA --workspace DIR

Conditions: recipe `quick`, `sc` on MNIST and Fashion-MNIST, seeds 10 to 12 (the configuration was chosen on Fashion-MNIST,
seed 0), 1,000 labels, every readout, all controls and floors. Every number in results/studies/quick/ comes from rows.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

import harness

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "results" / "studies" / "quick"
DATASETS, SEEDS, LABELS = ("mnist", "fashion_mnist"), (10, 11, 12), "1000"
PRIMARY = (("linear_probe", "gap"), ("linear_probe", "spatial"), ("linear_probe", "spatial_pca"), ("knn", "gap"),
           ("fine_tune", None))  # fmt: skip
TITLES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}


def interval(values: np.ndarray) -> str:
    """Mean and Student t 95% interval of the mean."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{100 * values.mean():+.2f} [{100 * (values.mean() - half):+.2f}, {100 * (values.mean() + half):+.2f}]"


def table(rows: pd.DataFrame) -> list[str]:
    """One Markdown table: arms by readouts, mean test top-1 in per cent and each seed's value."""
    test = rows[(rows.split == "test") & rows.metric.str.startswith("top1") & (rows.metric != "top1_k1")].copy()
    test["column"] = test.evaluator.where(test.readout.isna(), test.evaluator + " " + test.readout.fillna(""))
    columns = list(dict.fromkeys(test.column))
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method in dict.fromkeys(test.method):
        cells = []
        for column in columns:
            values = test[(test.method == method) & (test.column == column)].sort_values("seed").value.to_numpy(float)
            each = ", ".join(f"{100 * v:.2f}" for v in values)
            cells.append(f"{100 * values.mean():.2f} ({each})" if len(values) else "")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def gains(rows: pd.DataFrame) -> list[str]:
    """Paired differences over seeds, with t intervals, for the primary readouts."""
    lines = ["| pair | evaluation | difference in points, 95% t interval, n |", "|---|---|---|"]
    test = rows[(rows.split == "test") & (rows.metric == "top1")]
    for one, other in (("sc", "random_init"), ("sc_null", "random_init"), ("sc", "sc_null")):
        for evaluator, readout in PRIMARY:
            named = test.readout.isna() if readout is None else test.readout == readout
            picked = test[(test.evaluator == evaluator) & named]
            wide = picked.pivot(index="seed", columns="method", values="value")
            difference = (wide[one] - wide[other]).to_numpy(float)
            lines.append(
                f"| {one} - {other} | {evaluator} {readout or ''} | {interval(difference)}, {len(difference)} |"
            )
    return lines


def pretext(rows: pd.DataFrame) -> list[str]:
    """What `sc` says of its own task."""
    own = rows[(rows.evaluator == "pretext") & (rows.method == "sc") & rows.value.notna()]
    lines = ["| measured on the pretext task of sc | mean over seeds (each) |", "|---|---|"]
    for metric in dict.fromkeys(own.metric):
        values = own[own.metric == metric].sort_values("seed").value.to_numpy(float)
        lines.append(f"| {metric} | {values.mean():.3g} ({', '.join(f'{v:.3g}' for v in values)}) |")
    return lines


def write(rows: pd.DataFrame) -> None:
    """The study's README from its rows."""
    first = rows.iloc[0]
    lines = [
        "# Quick check on real data", "",
        "A smoke test, not a ranking, and no reproduction of the paper. Made by `benchmarks/quick_study.py`; every number comes",
        "from the rows in `rows/`, none is typed.", "",
        "Conditions: recipe `quick` (8,000 unlabelled images, 4 epochs, `convnet_small`, batch 128), "
        f"{LABELS} labels, seeds {', '.join(str(s) for s in SEEDS)}, {first.device}, {first.precision}, "
        f"{first.num_threads} thread, torch {first.torch_version}, NUMBERS_VERSION {first.numbers_version}.", "",
    ]  # fmt: skip
    for name in DATASETS:
        mine = rows[rows.dataset == name]
        verified = "published files" if mine.data_verified.all() else "NOT the published files"
        lines += [f"## {TITLES[name]} ({verified}, {int(mine.n_test.max()):,} test images)", "",
                  "Test top-1 in per cent: mean (each seed). The floors need no network.", "",
                  *table(mine), "", *gains(mine), "", *pretext(mine), ""]  # fmt: skip
        gap = mine[(mine.evaluator == "linear_probe") & (mine.readout == "gap") & (mine.split == "test")]
        gap = gap[gap.metric == "top1"]
        wide = gap.pivot(index="seed", columns="method", values="value")
        expected = 0.06 if name == "mnist" else 0.02
        found = float((wide["sc"] - wide["random_init"]).mean())
        share = float((wide["sc_null"] - wide["random_init"]).mean())
        lines += [f"Expected gain of sc over random_init with gap: at least {100 * expected:+.0f} points; "
                  f"found {100 * found:+.2f}; the null control, without information, shows {100 * share:+.2f}.", ""]  # fmt: skip
        unconverged = mine[(mine.evaluator == "fine_tune") & (mine.metric == "top1") & (mine.converged == False)]  # noqa: E712
        if len(unconverged):
            arms = ", ".join(sorted({f"{r.method} seed {r.seed}" for r in unconverged.itertuples()}))
            lines += [f"Fine-tuning did not converge, so comparisons with these arms are not valid: {arms}.", ""]
    (STUDY / "README.md").write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--workspace", type=Path, required=True)
    options = parser.parse_args()
    frames = []
    for name in DATASETS:
        for seed in SEEDS:
            frames.append(harness.run(method="sc", dataset=name, seed=seed, recipe="quick", labels=LABELS,
                                      workspace=options.workspace, data_dir=options.data_dir, tracking="none"))  # fmt: skip
            print(name, seed, len(frames[-1]), "rows", flush=True)
    rows = pd.concat(frames)
    shutil.rmtree(STUDY / "rows", ignore_errors=True)
    for pretrain_id, eval_id in sorted({(r.pretrain_id, r.eval_id) for r in rows.itertuples()}):
        target = STUDY / "rows" / pretrain_id / f"{eval_id}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(options.workspace / "results" / "runs" / pretrain_id / target.name, target)
    write(rows)


if __name__ == "__main__":
    main()
