"""An encoder whose weights were made elsewhere, measured by the same protocol (`harness evaluate --weights FILE`).

Nothing is trained here; the runner loads the file, and the digest of its tensors is the method's identity.
"""

from __future__ import annotations

from torch import Tensor

from harness.contracts import Batch, Config, HarnessError, Method, setting


class Outside(Method):
    """Outside weights"""

    role = "outside"
    trains = False
    family = "outside"
    year = 2026
    source = "the file given by --weights"

    class Config(Config):
        weights_sha256: str = setting("", "digest of the tensors, filled in by `harness evaluate --weights`")

    def __init__(self, encoder, config, info) -> None:  # type: ignore[no-untyped-def]
        super().__init__(encoder, config, info)
        if not config.weights_sha256:
            raise HarnessError("method 'outside' stands for weights made elsewhere: harness evaluate --weights FILE")

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        raise HarnessError("outside weights are not trained here")
