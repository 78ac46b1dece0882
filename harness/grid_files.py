"""Grid files: a TOML file that says what `harness bench` is to compare.

    [grid]                      # every key but methods and datasets may be left out
    methods = ["sc", "simclr"]
    datasets = ["mnist"]
    encoders = ["convnet_small"]
    seeds = "0-4"               # or [0, 1, 2]
    labels = ["10pc", "all"]
    eval = ["linear_probe"]
    budget = "epochs=50"        # see harness/compute_budgets.py
    recipe = ["quick"]

    [run]                       # settings for every method, as in a recipe
    [method.sc]                 # settings of one, as in a recipe
    [axes]                      # settings that take several values, every combination of them
    "data.num_pretrain_images" = [500, 1000, "none"]

TOML has no word for nothing: "none" is written where `--set` would have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness import registry
from harness.config import Recipe, flatten, load_document, load_recipe, make_recipe, shipped_names
from harness.contracts import HarnessError

PACKAGE = "harness.recipes.grids"
KEYS = ("methods", "datasets", "encoders", "seeds", "labels", "eval", "budget", "recipe")


def grid_names() -> tuple[str, ...]:
    """The shipped grids."""
    return shipped_names(PACKAGE)


def load_grid(name: str) -> dict[str, Any]:
    """A shipped grid by name, or a file by its path, as keyword arguments of harness.grid_setups.make_grid.

    Raises HarnessError naming the file, the key and what is allowed.
    """
    document = load_document("grid", name, PACKAGE)
    if unknown := set(document) - {"grid", "run", "method", "axes"}:
        raise HarnessError(
            f"grid '{name}': unknown table [{sorted(unknown)[0]}]; known: [grid], [run], [method.<name>], [axes]"
        )
    table = document.get("grid", {})
    if not isinstance(table, Mapping):
        raise HarnessError(f"grid '{name}': [grid] must be a table")
    for key in table:
        if key not in KEYS:
            raise HarnessError(f"grid '{name}': unknown key '{key}' in [grid]; {registry.near(key, KEYS)}")
    words = {
        key: _texts(name, key, table[key])
        for key in ("methods", "datasets", "encoders", "labels", "eval")
        if key in table
    }
    seeds = table.get("seeds", "0")
    if isinstance(seeds, list):
        seeds = ",".join(str(seed) for seed in seeds)
    recipes: list[Recipe] = [load_recipe(recipe) for recipe in _texts(name, "recipe", table.get("recipe", []))]
    if "run" in document or "method" in document:
        recipes.append(make_recipe("grid", name, document))
    return {
        "methods": words.get("methods", ()), "datasets": words.get("datasets", ()), "encoders": words.get("encoders", ()),
        "labels": words.get("labels", ("all",)), "evaluators": words.get("eval"), "seeds": str(seeds),
        "budget": table.get("budget"), "recipes": tuple(recipes), "axes": _axes(name, document.get("axes", {})),
    }  # fmt: skip


def _texts(name: str, key: str, value: Any) -> tuple[str, ...]:
    """A list of words; one word alone is a list of one."""
    words = [value] if isinstance(value, (str, int)) else value
    if not isinstance(words, list) or not all(isinstance(word, (str, int, float)) for word in words):
        raise HarnessError(f"grid '{name}': {key} must be a list of words, not {value!r}")
    return tuple(dict.fromkeys(str(word) for word in words))


def _axes(name: str, table: Any) -> dict[str, tuple[Any, ...]]:
    if not isinstance(table, Mapping):
        raise HarnessError(f"grid '{name}': [axes] must be a table of dotted settings and lists of values")
    axes = flatten(table)
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise HarnessError(f"grid '{name}': [axes] {key} must be a list of values, not {values!r}")
    return {key: tuple(None if value == "none" else value for value in values) for key, values in axes.items()}


__all__ = ["KEYS", "grid_names", "load_grid"]
