"""Settings: precedence, types, near names; one dotted spelling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness import config
from harness.config import Layers, Recipe, dotted, load_recipe, parse_overrides, resolve
from harness.contracts import HarnessError


def resolved(layers: Layers, method: str = "sc", of: str | None = "sc") -> config.RunConfig:
    return resolve(
        method,
        "digits",
        layers,
        default_encoder="convnet_small",
        method_settings_of=of,
        evaluators=["knn", "fine_tune"],
    )


def test_precedence_shared_method_recipes_flags_overrides() -> None:
    one = Recipe("one", {"epochs": 3, "optim.lr": 0.5, "batch_size": 16}, {"sc": {"patch": 2}})
    two = Recipe("two", {"epochs": 4}, {"sc": {"temperature": 0.5}, "other": {"x": 1}})
    c = resolved(Layers([one, two], {"epochs": 5, "seed": 2}, {"epochs": 6, "method.patch": 3}))
    assert (c.epochs, c.optim.lr, c.batch_size, c.seed) == (6, 0.5, 16, 2)
    assert dotted(c)["method.patch"] == 3
    assert dotted(c)["method.temperature"] == 0.5


def test_method_settings_reach_the_method_and_its_null_control_only() -> None:
    layers = Layers(overrides={"method.patch": 2, "optim.lr": 0.2})
    null = resolved(layers, "sc_null")
    assert dotted(null)["method.patch"] == 2
    assert dotted(null)["method.pairs"] == "shuffled"
    other = resolved(layers, "random_init")
    assert other.optim.lr == 0.2
    assert "method.patch" not in dotted(other)


def test_the_null_control_stays_null() -> None:
    null = resolved(Layers(overrides={"method.pairs": "own"}), "sc_null")
    assert dotted(null)["method.pairs"] == "shuffled"


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("optim.lrr=1", "unknown setting 'optim.lrr'; did you mean optim.lr"),
        ("method.tempature=1", "unknown setting 'method.tempature' of method 'sc'; did you mean method.temperature"),
        ("epochs=-3", "setting 'epochs': input should be greater than or equal to 1, not -3"),
        ("epochs=many", "setting 'epochs'"),
        ("optim.lr=fast", "setting 'optim.lr'"),
        ("optim.lr=nan", "setting 'optim.lr'"),
        ("optim.name=sdg", "setting 'optim.name'"),
        ("method.patch=none", "setting 'method.patch'"),
        ("eval.knn.kk=3", "unknown setting 'eval.knn.kk'"),
        ("batch_size=1", "setting 'batch_size'"),
    ],
)
def test_bad_settings_are_one_line(pair: str, words: str) -> None:
    with pytest.raises(HarnessError) as error:
        resolved(Layers(overrides=parse_overrides([pair])))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("true", True),
        ("none", None),
        ("cosine", "cosine"),
        ("[0.5, 0.9]", [0.5, 0.9]),
        ('"3"', "3"),
    ],
)
def test_values_are_read_as_toml_else_as_text(text: str, value: Any) -> None:
    assert config.parse_value(text) == value


def test_set_without_equals() -> None:
    with pytest.raises(HarnessError, match="--set takes key=value"):
        parse_overrides(["epochs"])


@pytest.mark.parametrize("name", config.recipe_names())
def test_shipped_recipes_resolve_for_every_method_they_name(name: str) -> None:
    recipe = load_recipe(name)
    for method in recipe.methods or ["sc"]:
        c = resolved(Layers([recipe]), method, method)
        for key, value in recipe.run.items():
            assert dotted(c)[key] == value
        for key, value in recipe.methods.get(method, {}).items():
            assert dotted(c)[f"method.{key}"] == value


def test_recipe_errors(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="unknown recipe 'quik'; did you mean quick"):
        load_recipe("quik")
    with pytest.raises(HarnessError, match="does not exist"):
        load_recipe(str(tmp_path / "none.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\n")
    with pytest.raises(HarnessError, match="is not valid TOML"):
        load_recipe(str(broken))
    broken.write_text("[runn]\nepochs = 3\n")
    with pytest.raises(HarnessError, match=r"unknown table \[runn\]"):
        load_recipe(str(broken))
    broken.write_text("[method]\nsc = 3\n")
    with pytest.raises(HarnessError, match="belong under"):
        load_recipe(str(broken))


def test_dotted_settings_build_the_same_config() -> None:
    c = resolved(Layers(overrides={"schedule.milestones": [0.5], "encoder.norm": "group"}))
    settings = {k: v for k, v in dotted(c).items() if not k.startswith(("method_name", "dataset_name"))}
    assert config.build("sc", "digits", settings, ["knn", "fine_tune"]) == c
