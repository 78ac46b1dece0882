"""Row: what one number is stored as. Apart from the other contracts, so that rows are read without importing torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Status = Literal["FINISHED", "INTERRUPTED", "OUT_OF_MEMORY", "NONFINITE", "FAILED"]


class Row(BaseModel):
    """One number with everything needed to believe it. Exact field names; what does not apply is null, never absent.

    labels is the flag as typed; top1 is a fraction of 1; a value is finite, or metric is `status` and value null.
    No path, host or user name is ever in a row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: str
    config: dict[str, Any]
    dataset: str
    data_sha256: str
    data_verified: bool
    test_overlap: int | None
    pretrain_data: str
    encoder: str
    pretrain_id: str
    eval_id: str
    seed: int
    label_seed: int | None
    labels: str | None
    fold: int | None
    label_subset_sha256: str | None
    evaluator: str
    readout: str | None
    split: str
    metric: str
    value: float | None
    n_test: int | None
    steps: int
    images_seen: int
    views_seen: int
    device_seconds: float | None
    device: str
    precision: str
    num_threads: int
    deterministic: bool
    torch_version: str
    harness_version: str
    git_commit: str | None
    git_dirty: bool | None
    code_sha256: str
    numbers_version: int
    started_at: str
    finished_at: str
    status: Status
    collapsed: bool | None
    converged: bool | None
    weights_sha256: str | None
    images_per_second: float | None
    share_of_floor: float | None = None  # rows from before it was measured stay readable
    peak_memory_bytes: int | None

    @property
    def transferred(self) -> bool:
        """Whether the encoder was pretrained on another data set; `pretrain_data` then names it (`mnist:train`)."""
        return ":" in self.pretrain_data
