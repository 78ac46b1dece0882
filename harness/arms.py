"""What one command consists of: the data it opens and the arms it compares, all checked before any work is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from harness import __version__, durable, encoders, fingerprint, registry, stacked, weights
from harness.augment import hash_seeds, stream_key
from harness.batches import Batches, MixedBatches, num_labelled
from harness.budgets import make_budgets
from harness.config import DataConfig, Layers, RunConfig, build, dotted, resolve
from harness.contracts import DatasetInfo, Encoder, Evaluator, HarnessError, LabelBudget, Method, Split
from harness.evaluation import Material, describe_budget, sample_indices
from harness.images import digest_split
from harness.mapped import join, select
from harness.step import resolve_mode


@dataclass(frozen=True)
class Origin:
    """A finished pretraining that is measured on another data set: nothing of it is done again.

    dataset: the name of what it was pretrained on; info: the facts of that data as they were then
    pretrain_data: its splits, as rows of a transfer carry them (`mnist:train`)
    identity: as stored with its weights; verified: whether every file behind it was the published one
    default_encoder: of that data set: the network of arms that were asked for no other, also on the new data
    """

    dataset: str
    info: DatasetInfo
    pretrain_data: str
    pretrain_id: str
    identity: dict[str, Any]
    verified: bool
    default_encoder: str


@dataclass(frozen=True)
class Request:
    """One `run`, as asked for. `evaluators` None: the default ones that the data allows."""

    method: str
    dataset: str
    layers: Layers = field(default_factory=Layers)
    workspace: Path = Path()
    data_dir: Path | None = None
    labels: str = "all"
    label_seed: int | None = None
    evaluators: tuple[str, ...] | None = None
    device: str = "auto"
    deterministic: bool = False
    offline: bool = False
    control: bool = True
    tracking: str | None = None
    allow_test: bool = True
    weights: Path | None = None
    pinned: dict[str, Any] | None = None  # the resolved settings of a run that is evaluated again
    stacked: tuple[int, ...] | None = None  # seeds that are trained together, where that can be
    origin: Origin | None = None  # of the method's weights, where they were pretrained on another data set
    checkpoint_seconds: float = 10.0
    parent: str | None = None  # identity of the journal that the method's run stands below: a trial of a search


@dataclass(frozen=True)
class Arm:
    """One pretraining and what is measured on it.

    role: `method`, `null control`, `control` or `floor`; `trial` for a run of a search, which goes without the method's pictures
    labelled: for a supervised method, the positions in `train` it may see
    origin: where its weights are from, when that is another data set than it is measured on
    """

    method: str
    role: str
    config: RunConfig
    identity: dict[str, Any]
    pretrain_id: str
    evaluators: tuple[str, ...]
    budgets: tuple[LabelBudget, ...]
    labelled: torch.Tensor | None
    encoder: str
    steps: int
    batch_size: int
    origin: Origin | None = None

    @property
    def plugin(self) -> type[Method]:
        return registry.load_method(self.method)


@dataclass(frozen=True)
class Cell:
    """One evaluation of one arm: an evaluator and a label budget."""

    evaluator: str
    budget: LabelBudget | None
    eval_id: str


@dataclass
class Plan:
    """Everything resolved; nothing has been written yet."""

    request: Request
    device: torch.device
    material: Material
    budgets: tuple[LabelBudget, ...]
    arms: list[Arm]
    seed: int

    @property
    def dataset_name(self) -> str:
        """What everything is measured on, as rows carry it."""
        return shown_name(self.request.dataset)


def resolve_device(name: str) -> torch.device:
    """auto | cpu | cuda[:N] | mps -> a device that exists. Raises HarnessError otherwise."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise HarnessError(f"--device '{name}' is not a device; use auto, cpu, cuda, cuda:N or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise HarnessError(f"--device '{name}' is not supported; use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise HarnessError(f"--device {name}: torch finds no CUDA device here; use --device cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise HarnessError(f"--device {name}: there are only {torch.cuda.device_count()} CUDA devices, numbered from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise HarnessError("--device mps: torch finds no Apple GPU here; use --device cpu or auto")
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """auto -> bf16 autocast on devices that compute in it (CUDA from Ampere on, CPUs with AVX512-BF16 or AMX)."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, so they may be missing
    has = device.type == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return "bf16" if has else "fp32"


def data_root(data_dir: Path | None) -> Path:
    """`--data-dir`, else `HARNESS_DATA`, else `./data`."""
    return data_dir or Path(os.environ.get("HARNESS_DATA") or "data")


def open_dataset(spec: str, data_dir: Path | None, image_size: int | None, offline: bool) -> Any:
    """The data set behind `name` or `name:ARGUMENT`, unopened."""
    plugin, argument = registry.load_dataset(spec)
    return plugin(data_root(data_dir), image_size, argument)


def shown_name(spec: str) -> str:
    """A data set's name as rows carry it: of `folder:PATH` only the last part of the path."""
    name, colon, argument = spec.partition(":")
    return f"{name}:{Path(argument).resolve().name}" if colon else name


def _pretrain_images(dataset: Any, info: DatasetInfo, config: DataConfig, seed: int, material: dict[str, str]) -> Any:
    expression = config.pretrain_split or info.pretrain_split
    parts = []
    for name in expression.split("+"):
        if name == "test":
            raise HarnessError("data.pretrain_split: test images are never pretrained on")
        split: Split = dataset.split(name)
        material[name] = digest_split(split)
        parts.append(split.images)
    images = join(parts)
    wanted = config.num_pretrain_images
    if wanted is not None:
        if wanted > len(images):
            raise HarnessError(
                f"data.num_pretrain_images: {wanted:,} asked for, {expression} of {info.name} has {len(images):,}"
            )
        images = select(images, sample_indices(len(images), wanted, seed, "pretrain subset"))
    return images.contiguous(memory_format=torch.channels_last)


def own_encoder(method: str, config: RunConfig, info: DatasetInfo) -> Callable[[], Encoder] | None:
    """What makes the encoder that the method brings; None where the asked-for one is used: it brings none, or one of
    the same kind is asked for (another size)."""
    plugin = registry.load_method(method)
    own = plugin.own_encoder(info)
    if own is None or (own.name != config.encoder.name and encoders.same_kind(own.name, config.encoder.name)):
        return None
    return lambda: plugin.own_encoder(info) or own


def encoder_revision(method: str, config: RunConfig, info: DatasetInfo) -> int | None:
    """`harness.encoders.revision` of the network that the method trains or reads: the asked-for one or its own."""
    own = own_encoder(method, config, info)
    return encoders.revision(config.encoder.name if own is None else own().name)


def build_encoder(method: str, config: RunConfig, info: DatasetInfo) -> Encoder:
    """The arm's freshly initialised encoder: the same seed gives every method the same one."""
    own = own_encoder(method, config, info)
    torch.manual_seed(_init_seed(config.seed, "encoder"))
    encoder = own() if own else encoders.build(config.encoder, info)
    encoder.activation_checkpointing = config.activation_checkpointing
    return encoder


def build_method(method: str, config: RunConfig, info: DatasetInfo) -> Method:
    """The arm's method around its freshly initialised encoder. Raises HarnessError when they do not fit."""
    encoder = build_encoder(method, config, info)
    torch.manual_seed(_init_seed(config.seed, "heads"))
    return registry.load_method(method)(encoder, config.method, info)


def _init_seed(seed: int, part: str) -> int:
    return int(hash_seeds(seed, 0, torch.tensor([stream_key(part)]))[0]) & 0x7FFF_FFFF_FFFF_FFFF


def make_plan(request: Request, fetch: bool = False, beside: Plan | None = None) -> Plan:
    """Resolve, open (never the test split), build and check every arm. Raises HarnessError; writes nothing.

    fetch: download what is missing of the data set first, unless the request is offline
    beside: a plan of the same request for another seed, whose checked and opened data is shared
    """
    device = resolve_device(request.device)
    method = registry.load_method(request.method)
    plugin, _ = registry.load_dataset(request.dataset)
    if request.evaluators is not None and not request.evaluators:
        raise HarnessError(f"--eval names no evaluator; known: {', '.join(registry.names('evaluator'))}")
    evaluators = tuple(registry.load_evaluator(name).name for name in request.evaluators or registry.DEFAULT_EVALUATORS)
    _refuse_path_separators(request)
    # of an encoder from elsewhere the settings say what it was pretrained on; here those of the controls count
    here = request if request.origin is None else replace(request, pinned=None)
    default_encoder = plugin.default_encoder if request.origin is None else request.origin.default_encoder
    probe = _resolve(here, request.method, default_encoder, evaluators)
    if beside is not None:
        dataset, fetch = beside.material.dataset, False
    else:
        dataset = open_dataset(request.dataset, request.data_dir, probe.data.image_size, request.offline)
    if fetch and not request.offline and any(file.state == "missing" for file in dataset.verify()):
        dataset.fetch()
    # bytes only: a broken test file is better named now than after the training
    if request.allow_test and beside is None:
        for file in dataset.verify():
            if file.state == "broken":
                raise HarnessError(f"data set '{request.dataset}': {file.name} is broken: {file.detail}")
    info: DatasetInfo = dataset.info
    if beside is not None and probe.data.num_pretrain_images is None:
        material = beside.material
    else:
        digests: dict[str, str] = {}
        images = _pretrain_images(dataset, info, probe.data, probe.seed, digests)
        material = Material(dataset, info, images, request.allow_test, digest_split, digests,
                            count_overlap=plugin.takes_argument)  # fmt: skip
    if material.has_test and material.test_digest is None:
        material.test_digest = fingerprint.digest(
            [[p.parent.name, p.name, durable.sha256_file(p)] for p in dataset.test_files()]
        )
    budgets: tuple[LabelBudget, ...] = ()
    if material.has_labels:
        label_seed = probe.seed if request.label_seed is None else request.label_seed
        labels = material.split("train").labels
        assert labels is not None
        budgets = tuple(make_budgets(request.labels, labels.numpy(), info.num_classes, label_seed, dataset.folds))
    elif request.evaluators is None:
        evaluators = tuple(e for e in evaluators if not registry.load_evaluator(e).needs_labels)
    else:
        for name in evaluators:
            if registry.load_evaluator(name).needs_labels:
                raise HarnessError(
                    f"data set '{info.name}' has no labels, so --eval {name} cannot run; use --eval representation"
                )
    arms = list(_arms(request, method, info, device, evaluators, budgets, material, default_encoder))
    return Plan(request, device, material, budgets, arms, probe.seed)


def _refuse_path_separators(request: Request) -> None:
    for flag, name in (("--method", request.method), ("--dataset", request.dataset.partition(":")[0])):
        if "/" in name or "\\" in name or name.startswith("."):
            raise HarnessError(f"{flag} '{name}' contains a path separator; give a registered name")


def _resolve(request: Request, method: str, default_encoder: str, evaluators: Sequence[str]) -> RunConfig:
    if request.pinned is not None and method == request.method:
        evaluations = {k: v for k, v in request.layers.overrides.items() if k.startswith("eval.")}
        for recipe in request.layers.recipes:
            evaluations = {**{k: v for k, v in recipe.run.items() if k.startswith("eval.")}, **evaluations}
        dataset = shown_name(request.dataset) if request.origin is None else request.origin.dataset
        return build(method, dataset, {**request.pinned, **evaluations}, evaluators)
    return resolve(method, shown_name(request.dataset), request.layers, default_encoder=default_encoder,
                   method_settings_of=request.method, evaluators=evaluators)  # fmt: skip


def _arms(
    request: Request,
    method: type[Method],
    info: DatasetInfo,
    device: torch.device,
    evaluators: tuple[str, ...],
    budgets: tuple[LabelBudget, ...],
    material: Material,
    default_encoder: str,
) -> Iterator[Arm]:
    own = "method" if method.role in (None, "outside") else str(method.role)
    wanted: list[tuple[str, str]] = [(request.method, "trial" if request.parent else own)]
    if request.control:
        if method.null_control and request.origin is None:
            wanted.append((method.null_control, "null control"))
        wanted += [(name, "control") for name in registry.methods_with_role("control")]
        wanted += [(name, "floor") for name in registry.methods_with_role("floor")]
    done: set[str] = set()
    for name, role in wanted:
        plugin = registry.load_method(name)
        if name in done or (role in ("control", "floor") and plugin.supervised and not budgets):
            continue
        done.add(name)
        origin = request.origin if name == request.method else None
        if plugin.supervised and not budgets and origin is None:
            raise HarnessError(f"method '{name}' learns from labels and data set '{info.name}' has none")
        mine = _evaluators_of(plugin, evaluators)
        if plugin.evaluators is not None and not budgets:
            mine = tuple(e for e in mine if not registry.load_evaluator(e).needs_labels)
        config = _resolve(request, name, default_encoder, tuple(dict.fromkeys((*evaluators, *mine))))
        checked = build_method(name, config, info if origin is None else origin.info)  # refuses here what does not fit
        config = _as_built(config, checked.encoder, _asked_encoder(request, name))
        mine = tuple(e for e in mine if _can_run(registry.load_evaluator(e), checked.encoder))
        for evaluator in mine:
            registry.load_evaluator(evaluator)(config.eval[evaluator]).check(checked.encoder)
        if origin is not None:
            encoder = checked.encoder.name
            yield Arm(
                name, role, config, origin.identity, origin.pretrain_id, mine, budgets, None, encoder, 0, 0, origin
            )
            continue
        if plugin.role == "outside" and request.weights is not None:
            weights.adopt(checked.encoder, weights.read_weights(request.weights), request.weights)
        for group in [budgets] if not plugin.supervised else [(b,) for b in budgets]:
            arm = _arm(name, role, config, checked.encoder, info, device, request, material, mine, group)
            together = request.stacked and plugin.trains and stacked.obstacle(checked, config) is None
            yield in_group(arm, request.stacked) if together else arm


def _asked_encoder(request: Request, method: str) -> str | None:
    """The encoder named for this very method by a flag or --set; a recipe's is meant for whoever can use it."""
    if method != request.method or request.pinned is not None:
        return None
    asked: str | None = (request.layers.flags | request.layers.overrides).get("encoder.name")
    return asked


def _as_built(config: RunConfig, encoder: Encoder, asked: str | None) -> RunConfig:
    """The settings with the name of the network that is really trained. Raises HarnessError where that is not `asked`."""
    if encoder.name == config.encoder.name or encoder.name not in encoders.names():
        return config
    if asked is not None:
        kind = ", ".join(name for name in encoders.names() if encoders.same_kind(name, encoder.name)) or encoder.name
        raise HarnessError(
            f"--encoder {asked}: method '{config.method_name}' needs one of {kind}; name one of these, or leave it out"
        )
    return config.model_copy(update={"encoder": encoders.EncoderConfig(name=encoder.name)})


def in_group(arm: Arm, seeds: Sequence[int] | None) -> Arm:
    """The arm as one that is trained together with others, all of `seeds`; None: by itself. Its identity says so."""
    identity = {key: value for key, value in arm.identity.items() if key != "stacked"}
    if seeds is not None:
        identity["stacked"] = list(seeds)
    return replace(arm, identity=identity, pretrain_id=fingerprint.short_id(identity))


def _evaluators_of(method: type[Method], asked: tuple[str, ...]) -> tuple[str, ...]:
    """What an arm is measured by. One that names its own evaluators (a floor) takes of those asked for only what
    questions the same model: an evaluator built on one of its own, as `robustness` is on the linear probe."""
    if method.evaluators is None:
        return asked
    own = [registry.load_evaluator(name) for name in method.evaluators]
    more = [name for name in asked if any(issubclass(registry.load_evaluator(name), evaluator) for evaluator in own)]
    return tuple(dict.fromkeys((*method.evaluators, *more)))


def _can_run(evaluator: type[Evaluator], encoder: Encoder) -> bool:
    return not evaluator.trains_encoder or any(p.requires_grad for p in encoder.parameters())


def _arm(
    name: str,
    role: str,
    config: RunConfig,
    encoder: Encoder,
    info: DatasetInfo,
    device: torch.device,
    request: Request,
    material: Material,
    evaluators: tuple[str, ...],
    budgets: tuple[LabelBudget, ...],
) -> Arm:
    plugin = registry.load_method(name)
    labelled = None
    if plugin.supervised:
        # It sees the fit part only, so that its validation rows are honest (docs/decisions/004).
        budget = budgets[0]
        rows = budget.rounds[0][0] if len(budget.rounds) == 1 else range(len(budget.indices))
        labelled = torch.as_tensor(budget.indices[list(rows)])
    count = len(material.pretrain_images)
    if plugin.trains and config.batch_size > count:
        raise HarnessError(
            f"batch_size {config.batch_size} is larger than the {count:,} pretraining images; lower it with --set batch_size=N"
        )
    batch = config.batch_size
    if labelled is not None:  # a small budget makes small batches, or puts few labelled images in each
        shown = num_labelled(batch, len(labelled)) if plugin.sees_unlabelled else min(batch, len(labelled))
        batch = batch if plugin.sees_unlabelled else shown
        config = config.model_copy(update={"accumulate": min(config.accumulate, max(1, shown // 2))})
    if plugin.trains and batch // config.accumulate < 2 <= batch:
        raise HarnessError(
            f"accumulate {config.accumulate}: fewer than two images of a batch of {config.batch_size} are left in a part; "
            "lower it with --set accumulate=N"
        )
    steps = config.epochs * (count // config.batch_size) if plugin.trains else 0
    config = config.model_copy(update={
        "precision": resolve_precision(config.precision, device),
        "compile": _compile_mode(plugin, config.compile, device),
        "num_threads": config.num_threads or _threads(encoder, info, device),
        "data": config.data.model_copy(update={"pretrain_split": config.data.pretrain_split or info.pretrain_split}),
    })  # fmt: skip
    identity = _identity(plugin, name, config, info, device, request, material, labelled)
    return Arm(
        name,
        role,
        config,
        identity,
        fingerprint.short_id(identity),
        evaluators,
        budgets,
        labelled,
        encoder.name,
        steps,
        batch,
    )


def training_batches(arm: Arm, material: Material, device: torch.device) -> Batches:
    """What the arm is trained on: the pretraining images, for a supervised method the labelled ones, or both."""
    images = material.placed_images(device)
    size, seed = arm.batch_size, arm.config.seed
    if arm.labelled is None:
        return Batches(images, None, batch_size=size, seed=seed, device=device)
    train = material.split("train")
    assert train.labels is not None
    labelled, labels = select(train.images, arm.labelled), train.labels[arm.labelled]
    if arm.plugin.sees_unlabelled:
        return MixedBatches(images, labelled, labels, batch_size=size, seed=seed, device=device)
    return Batches(labelled, labels, batch_size=size, seed=seed, device=device)


def _compile_mode(plugin: type[Method], name: str, device: torch.device) -> str:
    if "graph" in name and device.type != "cuda":
        raise HarnessError(f"--compile {name}: a step is captured on CUDA only, not on {device.type}; use auto or off")
    why_not = "" if plugin.graphable else plugin.why_not_graphable
    return resolve_mode(name, device, why_not)


def _threads(encoder: Encoder, info: DatasetInfo, device: torch.device) -> int:
    """CPU threads of an arm when none are asked for (docs/decisions/007)."""
    small = device.type == "cpu" and encoders.multiply_adds(encoder, info) < ONE_THREAD_BELOW
    return 1 if small else _DEFAULT_THREADS


ONE_THREAD_BELOW = 10_000_000  # multiply-adds per image
_DEFAULT_THREADS = torch.get_num_threads()  # read once, before a run changes it


def _identity(
    plugin: type[Method],
    name: str,
    config: RunConfig,
    info: DatasetInfo,
    device: torch.device,
    request: Request,
    material: Material,
    labelled: torch.Tensor | None,
) -> dict[str, Any]:
    """Every setting that can change the weights. What trains nothing does not depend on how it would be trained."""
    settings = dotted(config)
    shared: tuple[str, ...] = ("seed", "data.", "method.", "num_threads")
    own = own_encoder(name, config, info)
    if own is None:
        shared += ("encoder.",)
    if plugin.trains:
        shared += ("epochs", "batch_size", "precision", "compile", "accumulate", "activation_checkpointing")
        shared += ("optim.", "schedule.")
    expression = config.data.pretrain_split or info.pretrain_split
    opened = expression.split("+") + (["train"] if labelled is not None else [])
    revision = encoder_revision(name, config, info)
    return {
        "method": name,
        "settings": {k: v for k, v in settings.items() if k.startswith(shared) and k != "method_name"},
        "code": fingerprint.code_sha256(plugin),
        "data": {split: material.digests[split] for split in opened},
        "statistics": [list(info.mean), list(info.std)],
        "labelled": None if labelled is None else fingerprint.digest(labelled.tolist()),
        "device": device.type,
        "deterministic": request.deterministic and device.type == "cuda",
        "numbers_version": fingerprint.NUMBERS_VERSION,
        **({} if revision is None else {"encoder_revision": revision}),
        **({"cuda_revision": fingerprint.CUDA_REVISION} if device.type == "cuda" else {}),
    }


def pretext_id(pretrain_id: str) -> str:
    """The eval_id of what a pretraining says of itself: its pretext task, or that its loss was not finite."""
    return fingerprint.short_id({"pretext": pretrain_id})


def failure_id(pretrain_id: str, elsewhere: str | None = None) -> str:
    """The eval_id of the status row that an arm leaves which failed; it goes when the arm is finished after all.

    elsewhere: the data set, where the arm was to be measured on another one than it was pretrained on
    """
    return fingerprint.short_id({"failure": pretrain_id} | ({} if elsewhere is None else {"on": elsewhere}))


def cells(arm: Arm, plan: Plan) -> list[Cell]:
    """The evaluations of an arm, in order."""
    out = []
    for name in arm.evaluators:
        plugin = registry.load_evaluator(name)
        for budget in arm.budgets if plugin.needs_labels else (None,):
            out.append(Cell(name, budget, _eval_id(arm, plan, plugin, budget)))
    return out


def _eval_id(arm: Arm, plan: Plan, plugin: type[Evaluator], budget: LabelBudget | None) -> str:
    parts = {
        "pretrain_id": arm.pretrain_id,
        "evaluator": plugin.name,
        "settings": dotted(arm.config.eval[plugin.name]),
        "code": fingerprint.code_sha256(plugin),
        "train": plan.material.digests.get("train") if budget else None,
        "test": plan.material.test_digest,
        "precision": arm.config.precision,
        "compile": arm.config.compile if plugin.trains_encoder else None,
        "numbers_version": fingerprint.NUMBERS_VERSION,
        **describe_budget(budget),
    }
    if arm.origin is not None:
        parts["transfer"] = {name: digest for name, digest in plan.material.digests.items() if name != "test"}
    return fingerprint.short_id(parts)


def environment() -> dict[str, Any]:
    """Versions and machine facts that are logged beside a run; no host, user or path."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    out: dict[str, Any] = {
        "harness": __version__, "python": platform.python_version(), "system": platform.system(),
        "machine": platform.machine(), "cores": os.cpu_count(),
    }  # fmt: skip
    for name in ("torch", "torchvision", "numpy", "scikit-learn", "scipy", "pandas", "mlflow"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:  # mlflow-skinny, say, or a package that lies on the path uninstalled
            out[name] = None
    return out
