"""Does every method learn? Each under the quick recipe on real images, paired against its own untrained network.

    python benchmarks/learning.py --data-dir DATA --workspace DIR [--datasets mnist] [--methods sc,byol]
    python benchmarks/learning.py --data-dir DATA --workspace DIR --write

The first form trains and evaluates (what is done is taken from the workspace, so it can be stopped, and two may work
side by side); `--write` also copies the rows and writes results/studies/learning/. A check that each method learns, not
a ranking: four epochs of 8,000 images say little about what a method reaches.

Conditions: recipe `quick` (8,000 unlabelled images, 4 epochs, batches of 128, `convnet_small`), seeds 10 to 12, 1,000
labels, one thread. A method whose class declares an optimiser keeps it: a ViT does not train by the recipe's SGD. On
digits crops keep at least 40% of the area (`mirror` and colours follow the data set by themselves). Methods with a
network of their own are paired with that network untrained. LONGER repeats those known to start slowly with four times
the epochs. Supervised ones see the labelled images for as many steps as the others see unlabelled ones.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

import harness
from harness import durable, registry, statistics

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "results" / "studies" / "learning"
DATASETS, SEEDS, LABELS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}, "10-12", "1000"
EVALUATORS = ["linear_probe", "knn", "representation"]
LONGER = ("byol", "dino", "lejepa", "mae", "simmim", "ijepa", "dcgan")
IMAGES_SEEN = 4 * 8000
SMALLEST_CROP = 0.4  # of digits, share of the area


@dataclass(frozen=True)
class Variant:
    """One line of the table: a method and what it is run with beside the recipe."""

    method: str
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.method} ({self.note})" if self.note else self.method


def variants() -> list[Variant]:
    """Every registered method, the variants, the longer runs."""
    names = [n for n in registry.names("method") if registry.load_method(n).role != "outside"]
    names.sort(key=lambda n: (registry.load_method(n).tier != "ranked", n))
    out = []
    for name in names:
        plugin = registry.load_method(name)
        settings: dict[str, Any] = {k: v for k, v in plugin.defaults.items() if k.startswith(("optim.", "schedule."))}
        if any(key.startswith("optim.") for key in settings):
            settings.setdefault("schedule.name", "cosine")
        if plugin.supervised and plugin.trains:
            settings["epochs"] = IMAGES_SEEN // 800  # of the 1,000 labelled images 800 are fitted on
        out.append(Variant(name, settings=settings))
    out.append(Variant("sc", "layers conv3 and conv4", {"method.layers": ["conv3", "conv4"]}))
    out.append(Variant("random_init", "vit_tiny", {"encoder.name": "vit_tiny"}))
    plain = {variant.method: variant for variant in out if not variant.note}
    out += [Variant(n, "16 epochs", {**plain[n].settings, "epochs": 16}) for n in LONGER]
    return sorted(out, key=_importance)


def _importance(variant: Variant) -> int:
    """What everything is held against comes first, then the ranked methods: a study that is cut short is of use."""
    plugin = registry.load_method(variant.method)
    if plugin.role is not None:
        return 0
    return 1 + (plugin.tier != "ranked") + (variant.note != "") * (plugin.tier != "ranked")


def settings_of(variant: Variant, dataset: str) -> dict[str, Any]:
    """The dotted settings beside the recipe."""
    fields = registry.load_method(variant.method).Config.model_fields
    out = {"num_threads": 1, **variant.settings}
    if dataset == "mnist" and "crop_scale" in fields and fields["crop_scale"].default < SMALLEST_CROP:
        out["method.crop_scale"] = SMALLEST_CROP
    return out


def measure(variant: Variant, dataset: str, workspace: Path, data_dir: Path) -> pd.DataFrame:
    """All seeds of one line on one data set; every row, with the line's label."""
    settings = settings_of(variant, dataset)
    rows = harness.run(
        method=variant.method, dataset=dataset, seeds=SEEDS, recipe="quick", labels=LABELS, evaluators=EVALUATORS,
        control=False, workspace=workspace, data_dir=data_dir, tracking="none", set=settings,
    )  # fmt: skip
    return rows.assign(line=variant.label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--datasets", default=",".join(DATASETS))
    parser.add_argument("--methods", default="", help="only these, comma-separated")
    parser.add_argument("--write", action="store_true", help="write the study from what is done")
    options = parser.parse_args()
    only = set(filter(None, options.methods.split(",")))
    for variant in variants():
        for dataset in options.datasets.split(","):
            if options.write or (only and variant.method not in only):
                continue
            rows = measure(variant, dataset, options.workspace, options.data_dir)
            best = rows[(rows.split == "test") & (rows.metric == "top1") & (rows.evaluator == "linear_probe")]
            means = best.groupby("readout").value.mean().round(4).to_dict()
            print(dataset, variant.label, json.dumps(means), flush=True)
    if options.write:
        copy_rows(options.workspace)
        write(read_rows())


def copy_rows(workspace: Path) -> None:
    """Put the workspace's row files into the study, beside those that are there."""
    for source in sorted((workspace / "results" / "runs").glob("*/*.json")):
        target = STUDY / "rows" / source.parent.name / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def read_rows() -> pd.DataFrame:
    """The study's rows, each with the line of the table it belongs to."""
    records = []
    for path in sorted((STUDY / "rows").glob("*/*.json")):
        document = durable.read_sealed(path)
        assert document is not None, f"{path} is damaged"
        records += document["rows"]
    rows = pd.DataFrame(records)
    return rows.assign(line=[_line_of(row) for row in rows.itertuples()])


def _line_of(row: Any) -> str:
    same = [v for v in variants() if v.method == row.method]
    for variant in same[::-1]:  # what has a note has more settings to agree in
        wanted = {k: v for k, v in settings_of(variant, row.dataset).items() if variant.note and k in row.config}
        if all(row.config[key] == value for key, value in wanted.items()):
            return variant.label
    raise AssertionError(f"no line for {row.method}")


# ----------------------------------------------------------------------------------------------------------- the table


def headlines(rows: pd.DataFrame) -> pd.DataFrame:
    """Test top-1 of every (line, seed) at the readout that its validation chose: columns value, readout."""
    probes = rows[rows.evaluator.isin(("linear_probe", "svm")) & rows.metric.str.startswith("top1")]
    keys = ["line", "seed", "evaluator", "readout"]
    both = probes[probes.split == "validation"].merge(probes[probes.split == "test"], on=keys, suffixes=("_chosen", ""))
    both = both.sort_values("value_chosen", ascending=False, kind="stable").drop_duplicates(["line", "seed"])
    return both.set_index(["line", "seed"])[["value", "readout"]]


def difference(heads: pd.DataFrame, line: str, other: str) -> str:
    """Paired difference of two lines in points with its t interval, or nothing."""
    if line == other or line not in heads.index or other not in heads.index:
        return ""
    found = statistics.t_interval((heads.value[line] - heads.value[other]).dropna().to_numpy(float))
    bounds = "" if found.low is None or found.high is None else f" [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return f"{100 * found.mean:+.2f}{bounds}"


def table(rows: pd.DataFrame) -> list[str]:
    """One Markdown table of one data set, its lines in the order of `variants`."""
    heads, test = (
        headlines(rows),
        rows[(rows.split == "test") & (rows.evaluator == "linear_probe") & (rows.metric == "top1")],
    )
    lines = ["| line | tier | gap | grid | grid by PCA | cls | headline (each seed) | - untrained | - null control | alarms |",
             "|---" * 10 + "|"]  # fmt: skip
    for variant in variants():
        mine = rows[rows.line == variant.label]
        if mine.empty:
            continue
        plugin, own = registry.load_method(variant.method), mine.encoder.iloc[0]
        cells = [variant.label, plugin.tier if plugin.role is None else plugin.role]
        for readout in ("gap", "spatial", "spatial_pca", "cls"):
            values = test[(test.line == variant.label) & (test.readout == readout)].value
            cells.append(f"{100 * values.mean():.2f}" if len(values) else "")
        seen = heads.loc[variant.label].sort_index() if variant.label in heads.index else None
        each = "" if seen is None else ", ".join(f"{100 * v:.2f}" for v in seen.value)
        cells.append(
            "" if seen is None else f"{100 * seen.value.mean():.2f} ({each}; {'/'.join(dict.fromkeys(seen.readout))})"
        )
        untrained = "random_init (vit_tiny)" if own == "vit_tiny" else "random_init"
        cells.append(difference(heads, variant.label, untrained) if plugin.role is None else "")
        cells.append(difference(heads, variant.label, plugin.null_control or variant.label))
        failed = sorted(set(mine.status) - {"FINISHED"})
        cells.append(", ".join([*failed, *(["collapsed"] if (mine.collapsed == True).any() else [])]))  # noqa: E712
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def write(rows: pd.DataFrame) -> None:
    """The study's README from its rows, and what has been noted beside them."""
    first = rows.iloc[0]
    commits = sorted({str(commit)[:12] for commit in rows.git_commit})
    lines = [
        "# Does every method learn?", "",
        "A check that each method learns something, not a ranking: the budget is four epochs of 8,000 images. Made by",
        "`benchmarks/learning.py` from the rows in `rows/`; no number is typed.", "",
        "Conditions: recipe `quick` (8,000 unlabelled images, 4 epochs unless the line says otherwise, batches of 128,",
        "`convnet_small` or the method's own network), 1,000 labels, seeds 10 to 12; a method that declares an optimiser keeps",
        "it, with a cosine schedule; on MNIST crops keep at least 40% of the area; supervised methods take as many steps. "
        f"{first.device}, {first.precision}, {first.num_threads} thread, torch {first.torch_version}, "
        f"NUMBERS_VERSION {first.numbers_version}, commits {', '.join(commits)}.", "",
        "Test top-1 in per cent, means over seeds. Headline: the readout that validation chose, run by run. Differences are",
        "paired by seed, in points, with Student's t 95% interval over three seeds: too few for a winner. `untrained` is the",
        "same network at random initialisation; the null control has the same loss and budget and no information.", "",
    ]  # fmt: skip
    for name, title in DATASETS.items():
        mine = rows[rows.dataset == name]
        verified = "published files" if mine.data_verified.all() else "NOT the published files"
        lines += [f"## {title} ({verified}, {int(mine.n_test.max()):,} test images)", "", *table(mine), ""]
    missing = [f"{v.label} on {t}" for n, t in DATASETS.items() for v in variants()
               if rows[(rows.dataset == n) & (rows.line == v.label)].seed.nunique() < 3]  # fmt: skip
    if missing:
        lines += ["Not run, or not on all seeds yet: " + "; ".join(missing) + ".", ""]
    notes = STUDY / "findings.md"
    lines += [notes.read_text()] if notes.exists() else []
    (STUDY / "README.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
