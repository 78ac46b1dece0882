"""Transfer: a finished encoder measured on another data set than it was pretrained on, beside that data set's controls.

Nothing is trained for it but the controls, which are made on the data it is measured on, with the settings, seed and
networks of the command that made the encoder (splits and sizes of the data are the other data set's own; of a limited
number of pretraining images there are at most as many as it has). The encoder keeps everything it learnt, its
mean and standard deviation of the pixels and its batch-norm statistics included. Its null control is not carried over:
that is another run, which can be transferred like this one.

An encoder is asked for images of the size and channels it was built for: a data set of free size (`folder:`) is resized
to it, any other is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import arms, fingerprint, records, registry, runs
from harness.arms import Origin, Request, encoder_revision, pretext_id
from harness.config import RunConfig
from harness.contracts import Dataset, DatasetInfo, HarnessError


def fitting(source: DatasetInfo, dataset: str, data_dir: Path | None, offline: bool) -> Dataset:
    """The data set `dataset`, in the image size of `source`. Raises HarnessError, with the numbers, if it cannot have it."""
    found: Dataset = arms.open_dataset(dataset, data_dir, None, offline)
    if found.info.image_size != source.image_size and registry.load_dataset(dataset)[0].takes_argument:
        found = arms.open_dataset(dataset, data_dir, source.image_size[0], offline)
    if (found.info.image_size, found.info.channels) != (source.image_size, source.channels):
        raise HarnessError(
            f"an encoder for {_shape(source)} ({source.name}) cannot be measured on {arms.shown_name(dataset)}, whose "
            f"images are {_shape(found.info)}; choose a data set with the same"
        )
    return found


def check(request: Request, datasets: Sequence[str], fetch: bool = True) -> None:
    """Refuse, before any work, data sets that an encoder pretrained by `request` could not be measured on.

    fetch: download what is missing of them first, unless the request is offline
    """
    if not datasets:
        return
    for spec in (request.dataset, *datasets) if fetch and not request.offline else ():
        missing = arms.open_dataset(spec, request.data_dir, None, False)
        if any(file.state == "missing" for file in missing.verify()):
            missing.fetch()
    image_size = request.layers.overrides.get("data.image_size", request.layers.flags.get("data.image_size"))
    source = arms.open_dataset(request.dataset, request.data_dir, image_size, request.offline).info
    for dataset in datasets:
        if dataset == request.dataset:
            raise HarnessError(f"--transfer {dataset}: that is what is pretrained on; name other data sets")
        fitting(source, dataset, request.data_dir, request.offline)


def _shape(info: DatasetInfo) -> str:
    return f"{info.image_size[0]} x {info.image_size[1]} pixels and {info.channels} channel{'s'[: info.channels != 1]}"


def request_elsewhere(run: runs.Run, dataset: str, overrides: dict[str, Any], **changes: Any) -> Request:
    """The request that measures a finished run on another data set. Raises HarnessError where that cannot be done."""
    plugin = registry.load_method(run.facts["method"])
    identity, name = run.facts["identity"], run.facts["config"]["dataset_name"]
    if run.facts["status"] != "FINISHED":
        raise HarnessError(
            f"run {run.pretrain_id} did not finish ({run.facts['status']}): there is nothing to transfer"
        )
    if (identity["code"], identity["numbers_version"], identity.get("encoder_revision")) != (
        fingerprint.code_sha256(plugin),
        fingerprint.NUMBERS_VERSION,
        encoder_revision(run.facts["method"], run.config, run.info),
    ):
        raise HarnessError(f"run {run.pretrain_id} was made by other code than there is now; run its command again")
    again = runs.request_again(run, overrides, **changes)
    other = fitting(run.info, dataset, again.data_dir, again.offline)
    origin = Origin(
        dataset=name, info=run.info, pretrain_data=f"{name}:{run.config.data.pretrain_split}", pretrain_id=run.pretrain_id,
        identity=identity, verified=_verified(run),
        default_encoder=registry.load_dataset(run.facts["dataset"])[0].default_encoder,
    )  # fmt: skip
    layers = again.layers
    for_data = {"data.image_size": other.image_size, "data.num_pretrain_images": _count(run.config, other.info)}
    recipes = [replace(recipe, run=_without_data(recipe.run)) for recipe in layers.recipes]
    flags, others = _without_data(layers.flags), _without_data(layers.overrides)
    layers = replace(layers, recipes=recipes, flags=flags | for_data, overrides=others)
    return replace(again, dataset=dataset, layers=layers, origin=origin, stacked=None)


def _count(config: RunConfig, info: DatasetInfo) -> int | None:
    """How many images the controls are prepared and trained on: as many as the run, where there are."""
    if config.data.num_pretrain_images is None:
        return None
    return min(config.data.num_pretrain_images, sum(info.counts[name] for name in info.pretrain_split.split("+")))


def _without_data(settings: Any) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if not key.startswith("data.")}


def _verified(run: runs.Run) -> bool:
    """Whether the run's own rows say that every file behind its pretraining was the published one."""
    rows = records.read(records.rows_path(run.workspace, run.pretrain_id, pretext_id(run.pretrain_id)))
    return bool(rows) and all(row.data_verified for row in rows or [])


__all__ = ["check", "fitting", "request_elsewhere"]
