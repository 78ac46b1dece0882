"""Who may import whom (docs/decisions/001): kept true by reading every import."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALWAYS = {"numpy", "torch", "__future__"} | set(sys.stdlib_module_names)

# Modules of the core from the top down; each may import those of lower tiers and of its own.
TIERS: list[set[str]] = [
    {"cli"},
    {"verbs", "verbs.options", "verbs.report", "verbs.compare", "verbs.bench", "verbs.reproduce", "verbs.study", "verbs.tune"},
    {"search"},
    {"live_studies", "study_export"},
    {"search_workers", "search_files", "grid_console", "reproduction"},
    {"tuning"},
    {"trials"},
    {"report.page"},
    {"report.plots", "report.studies", "report.study_charts", "report.pictures", "report.rerun"},
    {"report.assembly", "report.selection", "report.comparison"},
    {"report.entries", "report.lines", "report.published"},
    {"report.measurements", "report.text"},
    {"report.boards", "report.charts", "report.typography"},
    {"report.summary", "report.warnings", "report", "console", "listing", "doctor", "clean", "export", "embed"},
    {"profiling"},
    {"bench"},
    {"costs"},
    {"engines.local"},
    {"engines"},
    {"grid"},
    {"grid_setups"},
    {"compute_budgets"},
    {"runner", "seeds"},
    {"studies", "study_slices", "run_figures", "mirror", "mirror_loop", "delivery", "tracking", "runs", "transfer"},
    {"arms"},
    {"evaluation", "provenance", "records", "weights", "stacked", "floor", "statistics"},
    {"grid_files", "search_space", "objectives"},
    {"pretrain", "config", "budgets", "journal", "figures", "feature_maps"},
    {"step"},
    {"batches", "checkpoint", "registry", "allocator", "declarations"},
    {"optim", "encoders", "conv_encoder", "outside_encoders", "vit", "heads", "patches", "receptive_field", "fingerprint",
     "augment", "image_operations", "views", "multi_crop", "durable", "worker_process", "images", "mapped", "read_ahead", "decoding", "formats", "download", "archives", "published"},
    {"contracts"},
    {"rows", "encoder_names"},
    {"errors"},
    {""},
]  # fmt: skip
PLUGINS = {
    "methods": {
        "contracts",
        "augment",
        "image_operations",
        "views",
        "multi_crop",
        "encoders",
        "vit",
        "heads",
        "patches",
        "receptive_field",
    },
    "datasets": {"contracts", "images", "mapped", "decoding", "formats", "download", "archives", "published"},
    "harness/evaluators": {
        "contracts",
        "encoders",
        "augment",
        "image_operations",
        "views",
        "batches",
        "mapped",
        "optim",
    },
}
PLUGIN_LIBRARIES = {
    "methods": {"sklearn", "skimage"},
    "datasets": {"torchvision", "PIL", "sklearn"},
    "harness/evaluators": {"sklearn", "scipy"},
}
# Exporting is folding this very probe into a torchvision network.
EXCEPTIONS = {"export.py": {"evaluators.linear_probe"}}
# A method may build on the one it is a variant of, an evaluator on the one whose model it questions.
VARIANTS = {
    "methods/sc_null.py": {"methods.sc"},
    "methods/sc_semi.py": {"methods.sc"},
    "methods/sc_shuffled.py": {"methods.sc"},
    "methods/lsuv.py": {"methods.random_init"},
    "methods/pca_whiten.py": {"methods.pixels"},
    "methods/pixels_svm.py": {"methods.pixels"},
    "methods/hog.py": {"methods.pixels"},
    "methods/coates_kmeans.py": {"methods.pixels"},
    "methods/densecl.py": {"methods.moco_v2"},
    "methods/dcl.py": {"methods.simclr"},
    "methods/supcon.py": {"methods.simclr"},
    "harness/evaluators/_fitted_probe.py": {"evaluators.linear_probe"},
    "harness/evaluators/calibration.py": {"evaluators._fitted_probe"},
    "harness/evaluators/robustness.py": {"evaluators._fitted_probe"},
    "methods/bagssl.py": {"methods.vicreg"},
}


def imports(path: Path) -> set[str]:
    """Every module named in an import statement of a file, wherever it stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            if node.module == "harness":
                found |= {f"harness.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def core_files() -> list[Path]:
    return [
        p for p in sorted((ROOT / "harness").rglob("*.py")) if "evaluators" not in p.parts and "recipes" not in p.parts
    ]


def tier_of(module: str) -> int:
    places = [number for number, names in enumerate(TIERS) if module in names]
    assert places, f"harness.{module} has no tier: add it to TIERS"
    return places[0]


@pytest.mark.parametrize("path", core_files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_core_imports_downwards_only(path: Path) -> None:
    module = (
        path.relative_to(ROOT / "harness")
        .with_suffix("")
        .as_posix()
        .replace("/", ".")
        .removesuffix("__init__")
        .strip(".")
    )
    for name in imports(path):
        if name.startswith("harness."):
            target = name.removeprefix("harness.")
            if target in EXCEPTIONS.get(path.name, set()):
                continue
            if target.startswith(("methods", "datasets", "evaluators")):
                pytest.fail(f"{path.name} names the plugin {target}; only the registry loads plugins")
            known = {n for tier in TIERS for n in tier}
            while target not in known and "." in target:
                target = target.rpartition(".")[0]
            if target in known:  # else: a name such as harness.__version__
                assert tier_of(module) <= tier_of(target), f"{path.name} imports harness.{target}, which lies above it"


@pytest.mark.parametrize("folder", PLUGINS)
def test_plugins_import_only_what_their_kind_may(folder: str) -> None:
    for path in sorted((ROOT / folder).glob("*.py")):
        relative = path.relative_to(ROOT).as_posix()
        for name in imports(path):
            top = name.partition(".")[0]
            if top == "harness":
                target = name.removeprefix("harness.")
                assert target in PLUGINS[folder] | VARIANTS.get(relative, set()), f"{relative} imports {name}"
            else:
                assert top in ALWAYS | PLUGIN_LIBRARIES[folder], f"{relative} imports {name}"


@pytest.mark.parametrize(("library", "home"), [("mlflow", "tracking.py"), ("optuna", "tuning.py")])
def test_trackers_and_tuners_have_one_home(library: str, home: str) -> None:
    for path in core_files() + [p for folder in PLUGINS for p in (ROOT / folder).glob("*.py")]:
        if path.name != home:
            assert not any(name.partition(".")[0] == library for name in imports(path)), f"{path} imports {library}"


def test_the_core_names_no_plugin_method() -> None:
    """The runner asks the registry for roles; a method's or data set's name never stands in the core."""
    from harness import registry

    # `random_init` is the baseline column of the summary; `pixels` and `folder` are also plain words
    names = (set(registry.names("method")) | set(registry.names("dataset"))) - {
        "random_init",
        "pixels",
        "folder",
        "supervised",
        "outside",
        "digits",
        "sc",
    }
    for path in core_files():
        strings = {
            n.value
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        assert not strings & names, f"{path.name} names {strings & names}"


def test_plugin_folders_are_no_packages() -> None:
    assert not (ROOT / "methods" / "__init__.py").exists()
    assert not (ROOT / "datasets" / "__init__.py").exists()
    assert not (ROOT / "harness" / "results.py").exists()
    assert not (ROOT / "harness" / "tests.py").exists()
