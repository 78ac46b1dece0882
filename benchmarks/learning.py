"""Does every method learn? Each under the quick recipe on real images, paired against its own untrained network.

    python benchmarks/learning.py --data-dir DATA --workspace DIR [--datasets mnist] [--methods sc,byol]
    python benchmarks/learning.py --data-dir DATA --workspace DIR --write
    python benchmarks/learning.py --data-dir DATA --workspace DIR --scrutinise

The first form trains and evaluates (what is done is taken from the workspace, so it can be stopped, and two may work
side by side); `--write` also copies the rows and writes results/studies/learning/. A check that each method learns, not
a ranking: four epochs of 8,000 images say little about what a method reaches. `--scrutinise` looks for what could make
the three best look good without cause: their probes are fitted to shuffled labels, which must lead to chance, and their
pretraining images are searched for test images.

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
import torch

import harness
from harness import durable, registry, statistics
from harness.arms import open_dataset
from harness.budgets import make_budgets
from harness.evaluation import extract
from harness.evaluators.linear_probe import fit_path

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "results" / "studies" / "learning"
SCRUTINY = STUDY / "scrutiny.json"
DATASETS, SEEDS, LABELS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}, "10-12", "1000"
NUM_SEEDS = 3
EVALUATORS = ["linear_probe", "knn", "representation"]
LONGER = ("sc", "byol", "dino", "lejepa", "mae", "simmim", "ijepa", "dcgan")
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
    parser.add_argument("--missing", action="store_true", help="only what the committed study lacks")
    parser.add_argument("--write", action="store_true", help="write the study from what is done")
    parser.add_argument("--scrutinise", action="store_true", help="look into the three best of each data set")
    options = parser.parse_args()
    only = set(filter(None, options.methods.split(",")))
    known = read_rows() if options.missing else pd.DataFrame(columns=["dataset", "line", "seed"])
    for variant in variants():
        for dataset in options.datasets.split(","):
            if options.write or options.scrutinise or (only and variant.method not in only):
                continue
            if known[(known.dataset == dataset) & (known.line == variant.label)].seed.nunique() == NUM_SEEDS:
                continue
            rows = measure(variant, dataset, options.workspace, options.data_dir)
            best = rows[(rows.split == "test") & (rows.metric == "top1") & (rows.evaluator == "linear_probe")]
            means = best.groupby("readout").value.mean().round(4).to_dict()
            print(dataset, variant.label, json.dumps(means), flush=True)
    if options.scrutinise:
        found = [scrutinise(name, options.workspace, options.data_dir) for name in options.datasets.split(",")]
        SCRUTINY.write_text(json.dumps([line for lines in found for line in lines], indent=1) + "\n")
    if options.write:
        copy_rows(options.workspace)
    if options.write or options.scrutinise:
        write(read_rows())


@torch.no_grad()
def scrutinise(name: str, workspace: Path, data_dir: Path) -> list[dict[str, Any]]:
    """The three best lines of one data set: a probe of shuffled labels, and test images in the pretraining split."""
    rows = read_rows()
    rows = rows[(rows.dataset == name) & (rows.line != "supervised") & (rows.line != "supcon")]
    heads = headlines(rows[[registry.load_method(m).role is None for m in rows.method]])
    best = heads.value.groupby("line").mean().sort_values(ascending=False).index[:3]
    data = open_dataset(name, data_dir, None, True)
    train, test, cpu = data.split("train"), data.split("test"), torch.device("cpu")
    assert train.labels is not None and test.labels is not None
    known = {image.numpy().tobytes() for image in train.images.contiguous()}
    overlap = sum(image.numpy().tobytes() in known for image in test.images.contiguous())
    out = []
    for line in best:
        own = rows[(rows.line == line) & rows.label_subset_sha256.notna()].sort_values("seed").iloc[0]
        encoder = harness.load_encoder(own.pretrain_id, workspace)
        budget = make_budgets(LABELS, train.labels.numpy(), data.info.num_classes, int(own.seed), None)[0]
        readout = str(heads.readout[line].iloc[0]).replace("spatial_pca", "spatial")
        bought = torch.from_numpy(budget.indices)
        rows_of = extract(encoder, train.images, bought, cpu)[readout]
        held_out = extract(encoder, test.images, torch.arange(len(test)), cpu)[readout]
        shuffled = train.labels[bought][torch.randperm(len(bought), generator=torch.Generator().manual_seed(0))]
        top1 = {}
        for kind, labels in (("true", train.labels[bought]), ("shuffled", shuffled)):
            model = fit_path(rows_of, labels, data.info.num_classes, [1e-2])[0]
            top1[kind] = float((model.logits(held_out).argmax(1) == test.labels).double().mean())
        out.append({"dataset": name, "line": line, "seed": int(own.seed), "readout": readout, "true_labels": top1["true"],
                    "shuffled_labels": top1["shuffled"], "test_images_among_pretraining": overlap})  # fmt: skip
        print(out[-1], flush=True)
    return out


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
               if rows[(rows.dataset == n) & (rows.line == v.label)].seed.nunique() < NUM_SEEDS]  # fmt: skip
    if missing:
        lines += ["Not run, or not on all seeds yet: " + "; ".join(missing) + ".", ""]
    if SCRUTINY.exists():
        lines += ["## The three best of each, looked into", "",
                  "The same readout of seed 10 by a probe of fixed strength (0.01 per sample), fitted to the 1,000 labels and to",
                  "the same labels shuffled; and how many test images are, pixel by pixel, among all training images.", "",
                  "| data set | line | readout | true labels | shuffled labels | test images in the training split |",
                  "|---" * 6 + "|"]  # fmt: skip
        for one in json.loads(SCRUTINY.read_text()):
            lines.append(f"| {DATASETS[one['dataset']]} | {one['line']} | {one['readout']} | {100 * one['true_labels']:.2f} | "
                         f"{100 * one['shuffled_labels']:.2f} | {one['test_images_among_pretraining']} |")  # fmt: skip
        lines.append("")
    notes = STUDY / "findings.md"
    lines += [notes.read_text()] if notes.exists() else []
    (STUDY / "README.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
