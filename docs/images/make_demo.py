"""Draw demo.svg from the rows of a workspace in which `make demo` ran: python docs/images/make_demo.py WORKSPACE"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from harness import console, records, runs
from harness.report.summary import summarise

ROLES = ("sc", "sc_null", "random_init", "supervised", "hog", "pixels", "pixels_svm")  # the order of the command


def main() -> None:
    workspace = Path(sys.argv[1]).resolve()
    run = runs.find(workspace, "latest")
    picture = Console(record=True, width=136, highlight=False, file=io.StringIO())
    console.console = lambda stderr=False: picture  # type: ignore[assignment]
    picture.print("$ harness run --method sc --dataset digits", markup=False)
    rows = sorted(records.read_all(workspace), key=lambda row: ROLES.index(row.method))
    for summary in summarise(rows):
        console.print_summary(summary, run.facts["dataset"], run.facts["method"], run.facts["config"]["seed"])
    svg = picture.export_svg(title="harness")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # no font from the network
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    Path(__file__).with_name("demo.svg").write_text(svg)


if __name__ == "__main__":
    main()
