"""Make tests/support/aa_values.csv: what `random_init` reads on digits over 60 seeds, for the A/A test.

    python tests/support/aa_values.py > tests/support/aa_values.csv

One run per seed, linear probe with 10 labels per class, one thread, fp32; the headline is the readout that validation chose.
"""

from __future__ import annotations

import sys
import tempfile

import harness

SEEDS = "0-59"


def main() -> None:
    with tempfile.TemporaryDirectory() as workspace:
        rows = harness.run(
            method="random_init", dataset="digits", workspace=workspace, seeds=SEEDS, labels="10pc", control=False,
            evaluators=["linear_probe"], tracking="none", set={"num_threads": 1, "precision": "fp32"},
        )  # fmt: skip
    top1 = rows[(rows.evaluator == "linear_probe") & (rows.metric == "top1")]
    table = top1.pivot_table(index=["seed", "readout"], columns="split", values="value").reset_index("readout")
    print("seed,readout,test_top1")
    for seed, mine in table.groupby("seed"):
        best = mine.iloc[mine["validation"].to_numpy().argmax()]
        print(f"{seed},{best['readout']},{best['test']:.6f}")


if __name__ == "__main__":
    sys.exit(main())
