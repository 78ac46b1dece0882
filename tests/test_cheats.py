"""Ten planted cheats, each exposed: by an error of one line that ends the command, or by a warning beside the numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

import harness
from harness import records
from harness.contracts import HarnessError
from harness.report import assembly, warnings

FIXED = {"num_threads": 1, "precision": "fp32"}

# What all planted evaluators share; each cheats in `evaluate`.
HEAD = '''"""A planted evaluator."""
import copy
import torch
from torch import nn
from torch.nn import functional as F
from harness.contracts import Evaluation, Evaluator, Measurement
from harness.optim import OptimConfig, ScheduleConfig

class Head(nn.Module):
    def __init__(self, encoder, width):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, 10)
    def logits(self, images):
        return self.head(self.encoder.pool(self.encoder(images))).float()
    def loss(self, batch, step):
        return {"loss": F.cross_entropy(self.logits(batch.images), batch.labels)}

def width(task):
    return task.features("train", "gap").shape[1]

def fit(task, key, module, steps):
    labels = torch.from_numpy(task.labels("train"))
    task.trainer(key, module, task.images("train"), labels, steps=steps, batch_size=32, seed=0,
                 optim=OptimConfig(lr=0.01), schedule=ScheduleConfig())

@torch.no_grad()
def predicted(module, images):
    return module.eval().logits(images).argmax(1).numpy()

class Planted(Evaluator):
    """Planted"""
    name = "NAME"
    def evaluate(self, task):
'''
CHEATS = {
    # a probe whose gradients reach the encoder that it was given
    "unfrozen_encoder": """
        probe = Head(task.encoder.requires_grad_(True), width(task))
        images, labels = task.images("train"), torch.from_numpy(task.labels("train"))
        optimiser = torch.optim.SGD(probe.parameters(), 0.01)
        for _ in range(3):
            optimiser.zero_grad()
            F.cross_entropy(probe.logits(images), labels).backward()
            optimiser.step()
        right = predicted(probe, task.images("test")) == task.labels("test")
        return Evaluation([Measurement("gap", "test", "top1", float(right.mean()), len(right))])
""",
    # likewise, by the lent loop and on a copy
    "unfrozen_copy": """
        probe = Head(copy.deepcopy(task.encoder), width(task))
        fit(task, "probe", probe, 3)
        right = predicted(probe, task.images("test")) == task.labels("test")
        return Evaluation([Measurement("gap", "test", "top1", float(right.mean()), len(right))])
""",
    # features read in training mode: the running statistics follow the labelled images
    "moving_batch_norm": """
        with torch.no_grad():
            task.encoder.train()(task.images("train"))
            task.encoder.eval()
        return Evaluation([Measurement("gap", "validation", "top1", 0.99, 10)])
""",
    # chooses on more labels than the budget bought, and says so in its count
    "free_validation": """
        return Evaluation([Measurement("gap", "validation", "top1", 0.99, 1297)])
""",
    # asks for labels by the name of a split that is no budget
    "labels_of_the_unlabelled": """
        task.labels("pretrain")
""",
    # epoch after epoch, a look at the test split, and the best of them reported
    "best_epoch": """
        best = 0.0
        for epoch in range(3):
            network = Head(copy.deepcopy(task.encoder), width(task))
            fit(task, f"epoch{epoch}", network, 2)
            best = max(best, float((predicted(network, task.images("test")) == task.labels("test")).mean()))
        return Evaluation([Measurement(None, "test", "top1", best, len(task.labels("test")))])
    trains_encoder = True
""",
    # the same in a loop of its own: the number is the best epoch's, the network the last
    "best_epoch_by_hand": """
        queries, targets, head, values = task.features("test", "gap"), task.labels("test"), nn.Linear(width(task), 10), []
        for epoch in range(4):  # another draw of the head stands for an epoch
            nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(epoch))
            predictions = head(queries.clone()).argmax(1).numpy()
            values.append(float((predictions == targets).mean()))
        assert values[-1] < max(values)
        return Evaluation([Measurement("gap", "test", "top1", max(values), len(targets))], {"gap": predictions})
""",
    # no cheat: the same head, the encoder frozen, the last epoch
    "honest": """
        features, labels = task.features("train", "gap"), torch.from_numpy(task.labels("train"))
        class Linear(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(features.shape[1], 10)
            def loss(self, batch, step):
                return {"loss": F.cross_entropy(self.head(features[batch.indices]), batch.labels)}
        module = Linear()
        fit(task, "probe", module, 20)
        with torch.no_grad():
            predictions = module.head(task.features("test", "gap")).argmax(1).numpy()
        right = float((predictions == task.labels("test")).mean())
        return Evaluation([Measurement("gap", "test", "top1", right, len(predictions))], {"gap": predictions})
""",
}


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "evaluators").mkdir()
    for name, body in CHEATS.items():
        (folder / "evaluators" / f"{name}.py").write_text(HEAD.replace("NAME", name) + body)
    yield folder


PLANT = """
import json, sys
from pathlib import Path
import harness
from harness import registry
from harness.contracts import HarnessError

registry.add_folder(Path(sys.argv[1]))
told = {}
for name in sys.argv[2:]:
    try:
        harness.run(method="random_init", dataset="digits", workspace=".", labels="10pc", control=False, evaluators=[name],
                    tracking="none", set={"num_threads": 1, "precision": "fp32"})
        told[name] = "passed"
    except HarnessError as error:
        told[name] = str(error)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def planted(forks: Any, plugins: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """(workspace, {planted evaluator: what was said}): one process gives each of them the same random_init on digits."""
    workspace = tmp_path_factory.mktemp("cheats")
    done = forks.run(str(plugins), *CHEATS, cwd=workspace, code=PLANT)
    assert done.returncode == 0, done.stderr
    return workspace, json.loads(done.stdout)


def exposed(planted: tuple[Path, dict[str, str]], evaluator: str, words: str) -> None:
    """It is refused in one line that says why, and leaves no number."""
    workspace, told = planted
    assert words in told[evaluator]
    assert "\n" not in told[evaluator]
    assert evaluator not in set(harness.load_results(workspace).evaluator)


# ------------------------------------------------------------------------------------------------------ by the runner


def test_honest_evaluators_pass(planted: tuple[Path, dict[str, str]]) -> None:
    workspace, told = planted
    assert told["honest"] == "passed"
    rows = harness.load_results(workspace)
    assert rows[rows.evaluator == "honest"].value.notna().tolist() == [True]


def test_the_command_ends_with_the_line(forks: Any, plugins: Path, tmp_path: Path) -> None:
    words = ["run", "--method", "random_init", "--dataset", "digits", "--labels", "10pc", "--no-control", "--eval",
             "unfrozen_encoder", "--plugins", str(plugins)]  # fmt: skip
    done = forks.run(*words, cwd=tmp_path, COLUMNS="400")
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 2, said
    assert "evaluator 'unfrozen_encoder' changed the encoder that it was given" in said
    assert "Traceback" not in said


def test_1_unfrozen_encoder_in_the_probe(planted: tuple[Path, dict[str, str]]) -> None:
    exposed(planted, "unfrozen_encoder", "changed the encoder that it was given (weight ")
    exposed(planted, "unfrozen_copy", "reads a frozen encoder and trains its own head only")


def test_2_batch_norm_updated_while_probing(planted: tuple[Path, dict[str, str]]) -> None:
    exposed(planted, "moving_batch_norm", "changed the encoder that it was given (buffer ")


def test_3_test_peeking_tuner(tmp_path: Path) -> None:
    """What a search runs with: the test split is closed to everything, and no row speaks of it."""
    from harness.arms import Request, make_plan
    from harness.config import Layers
    from harness.runner import execute

    request = Request("random_init", "digits", Layers(overrides=dict(FIXED)), tmp_path, evaluators=("linear_probe", "knn"),
                      labels="10pc", control=False, tracking="none", allow_test=False)  # fmt: skip
    material = make_plan(request).material
    assert not material.has_test
    with pytest.raises(HarnessError, match="the test split is closed here: nothing may be chosen by looking at it"):
        material.split("test")
    rows = execute(request).rows
    assert {row.split for row in rows if row.labels} == {"validation"}


def test_5_validation_labels_outside_the_budget(planted: tuple[Path, dict[str, str]]) -> None:
    exposed(planted, "free_validation", "validated on 1,297 images, but its label budget holds 100")
    exposed(planted, "labels_of_the_unlabelled", "an evaluator sees labels of train (its label budget)")


def test_8_best_epoch_instead_of_last(planted: tuple[Path, dict[str, str]]) -> None:
    exposed(planted, "best_epoch", "the test labels were read before the training was over")
    exposed(planted, "best_epoch_by_hand", "a number must be of the network that it is recorded for")


# -------------------------------------------------------------------------------------------------- by what rows say


def images_of(tmp_path: Path, published_formats: ModuleType) -> Path:
    data = tmp_path / "pets"
    published_formats.write_image_folder(data, np.random.default_rng(0), num_train=20, num_test=6, num_unlabeled=10)
    return data


def rows_of(data: Path, workspace: Path) -> pd.DataFrame:
    return harness.run(method="random_init", dataset=f"folder:{data}", workspace=workspace, labels="all", control=False,
                       evaluators=["knn"], tracking="none", set={**FIXED, "batch_size": 8})  # fmt: skip


@pytest.mark.parametrize("among", ["unlabeled", "train"], ids=["4_unlabelled", "10_duplicates"])
def test_4_and_10_test_images_elsewhere(among: str, tmp_path: Path, published_formats: ModuleType) -> None:
    data = images_of(tmp_path, published_formats)
    clean = rows_of(data, tmp_path / "clean")
    assert set(clean[clean.split == "test"].test_overlap) == {0}
    assert warnings.overlapping(clean) == []
    for number, image in enumerate(sorted((data / "test").rglob("*.*"))[:2]):
        folder = data / among / (image.parent.name if among == "train" else "")
        shutil.copy(image, folder / f"copied{number}{image.suffix}")
    rows = rows_of(data, tmp_path / "planted")
    assert set(rows[rows.split == "test"].test_overlap) == {2}
    assert warnings.overlapping(rows) == ["folder:pets: 2 test images are among the training or unlabelled images too"]
    assert warnings.overlapping(rows)[0] in warnings.all_of(rows)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Two methods over three seeds, measured."""
    workspace = tmp_path_factory.mktemp("grid")
    for method in ("random_init", "pixels"):
        harness.run(method=method, dataset="digits", workspace=workspace, seeds="0-2", labels="10pc", control=False,
                    evaluators=["linear_probe"], tracking="none", set=FIXED)  # fmt: skip
    return harness.load_results(workspace)


def test_rows_that_are_well_have_no_warning(grid: pd.DataFrame) -> None:
    assert warnings.all_of(grid.assign(git_dirty=False)) == []
    assert warnings.all_of(grid.iloc[:0]) == []


def told(rows: pd.DataFrame) -> str:
    """What stands beside the numbers of these rows in the report."""
    return "\n".join(line for board in assembly.build(rows) for line in board.warnings)


def test_6_failed_seeds_dropped(grid: pd.DataFrame) -> None:
    worst = (grid.method == "random_init") & (grid.seed == 1)
    dropped = "random_init: no number for seed 1 that others have (digits, 10pc labels)"
    assert dropped in told(grid[~worst])
    failed = grid[worst].head(1).assign(status="FAILED", metric="status", value=None, labels=None, evaluator="pretext",
                                        split="pretrain", readout=None)  # fmt: skip
    rows = pd.concat([grid[~worst], failed], ignore_index=True)
    assert dropped in told(rows)
    assert "random_init (digits): seed 1 ended as FAILED, in no mean" in told(rows)


def test_6_a_run_that_fails_is_told(tmp_path: Path) -> None:
    rows = harness.run(method="sc", dataset="digits", workspace=tmp_path, labels="10pc", control=False, epochs=1,
                       evaluators=["knn"], tracking="none", set={**FIXED, "optim.lr": 1e38, "method.distance": "squared"})  # fmt: skip
    assert warnings.failed_runs(rows) == ["sc (digits): seed 0 ended as NONFINITE, in no mean"]
    assert len(records.frame(records.read_all(tmp_path))) == len(rows)


def test_7_mixed_code_versions(grid: pd.DataFrame) -> None:
    rows = grid.copy()
    rows.loc[(rows.method == "random_init") & (rows.seed == 2) & (rows.evaluator == "linear_probe"), "code_sha256"] = (
        "f" * 64
    )
    (line,) = warnings.mixed_versions(rows)
    assert line.startswith("random_init, linear_probe: several versions of the code: ")
    assert "ffffffff (seed 2)" in line and "(seeds 0, 1)" in line
    assert line in told(rows)
    rows = grid.assign(numbers_version=grid.numbers_version + (grid.seed == 2))
    assert "several versions of the engine: 2, 3" in warnings.mixed_versions(rows)
    boards = assembly.build(rows)
    assert sorted(board.seeds for board in boards) == [(0, 1), (2,)]  # and they are not averaged


def test_7_dirty_trees(grid: pd.DataFrame) -> None:
    rows = grid.assign(git_dirty=(grid.method == "pixels") & (grid.seed == 0))
    assert warnings.dirty_trees(rows) == ["made with uncommitted changes in the working tree: pixels"]


def test_9_an_unconverged_control(tmp_path: Path) -> None:
    """A control whose fine-tuning was stopped early: told, and no verdict is given on a difference to it."""
    few: dict[str, Any] = {"eval.fine_tune.min_steps": 4, "eval.fine_tune.max_steps": 4, "eval.fine_tune.epochs": 0.01}
    for method in ("sc", "random_init"):
        harness.run(method=method, dataset="digits", workspace=tmp_path, seeds="0-2", labels="10pc", control=False, epochs=1,
                    evaluators=["fine_tune"], tracking="none", set={**FIXED, **few})  # fmt: skip
    rows = harness.load_results(tmp_path)
    assert set(rows[(rows.evaluator == "fine_tune") & (rows.metric == "top1")].converged) == {False}
    rows.loc[(rows.method == "sc") & (rows.evaluator == "fine_tune"), "converged"] = (
        True  # the method's own arm is fine
    )
    line = "random_init, fine_tune: not converged at seeds 0, 1, 2; comparisons with it are invalid"
    assert warnings.unconverged(rows) == [line]
    (board,) = assembly.build(rows)
    assert line in board.warnings
    difference = board.entry("sc").control
    assert difference is not None and difference.verdict == "invalid"
    assert not board.entry("sc").bold


def test_unequal_budgets_and_collapse(grid: pd.DataFrame) -> None:
    first = grid[grid.method == "random_init"].assign(method="one", images_seen=40_000)
    second = first.assign(method="two", images_seen=80_000)
    assert warnings.unequal_budgets(pd.concat([first, second])) == [
        "images seen in pretraining differ (digits, 10pc labels): one 40,000, two 80,000"
    ]
    other = first.assign(method="two")
    other.loc[(other.seed == 1) & other.labels.notna(), "label_subset_sha256"] = "0" * 64
    assert warnings.unequal_budgets(pd.concat([first, other])) == [
        "methods were given different labelled images at seed 1 (digits, 10pc labels)"
    ]
    assert warnings.collapsed(first.assign(collapsed=first.seed == 1, evaluator="representation")) == [
        "one, representation: collapsed features at seed 1"
    ]
