"""What `harness tune` varies: a range for each of some dotted settings.

Ranges stand beside the settings that they are for (`setting(..., search=...)`): those of training (`optim.lr`,
`optim.weight_decay`, `schedule.name`, `batch_size`) for every method that trains, a method's own beside them. A file
overrides them or adds others; a setting given by a flag or `--set` is fixed and not varied:

    declared = true                                       # false: only what this file names
    [space]                                               # of every method
    optim.lr = { low = 0.01, high = 0.3, log = true }
    schedule.name = ["step", "cosine"]
    [method.sc]                                           # of one
    patch = [2, 3]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo
from scipy.stats import qmc

from harness import fingerprint, registry
from harness.config import DataConfig, RunConfig, load_document
from harness.contracts import Choice, HarnessError, Method, Range, Search
from harness.encoders import EncoderConfig
from harness.optim import OptimConfig, ScheduleConfig

# Rates of AdamW are a hundredth of SGD's: the range beside `optim.lr` is SGD's.
ADAMW_RATES = Range(1e-5, 1e-2, log=True)
# What is left to choose of fine-tuning: its learning rate is chosen inside the evaluation, on the same validation images.
FINE_TUNING: dict[str, Search] = {
    "eval.fine_tune.weight_decay": Range(1e-5, 1e-2, log=True),
    "eval.fine_tune.batch_size": Choice((32, 64, 128)),
    "eval.fine_tune.head_first_steps": Choice((0, 100)),
}
NO_HYPERPARAMETERS = ("seed", "num_threads", "compile", "stack_seeds", "precision")


@dataclass(frozen=True)
class Dimension:
    """One varied setting. whole: a range of integers."""

    key: str
    search: Search
    whole: bool = False

    def at(self, share: float) -> Any:
        """The value at `share`, in [0, 1), of the range."""
        if isinstance(self.search, Choice):
            return self.search.values[int(share * len(self.search.values))]
        low, high = self.search.low, self.search.high
        if self.whole:
            low, high = low - 0.5, high + 0.5
        value = (
            math.exp(math.log(low) + share * math.log(high / low)) if self.search.log else low + share * (high - low)
        )
        if self.whole:
            return int(min(max(round(value), self.search.low), self.search.high))
        return min(max(value, self.search.low), self.search.high)

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that must all be allowed for every value to be."""
        if isinstance(self.search, Choice):
            return self.search.values
        return tuple(int(v) if self.whole else v for v in (self.search.low, self.search.high))

    def facts(self) -> dict[str, Any]:
        """As plain values."""
        if isinstance(self.search, Choice):
            return {"values": list(self.search.values)}
        return {"low": self.search.low, "high": self.search.high, "log": self.search.log, "whole": self.whole}


Space = tuple[Dimension, ...]


@dataclass(frozen=True)
class SpaceFile:
    """Ranges of a TOML file. methods: of one method each, keys without `method.`"""

    declared: bool = True
    every: Mapping[str, Search] = field(default_factory=dict)
    methods: Mapping[str, Mapping[str, Search]] = field(default_factory=dict)


def load_space(name: str) -> SpaceFile:
    """Read a `--space` file. Raises HarnessError naming the file, the key and what is allowed."""
    if not name.endswith(".toml"):
        raise HarnessError(f"--space '{name}' must be a TOML file (a path that ends in .toml)")
    document = load_document("search space", name, "harness.recipes")
    if unknown := set(document) - {"declared", "space", "method"}:
        raise HarnessError(f"--space '{name}': unknown {sorted(unknown)[0]}; known: declared, [space], [method.<name>]")
    declared, every, methods = document.get("declared", True), document.get("space", {}), document.get("method", {})
    if not isinstance(declared, bool) or not isinstance(every, dict) or not isinstance(methods, dict):
        raise HarnessError(f"--space '{name}': declared is true or false, [space] and [method.<name>] are tables")
    for method in methods:
        registry.load_method(method)
    return SpaceFile(declared, dict(_ranges(name, every)), {m: dict(_ranges(name, t)) for m, t in methods.items()})


def _ranges(file: str, table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Search]]:
    for key, value in table.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and not {"low", "high", "log"} & set(value):
            yield from _ranges(file, value, f"{dotted}.")
        else:
            yield dotted, _search(f"--space '{file}': {dotted}", value)


def _search(where: str, value: Any) -> Search:
    if isinstance(value, list) and value and all(isinstance(v, (bool, int, float, str)) for v in value):
        return Choice(tuple(dict.fromkeys(None if v == "none" else v for v in value)))
    if isinstance(value, Mapping) and set(value) <= {"low", "high", "log"}:
        low, high, log = value.get("low"), value.get("high"), value.get("log", False)
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in (low, high))
        if numbers and isinstance(log, bool):
            if not low < high or (log and low <= 0):  # type: ignore[operator]
                above = ", and above 0 in the logarithm" if log else ""
                raise HarnessError(f"{where} runs from {low} to {high}: low must be below high{above}")  # fmt: skip
            return Range(low, high, log)  # type: ignore[arg-type]
    raise HarnessError(
        f"{where} must be {{ low = A, high = B, log = true or false }} or a list of values, not {value!r}"
    )


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _fields(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def _settings(plugin: type[Method]) -> dict[str, FieldInfo]:
    """Every setting that a run of this method has, by its dotted key."""
    parts: list[tuple[type[BaseModel], str]] = [
        (OptimConfig, "optim."), (ScheduleConfig, "schedule."), (EncoderConfig, "encoder."), (DataConfig, "data."),
        (plugin.Config, "method."),
        *((registry.load_evaluator(name).Config, f"eval.{name}.") for name in registry.names("evaluator")),
    ]  # fmt: skip
    top = {k: f for k, f in RunConfig.model_fields.items() if not k.endswith("_name") and k not in ("method", "eval")}
    return {k: f for k, f in top.items() if f"{k}." not in [prefix for _, prefix in parts]} | {
        key: info for model, prefix in parts for key, info in _fields(model, prefix)
    }


def make_space(
    method: str, config: RunConfig, file: SpaceFile, fixed: Iterable[str] = (), fine_tuned: bool = False
) -> Space:
    """The dimensions of a method's search, in the order of their keys.

    config: its settings by default; fixed: keys that were set by hand; fine_tuned: whether fine-tuning is what is
    measured. Raises HarnessError for a key that is no setting or cannot be varied, and when nothing is left to vary.
    """
    plugin, fixed = registry.load_method(method), set(fixed)
    settings = _settings(plugin)
    found: dict[str, Search] = {}
    if file.declared:
        for key, info in settings.items():
            extra: Any = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
            search = extra.get("search")
            varied = key.startswith("method.") or (plugin.trains and not key.startswith("eval."))
            if isinstance(search, (Range, Choice)) and varied:
                found[key] = search
        if "optim.lr" in found and config.optim.name == "adamw":
            found["optim.lr"] = ADAMW_RATES
        found |= FINE_TUNING if fine_tuned else {}
    found = {key: search for key, search in found.items() if key not in fixed}
    named = dict(file.every) | {f"method.{key}": search for key, search in file.methods.get(method, {}).items()}
    for key, search in named.items():
        if key in fixed:
            raise HarnessError(f"{key} has a range in --space and is set as well; leave one out")
        if key in NO_HYPERPARAMETERS:
            raise HarnessError(f"--space: {key} is no hyperparameter: a search cannot vary it")
        if key not in settings:
            raise HarnessError(f"--space: unknown setting '{key}' of method '{method}'; {registry.near(key, settings)}")
        found[key] = search
    if not found:
        raise HarnessError(f"method '{method}' has nothing to vary: name ranges in a --space file")
    return tuple(Dimension(key, found[key], _is_whole(settings[key])) for key in sorted(found))


def _is_whole(info: FieldInfo) -> bool:
    annotation: Any = info.annotation
    schema = TypeAdapter(annotation).json_schema()
    kinds = {part.get("type") for part in schema.get("anyOf", [schema])}
    return "integer" in kinds and "number" not in kinds


def digest(space: Space) -> str:
    """Of everything that a search may try."""
    return fingerprint.digest([[one.key, one.facts()] for one in space])


class PairedDraws:
    """Quasi-random draws that every method of a comparison shares: a Sobol sequence (unscrambled, so that its first
    coordinates do not depend on how many there are), each key moved round by a random share of its own (Cranley &
    Patterson, 1976). The same key and trial number have the same share whatever else is varied.

    keys: of all methods that are compared; seed: of the study
    """

    def __init__(self, keys: Iterable[str], seed: int) -> None:
        self._places = {key: place for place, key in enumerate(sorted(set(keys)))}
        self._seed = seed

    def share(self, key: str, number: int) -> float:
        """In [0, 1): where in the range of `key` trial `number` looks."""
        sequence = qmc.Sobol(len(self._places), scramble=False)
        point = (sequence.fast_forward(number) if number else sequence).random(1)[0]
        turn = int(fingerprint.digest([self._seed, key])[:12], 16) / 16**12
        return float((point[self._places[key]] + turn) % 1.0)


__all__ = ["Dimension", "PairedDraws", "Space", "SpaceFile", "digest", "load_space", "make_space"]
