"""Floor: the raw pixels read by a kernel SVM (RBF), the strongest simple classifier that learns no features."""

from __future__ import annotations

from harness.methods.pixels import Pixels


class PixelsSVM(Pixels):
    """Raw pixels, RBF SVM"""

    year = 1995
    source = "Cortes & Vapnik, 1995"
    evaluators = ("svm",)
