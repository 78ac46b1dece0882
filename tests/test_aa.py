"""A/A: one method registered twice must not be called different more often than the level allows."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import statistics

VALUES = Path(__file__).parent / "support" / "aa_values.csv"  # real ones, made by aa_values.py beside it
GRIDS = 1000
TWINS = 3  # compared with the one they repeat: the family of Holm's correction

TWIN = '''
from harness.methods.random_init import RandomInit


class Twin(RandomInit):
    """Random initialisation under another name"""

    role, family = None, "twin"
'''


def values() -> np.ndarray:
    with VALUES.open() as file:
        return np.array([float(row["test_top1"]) for row in csv.DictReader(file)])


def called_different(first: np.ndarray, others: np.ndarray) -> bool:
    """Whether any of `others` (TWINS, n) is called a gain or a loss over `first` (n,), as the report decides it."""
    differences = others - first
    plain = [statistics.paired(row) for row in differences]
    adjusted = statistics.holm([found.p for found in plain if found.p is not None])
    assert len(adjusted) == TWINS
    verdicts = [statistics.paired(d, adjusted_p=float(p)).verdict for d, p in zip(differences, adjusted, strict=True)]
    return any(verdict in ("gain", "loss") for verdict in verdicts)


@pytest.mark.parametrize("n", [6, 10])
def test_twins_are_called_different_in_at_most_five_percent_of_grids(n: int) -> None:
    """Each grid gives every twin n seeds of its own, out of 60 that were measured: differences as between strangers."""
    pool, generator = values(), np.random.default_rng(0)
    assert len(pool) == 60 and pool.std() > 0.001
    wrong = 0
    for _ in range(GRIDS):
        drawn = generator.permutation(pool)[: (TWINS + 1) * n].reshape(TWINS + 1, n)
        wrong += called_different(drawn[0], drawn[1:])
    assert wrong / GRIDS <= 0.05
    assert wrong > 0  # a decision that never speaks would pass too


@pytest.mark.parametrize("n", [6, 10])
def test_the_same_decision_sees_a_planted_difference(n: int) -> None:
    pool, generator = values(), np.random.default_rng(1)
    seen = 0
    for _ in range(100):
        drawn = generator.permutation(pool)[: (TWINS + 1) * n].reshape(TWINS + 1, n)
        drawn[1] += 4 * pool.std()
        seen += called_different(drawn[0], drawn[1:])
    assert seen >= 90


CODE = """
import sys
from pathlib import Path
import harness
from harness import registry
from harness.report import assembly

registry.add_folder(Path(sys.argv[1]))
for method in ("random_init", "twin"):
    harness.run(method=method, dataset="digits", workspace="w", seeds="0-5", labels="10pc", control=False,
                evaluators=["knn"], tracking="none", set={"num_threads": 1, "precision": "fp32"})
(board,) = assembly.build(harness.load_results("w"), primary=["twin"])
twin, first = board.entry("twin"), board.entry("random_init")
assert twin.values == first.values and len(set(twin.values.values())) > 1
print(twin.control.verdict, f"bold:{twin.bold}", f"primary:{twin.control.primary}")
"""


def test_random_init_registered_twice_is_the_same(forks: Any, tmp_path: Path) -> None:
    """On the same seeds it reads the same to the bit, and the report says so."""
    (tmp_path / "plugins" / "methods").mkdir(parents=True)
    (tmp_path / "plugins" / "methods" / "twin.py").write_text(TWIN)
    done = forks.run(str(tmp_path / "plugins"), cwd=tmp_path, code=CODE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["equivalent", "bold:False", "primary:True"]
