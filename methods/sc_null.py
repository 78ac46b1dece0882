"""The null control of sc: the same loss, network and budget, but each positive is a patch of another image.

Nothing about the images can be learnt from it; what it still gains over random_init is the conditioning of the network
(measured on tiles of MNIST: +8 points with gap), and only what sc gains beyond it is due to spatial contrasting.
The image's own second patch stays among its N - 1 negatives, which is worth at most log(N / (N - 1)) of loss, 0.008 at
N = 128; leaving it out moved the gap probe by +0.9 and -0.5 points (quick recipe, Fashion-MNIST, seeds 0 and 1): noise.
"""

from __future__ import annotations

from typing import Literal

from harness.contracts import setting
from harness.methods.sc import SpatialContrasting


class SpatialContrastingNull(SpatialContrasting):
    """Spatial contrasting without information"""

    family = "control"
    source = "sc with method.pairs=shuffled"
    null_control = None

    class Config(SpatialContrasting.Config):
        pairs: Literal["same_image", "shuffled"] = setting("shuffled", "positives of another image: no information")
