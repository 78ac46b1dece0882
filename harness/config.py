"""RunConfig and its parts, every shared default, dotted overrides.

One spelling everywhere: the dotted key of a `--set`, of a recipe, of an MLflow parameter and of a search is the same.
Precedence: shared defaults < the method's own < recipes in order < flags < `--set`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, SerializeAsAny, TypeAdapter, ValidationError

from harness import registry
from harness.contracts import Choice, Config, HarnessError, Range, setting
from harness.encoders import EncoderConfig
from harness.optim import OptimConfig, ScheduleConfig

COMMAND_KEYS = ("method", "dataset", "labels")  # words of `harness run` that a recipe may say as well


class DataConfig(Config):
    """`data.*`: what is pretrained on."""

    pretrain_split: str | None = setting(None, "splits joined by +; none: the data set's own choice")
    num_pretrain_images: int | None = setting(
        None, "use this many of them, drawn by hash(seed, index); none: all", ge=2
    )
    image_size: int | None = setting(None, "side in pixels, for data sets of free size; none: their own", ge=8, le=1024)


class RunConfig(Config):
    """Everything that one arm of a run is made of; resolved, so nothing is left to a default."""

    method_name: str
    dataset_name: str
    epochs: int = setting(50, "passes over the pretraining images", ge=1)
    batch_size: int = setting(128, "images per step", ge=2, search=Choice((64, 128, 256)))
    seed: int = setting(
        0, "fixes initialisation, order, views and, unless --label-seed says otherwise, the labels", ge=0, le=2**62
    )
    precision: Literal["auto", "fp32", "bf16"] = setting("auto", "auto: bf16 autocast where the device computes in it")
    num_threads: int | None = setting(
        None, "CPU threads of a step; none: one for small nets, else as many as torch finds", ge=1, le=4096
    )
    compile: Literal["auto", "off", "graph", "compile", "compile+graph"] = setting(
        "auto", "auto: on CUDA a captured step; elsewhere off"
    )
    accumulate: int = setting(1, "parts a batch is taken in, gradients averaged; negatives stay within a part", ge=1)
    activation_checkpointing: bool = setting(
        False,
        "keep the encoder's activations at stage borders only and compute the rest twice",
        source="Chen et al., 2016",
    )
    stack_seeds: Literal["auto", "on", "off"] = setting(
        "auto", "several seeds in one command: train them together; auto: where that was measured to be faster"
    )
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    encoder: EncoderConfig
    method: SerializeAsAny[Config] = Config()
    eval: dict[str, SerializeAsAny[Config]] = Field(default_factory=dict)


@dataclass
class Layers:
    """Settings from one `run` command, weakest first; keys are dotted, values as typed."""

    recipes: list[Recipe] = field(default_factory=list)
    flags: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A TOML file: `[run]` settings for every method and `[method.<name>]` for one."""

    name: str
    run: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables -> dotted keys; `encoder = "x"` is short for `encoder.name = "x"`."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out.update(flatten(value, f"{dotted}."))
        else:
            out["encoder.name" if dotted == "encoder" else dotted] = value
    return out


def recipe_names() -> tuple[str, ...]:
    """The shipped recipes."""
    return shipped_names("harness.recipes")


def shipped_names(package: str) -> tuple[str, ...]:
    """The TOML files that lie in a package, without their ending."""
    return tuple(sorted(f.name[:-5] for f in files(package).iterdir() if f.name.endswith(".toml")))


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or a file by its path (it ends in .toml). Raises HarnessError for anything else."""
    document = load_document("recipe", name, "harness.recipes")
    unknown = set(document) - {"run", "method"}
    if unknown:
        raise HarnessError(f"recipe '{name}': unknown table [{sorted(unknown)[0]}]; known: [run], [method.<name>]")
    return make_recipe("recipe", name, document)


def load_document(kind: str, name: str, package: str) -> dict[str, Any]:
    """The TOML document `name` of a package of shipped files, or of a path that ends in .toml."""
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise HarnessError(f"{kind} file '{name}' does not exist")
        text = path.read_text(encoding="utf-8", errors="replace")
    elif name in (known := shipped_names(package)):
        text = files(package).joinpath(f"{name}.toml").read_text(encoding="utf-8")
    else:
        raise HarnessError(f"unknown {kind} '{name}'; {registry.near(name, known)} (or a path ending in .toml)")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise HarnessError(f"{kind} '{name}' is not valid TOML: {error}") from None


def make_recipe(kind: str, name: str, document: Mapping[str, Any]) -> Recipe:
    """The `[run]` and `[method.<name>]` tables of a document."""
    methods = document.get("method", {})
    if not isinstance(methods, dict) or not all(isinstance(table, dict) for table in methods.values()):
        raise HarnessError(f"{kind} '{name}': settings of a method belong under [method.<name>]")
    for method in methods:
        if method not in registry.names("method"):
            raise HarnessError(f"{kind} '{name}': [method.{method}]: {registry.near(method, registry.names('method'))}")
    run = flatten(document.get("run", {}))
    for key in COMMAND_KEYS:
        if not isinstance(run.get(key, ""), str):
            raise HarnessError(f"{kind} '{name}': {key} must be text, not {run[key]!r}")
    return Recipe(name, run, {m: flatten(t) for m, t in methods.items()})


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """`key=value` words -> dotted keys; values are read as TOML where they can be, else as text; `none` is None."""
    out: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise HarnessError(f"--set takes key=value, not '{pair}'")
        out[key.strip()] = parse_value(text.strip())
    return out


def parse_value(text: str) -> Any:
    """One value as typed on a command line."""
    if text.lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _methods_of(layers: Layers, name: str) -> dict[str, Any]:
    """All `method.*` settings addressed to method `name`, weakest first."""
    merged: dict[str, Any] = {}
    for recipe in layers.recipes:
        merged.update({f"method.{key}": value for key, value in recipe.methods.get(name, {}).items()})
    return merged


def resolve(
    method: str,
    dataset: str,
    layers: Layers,
    *,
    default_encoder: str,
    method_settings_of: str | None = None,
    evaluators: Iterable[str] = (),
) -> RunConfig:
    """The complete configuration of one arm. Raises HarnessError naming the key, the value and what is allowed.

    method_settings_of: the method that `--set method.*` is meant for; another arm ignores those, except the null
        control, which shares its method's settings.
    """
    plugin = registry.load_method(method)
    addressed = method_settings_of in (None, method) or (
        registry.load_method(str(method_settings_of)).null_control == method
    )
    merged: dict[str, Any] = {"encoder.name": default_encoder}
    merged.update(plugin.defaults)
    for recipe in layers.recipes:
        merged.update({key: value for key, value in recipe.run.items() if key not in COMMAND_KEYS})
    owner = str(method_settings_of or method) if addressed else method
    merged.update(_methods_of(layers, owner))
    for source in (layers.flags, layers.overrides):
        merged.update({k: v for k, v in source.items() if addressed or not k.startswith("method.")})
    if addressed and owner != method:  # what makes the null control null is not up for sharing
        own = {f"method.{k}" for k, v in plugin.Config() if v != getattr(registry.load_method(owner).Config(), k)}
        merged = {k: v for k, v in merged.items() if k not in own}
    return build(method, dataset, merged, evaluators)


def build(method: str, dataset: str, merged: Mapping[str, Any], evaluators: Iterable[str]) -> RunConfig:
    """Validate dotted settings against the fields' types."""
    plugin = registry.load_method(method)
    evaluator_configs = {name: registry.load_evaluator(name).Config for name in evaluators}
    models: dict[str, type[Config]] = {
        "data": DataConfig,
        "optim": OptimConfig,
        "schedule": ScheduleConfig,
        "encoder": EncoderConfig,
        "method": plugin.Config,
        **{f"eval.{name}": model for name, model in _all_evaluator_configs().items()},
    }
    tables: dict[str, dict[str, Any]] = {prefix: {} for prefix in models}
    top: dict[str, Any] = {}
    top_fields = [
        k for k, f in RunConfig.model_fields.items() if not _is_table(f.annotation) and not k.endswith("_name")
    ]
    known = top_fields + [f"{prefix}.{path}" for prefix, model in models.items() for path in _paths(model)]
    for key, value in merged.items():
        if key not in known:
            where = f" of method '{method}'" if key.startswith("method.") else ""
            raise HarnessError(f"unknown setting '{key}'{where}; {registry.near(key, known)}")
        prefix = next((p for p in models if key.startswith(f"{p}.")), None)
        if prefix is None:
            top[key] = value
            continue
        *folders, name = key.removeprefix(f"{prefix}.").split(".")
        table = tables[prefix]
        for folder in folders:
            table = table.setdefault(folder, {})
        table[name] = value
    parts = {prefix: _validated(models[prefix], table, prefix) for prefix, table in tables.items()}
    evaluations = {name: parts[f"eval.{name}"] for name in evaluator_configs}
    return _validated(
        RunConfig,
        {"method_name": method, "dataset_name": dataset, **top, "eval": evaluations}
        | {name: parts[name] for name in ("data", "optim", "schedule", "encoder", "method")},
        "",
    )


def _paths(model: type[BaseModel]) -> list[str]:
    """Dotted paths of every setting of a model, nested ones included."""
    out = []
    for name, info in model.model_fields.items():
        inner = info.annotation
        nested = isinstance(inner, type) and issubclass(inner, BaseModel)
        out += [f"{name}.{path}" for path in _paths(inner)] if nested else [name]  # type: ignore[arg-type]
    return out


def _is_table(annotation: Any) -> bool:
    return (
        annotation is dict
        or getattr(annotation, "__origin__", None) is dict
        or (isinstance(annotation, type) and issubclass(annotation, BaseModel))
    )


def _all_evaluator_configs() -> dict[str, type[Config]]:
    return {name: registry.load_evaluator(name).Config for name in registry.names("evaluator")}


def _validated(model: type[Any], values: Mapping[str, Any], prefix: str) -> Any:
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        inside = ".".join(str(part) for part in first["loc"] if part not in ("str", "int", "float"))
        name = ".".join(part for part in (prefix, inside) if part)
        raise HarnessError(f"setting '{name}': {first['msg'].lower()}, not {first['input']!r}") from None


def dotted(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Every setting of a config under its dotted key, as plain values."""
    out: dict[str, Any] = {}
    for name, value in config:
        key = f"{prefix}{name}"
        if isinstance(value, BaseModel):
            out.update(dotted(value, f"{key}."))
        elif isinstance(value, dict):
            for inner, part in value.items():
                out.update(dotted(part, f"{key}.{inner}."))
        else:
            out[key] = value if not isinstance(value, tuple) else list(value)
    return out


def describe(model: type[BaseModel], prefix: str) -> list[dict[str, Any]]:
    """One record per setting: key, default, meaning, source, search range, type."""
    out = []
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            out += describe(info.annotation, f"{prefix}{name}.")
            continue
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        search = extra.get("search")
        spread = ""
        if isinstance(search, Range):
            spread = f"{search.low:g} .. {search.high:g}{' (log)' if search.log else ''}"
        elif isinstance(search, Choice):
            spread = " | ".join(str(v) for v in search.values)
        annotation: Any = info.annotation
        schema = TypeAdapter(annotation).json_schema()
        kinds = schema.get("enum") or [s.get("type", "?") for s in schema.get("anyOf", [schema])]
        out.append({"key": f"{prefix}{name}", "default": info.get_default(call_default_factory=True),
                    "type": " | ".join(str(k) for k in kinds), "meaning": info.description or "",
                    "search": spread, "source": str(extra.get("source", ""))})  # fmt: skip
    return out
