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
from harness import registry

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "results" / "studies" / "learning"
DATASETS, SEEDS, LABELS = ("mnist", "fashion_mnist"), "10-12", "1000"
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
    frames = []
    for variant in variants():
        for dataset in options.datasets.split(","):
            if only and variant.method not in only:
                continue
            rows = measure(variant, dataset, options.workspace, options.data_dir)
            frames.append(rows)
            best = rows[(rows.split == "test") & (rows.metric == "top1") & (rows.evaluator == "linear_probe")]
            means = best.groupby("readout").value.mean().round(4).to_dict()
            print(dataset, variant.label, json.dumps(means), flush=True)
    if options.write:
        copy_rows(pd.concat(frames), options.workspace)


def copy_rows(rows: pd.DataFrame, workspace: Path) -> None:
    """The sealed row files behind `rows`, and which line of the table each belongs to."""
    shutil.rmtree(STUDY / "rows", ignore_errors=True)
    for pretrain_id, eval_id in sorted({(r.pretrain_id, r.eval_id) for r in rows.itertuples()}):
        target = STUDY / "rows" / pretrain_id / f"{eval_id}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(workspace / "results" / "runs" / pretrain_id / target.name, target)


if __name__ == "__main__":
    main()
