"""Take an encoder out of the workspace: safetensors for all, and for a ResNet a file that torchvision loads as its own.

OUT gets `encoder.safetensors`, `encoder.json` (what it is, how its input is made, how to load it; written last) and,
for `resnet18` and `resnet50` on three channels, `torchvision_<name>.pt`: a state dict that loads with `strict=True`,
whose `fc` is the `gap` linear probe with its standardisation folded in. The probe is fitted again on the label budget
and with the strength that its rows recorded, and the file is given out only when it repeats the test predictions that
were stored then: nothing is chosen by them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness import arms, checkpoint, durable, encoders, fingerprint, records, runs
from harness.budgets import make_budgets
from harness.contracts import DatasetInfo, Encoder, HarnessError, LabelBudget, Row, Split
from harness.embed import home_device
from harness.evaluation import EXTRACTION_BATCH, computing_in, extract
from harness.evaluators.linear_probe import LinearModel, fit_path
from harness.images import digest_split, shown

TORCHVISION = ("resnet18", "resnet50")
# Features on another device or number of threads differ in their last bits, and may turn a tie; more is a fault.
LEAST_AGREEMENT = 0.99
LEAST_AGREEMENT_BF16 = 0.95  # the file computes in float32 what was measured in bfloat16; the report says how many
INPUT = "images (B, C, H, W): uint8, or floats in [0, 1] (uint8 / 255); the encoder itself takes (images - mean) / std"


@dataclass(frozen=True)
class TorchvisionFile:
    """The state dict for torchvision. labels, label_seed, fold, strength: of the probe that is its `fc`.

    num_equal, num_test: test predictions equal to the stored ones, of how many (None: the data set has no test split)
    """

    name: str
    labels: str
    label_seed: int
    fold: int | None
    strength: float
    num_equal: int | None
    num_test: int | None


@dataclass(frozen=True)
class ExportReport:
    """What lies in `out` now. reason: why there is no file for torchvision (empty when there is one)."""

    out: Path
    weights_sha256: str
    torchvision: TorchvisionFile | None
    reason: str

    def lines(self) -> list[str]:
        """The report for a terminal."""
        first = f"{shown(self.out)}: encoder.safetensors, encoder.json (weights_sha256 {self.weights_sha256[:16]})"
        file = self.torchvision
        if file is None:
            return [first, f"no torchvision file: {self.reason}"]
        fold = "" if file.fold is None else f", fold {file.fold}"
        line = f"{file.name}: fc = the gap probe on labels {file.labels} (label seed {file.label_seed}{fold})"
        if file.num_test is not None:
            line += f"; {file.num_equal:,} of {file.num_test:,} test predictions as stored"
        return [first, line]


def export(run: runs.Run, out: Path, data_dir: Path | None = None, torchvision: bool = False) -> ExportReport:
    """Write the encoder of `run` into the new or empty folder `out`.

    data_dir: where the data set lies; needed to fit the probe again, for torchvision's file only
    torchvision: True makes it an error when that file cannot be made, instead of a line in the report
    Raises HarnessError, before anything is written, when `out` is taken or the run has no network.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HarnessError(f"{shown(out)} is not an empty folder; nothing is overwritten, give another name")
    own = arms.own_encoder(run.facts["method"], run.config, run.info)
    encoder = run.encoder()
    if own and encoder.name not in encoders.names():
        raise HarnessError(f"run {run.pretrain_id} is {run.facts['method']}, which has no network to export")
    file, state, reason = None, None, ""
    try:
        file, state = _for_torchvision(run, encoder, data_dir)
    except HarnessError as error:
        if torchvision:
            raise
        reason = str(error)
    weights_sha256 = _write(run, encoder, out, file, state)
    return ExportReport(out, weights_sha256, file, reason)


def load(folder: str | Path) -> Encoder:
    """The encoder that `export` wrote into `folder`, on the CPU in eval mode. Raises HarnessError if damaged."""
    found = checkpoint.load_encoder(Path(folder))
    if found is None:
        raise HarnessError(f"{shown(folder)} holds no exported encoder (encoder.json is missing)")
    tensors, facts = found
    info: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in facts["data"].items()}
    encoder = encoders.build(encoders.EncoderConfig(**facts["encoder"]), DatasetInfo(**info))
    encoder.load_state_dict(tensors)
    return encoder.eval()


def _write(
    run: runs.Run, encoder: Encoder, out: Path, file: TorchvisionFile | None, state: dict[str, Tensor] | None
) -> str:
    """Put the files into `out`, encoder.json last; returns weights_sha256."""
    named = run.config.encoder if run.config.encoder.name == encoder.name else encoders.EncoderConfig(name=encoder.name)
    facts: dict[str, Any] = {
        "encoder": named.model_dump(), "readouts": list(encoder.readouts),
        "map_shape": list(encoder.map_shape), "mean": encoder.mean.flatten().tolist(),
        "std": encoder.std.flatten().tolist(), "image_size": list(run.info.image_size), "channels": run.info.channels,
        "input": INPUT, "data": asdict(run.info), "pretrain_id": run.pretrain_id, "method": run.facts["method"],
        "how_to_load": [
            "from harness.export import load",
            'encoder = load("THIS FOLDER")',
            "features = encoder.pool(encoder(images))",
        ],
    }  # fmt: skip
    try:
        if file is not None:
            durable.write(out / file.name, lambda temporary: torch.save(state, temporary))
            name = run.config.encoder.name
            facts["torchvision"] = {
                **asdict(file), "sha256": durable.sha256_file(out / file.name), "classes": list(run.info.classes or ()),
                "how_to_load": [
                    f"model = torchvision.models.{name}(num_classes={run.info.num_classes}).eval()",
                    f'model.load_state_dict(torch.load("{file.name}", weights_only=True))',
                    "logits = model((images / 255 - mean) / std)  # images uint8; mean, std (C, 1, 1) as above",
                ],
            }  # fmt: skip
        return checkpoint.save_encoder(out, encoder.state_dict(), facts)
    except OSError as error:
        raise HarnessError(f"cannot write into {shown(out)}: {error.strerror or error}") from error


# --------------------------------------------------------------------------------------------------- torchvision


def _for_torchvision(
    run: runs.Run, encoder: Encoder, data_dir: Path | None
) -> tuple[TorchvisionFile, dict[str, Tensor]]:
    """The state dict with the probe as its `fc`. Raises HarnessError with the reason why there is none."""
    if encoder.name not in TORCHVISION or run.info.channels != 3:
        raise HarnessError(
            f"encoder {encoder.name} on {run.info.channels} channels is not a network of torchvision's "
            f"({' and '.join(TORCHVISION)} on 3 channels are)"
        )
    rows, strength = _probe_rows(run)
    row, data = rows[0], arms.open_dataset(run.facts["dataset"], data_dir, run.config.data.image_size, offline=True)
    train = data.split("train")
    test = data.split("test") if any(r.split == "test" for r in rows) else None
    _refuse_other_data(run, rows, train, test)
    budget = _budget(row, run.info.num_classes, train, data.folds)
    device = home_device(run)
    encoder = encoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with computing_in(run.config.precision, device):
        features = extract(encoder, train.images, torch.from_numpy(budget.indices), device)["gap"]
    assert train.labels is not None
    probe = fit_path(features, train.labels[budget.indices], run.info.num_classes, [strength])[0]
    state = fold(encoder.cpu(), probe)
    equal = None if test is None else _refuse_other_predictions(run, row, state, encoder, test, device)
    file = TorchvisionFile(
        f"torchvision_{encoder.name}.pt", row.labels or "", row.label_seed or 0, row.fold, strength, equal,
        None if test is None else len(test),
    )  # fmt: skip
    return file, state


def fold(encoder: Encoder, probe: LinearModel) -> dict[str, Tensor]:
    """A torchvision ResNet's state dict: the encoder's own tensors, and the probe on raw features as `fc`, float32.

    ((h - m) / s) W + b = h (W / s) + (b - (m / s) W), worked out in float64.
    """
    weight = probe.weight / probe.standardise.scale[:, None]
    state = {name: t.contiguous().clone() for name, t in encoder.state_dict().items() if name not in ("mean", "std")}
    state["fc.weight"] = weight.T.float().contiguous()
    state["fc.bias"] = (probe.bias - probe.standardise.mean @ weight).float()
    return state


def _probe_rows(run: runs.Run) -> tuple[list[Row], float]:
    """The `gap` rows of the linear probe that was evaluated last (of several folds: the first), and its strength."""
    found = []
    for path in sorted((records.runs_folder(run.workspace) / run.pretrain_id).glob("*.json")):
        rows = [row for row in records.read(path) or []
                if (row.evaluator, row.readout) == ("linear_probe", "gap") and not row.transferred]  # fmt: skip
        chosen = (durable.read_sealed(path) or {}).get("chosen", {}).get("gap.strength")
        if rows and chosen is not None:
            found.append((rows, float(chosen)))
    if not found:
        raise HarnessError(
            f"run {run.pretrain_id} has no rows of the linear probe; make them with "
            f"`harness evaluate {run.pretrain_id} --eval linear_probe`"
        )
    last = max(found, key=lambda item: item[0][0].finished_at)[0][0]
    same = [f for f in found if (f[0][0].labels, f[0][0].label_seed) == (last.labels, last.label_seed)]
    return min(same, key=lambda item: item[0][0].fold or 0)


def _refuse_other_data(run: runs.Run, rows: list[Row], train: Split, test: Split | None) -> None:
    """Raise HarnessError unless the splits are those that the rows speak of."""
    digests = {**run.facts["identity"]["data"], "train": digest_split(train)}
    row = rows[0]
    if test is not None:
        digests["test"] = digest_split(test)
        row = next(row for row in rows if row.split == "test")
    if fingerprint.digest(digests) != row.data_sha256:
        raise HarnessError(f"the images of {row.dataset} are not those that run {run.pretrain_id} was measured on")


def _budget(row: Row, num_classes: int, train: Split, folds: Any) -> LabelBudget:
    """The very label budget of a row."""
    assert train.labels is not None and row.labels is not None and row.label_seed is not None
    for budget in make_budgets(row.labels, train.labels.numpy(), num_classes, row.label_seed, folds):
        if budget.sha256 == row.label_subset_sha256:
            return budget
    raise HarnessError(f"labels {row.labels} (seed {row.label_seed}) are not the images the probe was fitted on")


@torch.inference_mode()
def _refuse_other_predictions(
    run: runs.Run, row: Row, state: dict[str, Tensor], encoder: Encoder, test: Split, device: torch.device
) -> int:
    """How many predictions of torchvision's own network equal the stored ones. Raises HarnessError if they differ."""
    from torchvision import models

    stored = records.rows_path(run.workspace, run.pretrain_id, row.eval_id).with_suffix(".predictions.npz")
    try:
        expected = np.load(stored, allow_pickle=False)["gap"]
    except Exception as error:  # numpy and zipfile meet damage with many kinds of errors
        raise HarnessError(f"the stored predictions of {row.eval_id} cannot be read ({type(error).__name__})") from None
    model: nn.Module = models.get_model(encoder.name, weights=None, num_classes=run.info.num_classes)
    model.load_state_dict(state, strict=True)
    model.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    chunks = test.images.split(EXTRACTION_BATCH)
    found = torch.cat([model(encoder.normalise(chunk).to(device)).argmax(1).cpu() for chunk in chunks]).numpy()
    equal = int((found == expected).sum()) if len(found) == len(expected) else 0
    if equal < (LEAST_AGREEMENT if run.config.precision == "fp32" else LEAST_AGREEMENT_BF16) * len(found):
        raise HarnessError(
            f"the exported network repeats only {equal:,} of {len(found):,} stored predictions of the probe; "
            f"run `harness evaluate {run.pretrain_id} --eval linear_probe` with this version first"
        )
    return equal
