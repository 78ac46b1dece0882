"""The linear probe's path of strengths against scikit-learn's, one strength after another with warm starts.

    python benchmarks/probe.py [--rows 50000] [--width 512] [--strengths 12] [--rounds 3] [--core 0] [--json]
    python benchmarks/probe.py --dataset mnist --data-dir DATA

With --dataset the rows are the 512 features of an untrained ResNet-18 on that data set's images. Without, they are
drawn (overlapping Gaussian classes in correlated directions): then the table is about time and agreement only.
`ours` is `fit_path` at the tolerance with which strengths are compared on validation; `ours, refit tolerance` solves
every strength as exactly as the final refit does. scikit-learn: LogisticRegression (lbfgs), its default tolerance, at
most 1,000 iterations per strength. Excess: how far the minimised objective lies above the lowest that any of them found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import median, options, spread

from harness.batches import Batches
from harness.evaluators.linear_probe import PATH_TOLERANCE, TOLERANCE, fit_path

WEAKEST, STRONGEST = 1e-6, 1e2


def rows_of(count: int, width: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Standardised features (count, width) float32 and labels (count,)."""
    shared = np.random.default_rng(0)
    spectrum = 1 / np.sqrt(1 + np.arange(width))
    mixing = shared.standard_normal((width, width)) * spectrum[:, None] / np.sqrt(width) * 10
    centres = shared.standard_normal((classes, width)) * 0.07
    own = np.random.default_rng(seed)
    labels = own.integers(0, classes, count)
    features = (centres[labels] + own.standard_normal((count, width))) @ mixing
    return features.astype(np.float32), labels


def features_of(dataset: str, data_dir: Path, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`gap` of an untrained ResNet-18: `count` training rows and labels, then 10,000 test rows and labels."""
    from harness.arms import open_dataset
    from harness.encoders import build, set_batch_norm_statistics
    from harness.evaluation import extract

    data = open_dataset(dataset, data_dir, None, True)
    torch.manual_seed(0)
    encoder = build("resnet18", data.info)
    train, test = data.split("train"), data.split("test")
    batches = Batches(train.images, None, batch_size=256, seed=0, device=torch.device("cpu"))
    set_batch_norm_statistics(encoder, batches.batches(8192))
    cpu = torch.device("cpu")
    rows = extract(encoder, train.images, torch.arange(count), cpu)["gap"].numpy()
    held_out = extract(encoder, test.images, torch.arange(min(10_000, len(test.images))), cpu)["gap"].numpy()
    return rows, train.labels[:count].numpy(), held_out, test.labels[: len(held_out)].numpy()


def main() -> None:
    """Measure and print."""
    chosen, bench = options(
        "probe", __doc__ or "", rows={"type": int, "default": 50_000}, width={"type": int, "default": 512},
        strengths={"type": int, "default": 12}, classes={"type": int, "default": 10},
        dataset={"default": None}, data_dir={"type": Path, "default": Path("data")},
    )  # fmt: skip
    if chosen.dataset:
        features, labels, held_out, targets = features_of(chosen.dataset, chosen.data_dir, chosen.rows)
    else:
        features, labels = rows_of(chosen.rows, chosen.width, chosen.classes, 1)
        held_out, targets = rows_of(10_000, chosen.width, chosen.classes, 2)
    mean, scale = features.mean(0), features.std(0)
    features = (features - mean) / scale
    held_out = (held_out - mean) / scale
    strengths = np.geomspace(STRONGEST, WEAKEST, chosen.strengths).tolist()
    accuracy: dict[str, list[float]] = {}
    objectives: dict[str, list[float]] = {}
    on_device = torch.from_numpy(features).to(bench.device)
    labels_on_device = torch.from_numpy(labels).to(bench.device)

    def ours(name: str, tolerance: float) -> None:
        models = fit_path(on_device, labels_on_device, chosen.classes, strengths, tolerance)
        test = torch.from_numpy(held_out).to(bench.device)
        accuracy[name] = [float((m.logits(test).argmax(1).cpu().numpy() == targets).mean()) for m in models]
        objectives[name] = [m.objective for m in models]

    def scikit_learn() -> None:
        from sklearn.linear_model import LogisticRegression

        model: Any = LogisticRegression(max_iter=1000, warm_start=True)
        found, values = [], []
        for strength in strengths:
            model.C = 1 / (len(features) * strength)
            model.fit(features, labels)
            found.append(float((model.predict(held_out) == targets).mean()))
            weight = torch.from_numpy(model.coef_.astype(np.float64))
            logits = torch.from_numpy(features).double() @ weight.T + torch.from_numpy(model.intercept_).double()
            fit = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
            values.append(float(fit + 0.5 * strength * weight.square().sum()))
        accuracy["scikit-learn"], objectives["scikit-learn"] = found, values

    candidates = {
        "scikit-learn": scikit_learn, "ours": lambda: ours("ours", PATH_TOLERANCE),
        "ours, refit tolerance": lambda: ours("ours, refit tolerance", TOLERANCE),
    }  # fmt: skip
    times = bench.time(candidates, warm=0)
    base = median(times["scikit-learn"])
    least = [min(values) for values in zip(*objectives.values(), strict=True)]
    table = []
    for name, found in times.items():
        best = max(accuracy[name])
        excess = max(value / low - 1 for value, low in zip(objectives[name], least, strict=True))
        table.append([name, median(found), spread(found), base / median(found), 100 * best, 100 * excess])
    shape = f"{chosen.dataset or 'drawn'}, {len(features):,} rows x {features.shape[1]}"
    bench.table(
        f"{shape}, {chosen.strengths} strengths, {chosen.classes} classes: seconds of the path",
        ["solver", "seconds", "spread", "x scikit-learn", "top-1 % at the best", "largest excess of the objective %"], table,
    )  # fmt: skip
    bench.finish()


if __name__ == "__main__":
    main()
