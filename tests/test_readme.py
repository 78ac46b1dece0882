"""README's example method is real: it runs through the command line as a plugin."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_example_method_runs_beside_its_controls(forks: Any, tmp_path: Path) -> None:
    source = next(
        block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "class Mirror" in block
    )
    assert len(source.splitlines()) <= 35
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "mirror.py").write_text(source)
    done = forks.run("run", "--method", "mirror", "--dataset", "digits", "--plugins", ".", "--epochs", "3", "--labels", "10pc",
                     "--eval", "knn", "--tracking", "none", "--json", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {"mirror", "random_init", "pixels"} <= {row["method"] for row in rows if row["value"] is not None}
    assert next(row for row in rows if row["method"] == "mirror")["config"]["method.share"] == 0.5


def test_readme_has_no_gaps() -> None:
    text = README.read_text()
    assert "@@" not in text
    for target in re.findall(r"\]\(([^)h#][^)]*)\)", text):
        assert (README.parent / target).exists(), target
