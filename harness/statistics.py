"""What the numbers of several seeds, test images and data sets say: intervals, paired tests, corrections.

Pure functions of arrays; values are fractions of 1, differences are of paired seeds. Student's t carries every verdict,
because it covers at the few seeds that are affordable where bootstrap intervals do not: nominal 95% BCa intervals cover
70 to 75, 84, 88 and 90 to 91% at n = 3, 5, 6 and 10 (measured on normal errors).

Sources: Student, "The probable error of a mean", Biometrika 6, 1908 (t); Fisher, "The Design of Experiments", 1935, section
21 (sign flips); McNemar, Psychometrika 12, 1947; Holm, Scandinavian Journal of Statistics 6, 1979; Schuirmann, Journal of
Pharmacokinetics and Biopharmaceutics 15, 1987 (two one-sided tests); Owen, Annals of Applied Statistics 1, 2007 (bootstrap
of crossed effects); Bonett & Price, Journal of Educational and Behavioral Statistics 37, 2012 (paired proportions);
Agarwal et al., NeurIPS 2021 (interquartile mean, probability of improvement).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from harness.errors import HarnessError

LEAST_FOR_INTERVAL = 3  # seeds
LEAST_FOR_WINNER = 6  # seeds: with five, no sign-flip test can reach 0.05
LEAST_DATASETS = 5  # for what is averaged over data sets
EXACT_SIGN_FLIPS = 16  # seeds; above, as many flips are sampled as this many have
POWER = 0.8  # of `detectable`
SAME = 1e-12  # differences that lie closer than this are equal but for rounding

Verdict = Literal["gain", "loss", "equivalent", "inconclusive", "no interval", "no winner", "invalid"]
Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Interval:
    """A mean (or another estimate) of n values with its confidence interval; low, high: None where n is too small."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Paired:
    """What n paired differences say.

    low, high: Student's t interval of the mean, not adjusted; p: two-sided, of the paired t-test
    sign_flip_p, sign_flip_floor: exact sign-flip p and the least it can be; they decide nothing
    detectable: the true difference that would have been seen with power 0.8 at the standard deviation that was seen
    equivalence_p: of two one-sided t-tests against the margin
    verdict, reason: see `paired`. Below three seeds low, high, p, detectable and equivalence_p are None; detectable also
        where the differences do not vary.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    p: float | None
    sign_flip_p: float
    sign_flip_floor: float
    detectable: float | None
    equivalence_p: float | None
    verdict: Verdict
    reason: str


# -------------------------------------------------------------------------------------------------------- over seeds


def t_interval(values: Values, level: float = 0.95) -> Interval:
    """Student's t interval of a mean (Student 1908). values: (n,). Raises HarnessError when empty or not finite."""
    from scipy import special

    array = _finite(values)
    n, mean = len(array), float(array.mean())
    if n < LEAST_FOR_INTERVAL:
        return Interval(mean, None, None, n)
    half = float(special.stdtrit(n - 1, (1 + level) / 2)) * _deviation(array) / n**0.5
    return Interval(mean, mean - half, mean + half, n)


def paired(
    differences: Values,
    *,
    margin: float = 0.01,
    level: float = 0.95,
    adjusted_p: float | None = None,
    invalid: str = "",
) -> Paired:
    """Judge paired differences. differences: (n,), one per seed.

    margin: differences below it count as equivalent; adjusted_p: this comparison's p after Holm's correction over its
    family (None: it stands alone); invalid: why the comparison must not be judged, empty when it may be.

    The Holm-adjusted interval excludes 0 exactly where adjusted_p <= 1 - level, so that is what is asked. Then: below three
    seeds `no interval`; excluded with six seeds or more `gain` or `loss`, with fewer `no winner`; else `equivalent` where both
    one-sided tests reject a difference of the margin at 1 - level, else `inconclusive`. Differences that are the same on
    every seed are `equivalent` when they are 0 and otherwise `no winner`: such seeds repeat one measurement.
    Raises HarnessError when there is no difference or one is not finite.
    """
    array = _finite(differences)
    interval, (flip, least) = t_interval(array, level), sign_flip(array)
    p = detectable = same = None
    if interval.n >= LEAST_FOR_INTERVAL:
        p, same = _t_test(array, 0.0, "two-sided"), equivalence(array, margin)
        detectable = detectable_effect(_deviation(array), interval.n, POWER, level) if _deviation(array) else None
    verdict, reason = _judge(array, p, adjusted_p, same, detectable, margin, level)
    if invalid:
        verdict, reason = "invalid", invalid
    return Paired(
        interval.n, interval.mean, interval.low, interval.high, p, flip, least, detectable, same, verdict, reason
    )


def _judge(
    array: np.ndarray,
    p: float | None,
    adjusted_p: float | None,
    same: float | None,
    detectable: float | None,
    margin: float,
    level: float,
) -> tuple[Verdict, str]:
    n, alpha = len(array), 1 - level
    name = "interval" if adjusted_p is None else "Holm-adjusted interval"
    deciding = p if adjusted_p is None else adjusted_p
    if deciding is None or p is None or same is None:
        return "no interval", f"{_seeds(n)}: below {LEAST_FOR_INTERVAL} seeds no interval"
    if not _deviation(array):
        if abs(array[0]) < SAME:
            return "equivalent", f"no difference at all on any of {n} seeds"
        return "no winner", f"the same difference on all of {n} seeds: they repeat one measurement"
    if deciding <= alpha:
        if n < LEAST_FOR_WINNER:
            return "no winner", f"{_seeds(n)}: the {name} excludes 0, but below {LEAST_FOR_WINNER} seeds no winner"
        return "gain" if array.mean() > 0 else "loss", f"the {name} excludes 0 (p = {deciding:.2g})"
    points = f"{100 * margin:g} point" + ("" if margin == 0.01 else "s")
    if same <= alpha:
        return "equivalent", f"two one-sided tests exclude a difference of {points} (p = {same:.2g})"
    reason = f"the {name} includes 0 (p = {deciding:.2g})"
    if p <= alpha:
        reason = f"the interval excludes 0, the Holm-adjusted one does not (p = {deciding:.2g})"
    return "inconclusive", f"{reason}; detectable with {_seeds(n)}: {100 * (detectable or 0):.2g} points"


def holm(p_values: Values) -> np.ndarray:
    """Holm's adjusted p values (Holm 1979): each at most alpha exactly where the step-down test at alpha rejects.

    p_values: (k,) of one family, in any order; empty for none. Raises HarnessError when one is not in [0, 1].
    """
    p = np.asarray(p_values, dtype=float)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):  # NaN fails the comparison too
        raise HarnessError("Holm's correction needs p values between 0 and 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    steps = p[order] * np.arange(len(p), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps))
    return adjusted


def sign_flip(differences: Values) -> tuple[float, float]:
    """(p, floor): two-sided sign-flip p of the mean (Fisher 1935) and the least p that n differences allow.

    Exact over all 2^n signs up to n = 16, with floor 2 / 2^n; above, over 65,536 drawn ones and the one seen, always the
    same, and the floor is at least that draw's, 1 / 65,537.
    """
    array = _finite(differences)
    n, count = len(array), 2 ** min(len(array), EXACT_SIGN_FLIPS)
    sums = np.abs(_signs(n) @ array)
    seen = abs(float(array.sum()))
    extreme = int((sums >= seen - SAME - 1e-9 * seen).sum())  # sums of the same terms in other orders round differently
    if n <= EXACT_SIGN_FLIPS:
        return extreme / count, 2 / count
    return (extreme + 1) / (count + 1), max(2 / 2**n, 1 / (count + 1))


@lru_cache(maxsize=4)  # a report asks thousands of times for the same few n
def _signs(n: int) -> np.ndarray:
    """(count, n) int8 of -1 and 1: all 2^n rows up to EXACT_SIGN_FLIPS, else drawn ones, always the same."""
    count = 2 ** min(n, EXACT_SIGN_FLIPS)
    if n <= EXACT_SIGN_FLIPS:
        bits = ((np.arange(count)[:, None] >> np.arange(n)) & 1).astype(np.int8)
    else:
        bits = np.random.default_rng(0).integers(0, 2, (count, n), dtype=np.int8)
    signs: np.ndarray = 2 * bits - 1
    signs.flags.writeable = False
    return signs


def equivalence(differences: Values, margin: float) -> float:
    """p of two one-sided t-tests (Schuirmann 1987): small where the true mean lies within (-margin, margin).

    At most 0.05 exactly where the 90% t interval lies within. Raises HarnessError below two differences or for a margin
    that is not above 0.
    """
    array = _finite(differences)
    if len(array) < 2 or not margin > 0:
        raise HarnessError(f"equivalence needs two differences and a margin above 0, not {len(array)} and {margin:g}")
    return max(_t_test(array, -margin, "greater"), _t_test(array, margin, "less"))


def detectable_effect(sd: float, n: int, power: float = POWER, level: float = 0.95) -> float:
    """The true mean difference that a two-sided paired t-test at 1 - level finds with that power, at n seeds.

    sd: standard deviation of the differences. By the noncentral t distribution. Raises HarnessError below two seeds.
    """
    if n < 2:
        raise HarnessError("a detectable difference needs at least two seeds")
    return sd * _noncentrality(n, power, level) / n**0.5


@lru_cache
def _noncentrality(n: int, power: float, level: float) -> float:
    from scipy import optimize, stats

    critical = stats.t.ppf((1 + level) / 2, n - 1)

    def missing(shift: float) -> float:
        # the far side by symmetry: scipy's cdf of it is NaN where it is too small
        return float(stats.nct.sf(critical, n - 1, shift) + stats.nct.sf(critical, n - 1, -shift) - power)

    return float(optimize.brentq(missing, 1e-6, 4 * critical + 10))


def _t_test(array: np.ndarray, centre: float, side: Literal["two-sided", "greater", "less"]) -> float:
    """p of a one-sample t-test; differences that do not vary are infinitely far from another centre."""
    from scipy import special  # as scipy.stats.ttest_1samp, at a fraction of its cost

    away, deviation = float(array.mean()) - centre, _deviation(array)
    if not deviation:
        reached = abs(away) > SAME and (side == "two-sided" or (away > 0) == (side == "greater"))
        return 0.0 if reached else 1.0
    t = away / (deviation / len(array) ** 0.5)
    if side == "two-sided":
        return float(2 * special.stdtr(len(array) - 1, -abs(t)))
    return float(special.stdtr(len(array) - 1, -t if side == "greater" else t))


def _deviation(array: np.ndarray) -> float:
    """Standard deviation, n - 1 below; exactly 0 where the values differ by rounding only."""
    return 0.0 if float(np.ptp(array)) < SAME else float(array.std(ddof=1))


def _finite(values: Values) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise HarnessError(f"statistics need one or more finite numbers in a row, not an array of shape {array.shape} "
                           "that is empty, nested or not finite")  # fmt: skip
    return array


def _seeds(n: int) -> str:
    return f"{n} seed" + ("" if n == 1 else "s")


# --------------------------------------------------------------------------------------------------- over test images


def mcnemar(correct_a: np.ndarray, correct_b: np.ndarray) -> tuple[int, int, float]:
    """(b, c, p): images that only a has right, that only b has right, and McNemar's exact binomial p (1947), two-sided.

    correct_a, correct_b: (N,) bool of the same test images. It speaks of these two networks, not of their methods.
    """
    from scipy import stats

    a, b = _same_images(correct_a, correct_b)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return only_a, only_b, p


def paired_test_set_interval(correct_a: np.ndarray, correct_b: np.ndarray, level: float = 0.95) -> Interval:
    """Interval of accuracy a minus accuracy b of two single runs: same seeds, test-set error only.

    correct_a, correct_b: (N,) bool of the same test images. Bonett & Price (2012): Wald's interval after one image has been
    added to each kind of disagreement, which also covers when the runs disagree on few images or none.
    """
    from scipy import stats

    a, b = _same_images(correct_a, correct_b)
    count = len(a)
    only_a, only_b = ((a & ~b).sum() + 1) / (count + 2), ((b & ~a).sum() + 1) / (count + 2)
    centre = float(only_a - only_b)
    half = float(stats.norm.ppf((1 + level) / 2) * np.sqrt((only_a + only_b - centre**2) / (count + 2)))
    return Interval(float(a.mean() - b.mean()), max(-1.0, centre - half), min(1.0, centre + half), count)


def _same_images(correct_a: np.ndarray, correct_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise HarnessError(f"two runs must be read on the same test images; these have {a.shape} and {b.shape}")
    return a, b


def hierarchical_bootstrap(correct: np.ndarray, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Interval:
    """Percentile interval of a mean over seeds, label draws within them, and test images.

    correct: (S, L, N), 0/1 or differences of 0/1, of S seeds with L label draws each on the same N test images.
    Each draw takes S seeds, L label draws of each, and N images, with replacement. The images are drawn once for all seeds,
    because they are the same images (Owen 2007): drawn anew for each seed, the test set's own error would average away. Like
    every bootstrap it is too narrow for few seeds. n of the result is S; below three no interval.
    """
    array = np.asarray(correct, dtype=float)
    if array.ndim != 3 or not array.size or not np.isfinite(array).all():
        raise HarnessError(f"the hierarchical bootstrap needs (seeds, label draws, images), not shape {array.shape}")
    seeds, labels, images = array.shape
    if seeds < LEAST_FOR_INTERVAL:
        return Interval(float(array.mean()), None, None, seeds)
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):
        weights = np.bincount(generator.integers(0, images, images), minlength=images)
        chosen = generator.integers(0, seeds, (seeds, 1)), generator.integers(0, labels, (seeds, labels))
        means[draw] = float(np.dot(array, weights)[chosen].mean()) / images
    return _percentiles(float(array.mean()), means, level, seeds)


# ----------------------------------------------------------------------------------------------------- over data sets


def interquartile_mean(scores: np.ndarray, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Interval:
    """Mean of the middle half of all scores (Agarwal et al. 2021, section 4.3), with a stratified bootstrap interval.

    scores: (D, S), one row per data set, one column per seed. n of the result is D; below three seeds no interval.
    Raises HarnessError below five data sets.
    """
    from scipy import stats

    array = _datasets(scores)

    def middle(samples: np.ndarray) -> np.ndarray:
        return np.asarray(stats.trim_mean(samples.reshape(len(samples), -1), 0.25, axis=1))

    point = float(middle(array[None])[0])
    return _stratified([array], lambda drawn: middle(drawn[0]), point, level, draws, seed)


def probability_of_improvement(
    a: np.ndarray, b: np.ndarray, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval:
    """Probability that a run of a beats a run of b on a data set drawn at random (Agarwal et al. 2021, section 4.3).

    a: (D, S), b: (D, T), scores of the same data sets, larger is better; ties count half. Mann-Whitney's U / (S T), averaged
    over data sets, with a stratified bootstrap interval; the pairing of seeds is not used. n of the result is D; below
    three seeds no interval. Raises HarnessError below five data sets.
    """
    first, second = _datasets(a), _datasets(b)
    if len(first) != len(second):
        raise HarnessError(f"both methods must be read on the same data sets, not on {len(first)} and {len(second)}")

    def wins(drawn: Sequence[np.ndarray]) -> np.ndarray:
        per_set = []
        for one, other in zip(np.moveaxis(drawn[0], 1, 0), np.moveaxis(drawn[1], 1, 0), strict=True):
            difference = one[:, :, None] - other[:, None, :]
            per_set.append(((difference > 0) + 0.5 * (difference == 0)).mean((1, 2)))
        return np.asarray(np.mean(per_set, 0))

    return _stratified([first, second], wins, float(wins([first[None], second[None]])[0]), level, draws, seed)


def _stratified(
    groups: Sequence[np.ndarray],
    statistic: Callable[[Sequence[np.ndarray]], np.ndarray],
    point: float,
    level: float,
    draws: int,
    seed: int,
) -> Interval:
    """Percentile interval of statistic(groups), the seeds of each data set of each group (D, S) drawn with replacement."""
    count = len(groups[0])
    if min(group.shape[1] for group in groups) < LEAST_FOR_INTERVAL:
        return Interval(point, None, None, count)
    generator = np.random.default_rng(seed)
    drawn = [
        np.take_along_axis(group[None], generator.integers(0, group.shape[1], (draws, *group.shape)), axis=2)
        for group in groups
    ]
    return _percentiles(point, statistic(drawn), level, count)


def _percentiles(point: float, drawn: np.ndarray, level: float, n: int) -> Interval:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(point, float(low), float(high), n)


def _datasets(scores: Any) -> np.ndarray:
    array = np.asarray(scores, dtype=float)
    if array.ndim != 2 or not array.size or not np.isfinite(array).all():
        raise HarnessError(f"scores over data sets must be (data sets, seeds) and finite, not of shape {array.shape}")
    if len(array) < LEAST_DATASETS:
        raise HarnessError(
            f"{len(array)} data sets: what is averaged over data sets needs at least {LEAST_DATASETS} independent ones"
        )
    return array


__all__ = [
    "Interval", "Paired", "detectable_effect", "equivalence", "hierarchical_bootstrap", "holm", "interquartile_mean",
    "mcnemar", "paired", "paired_test_set_interval", "probability_of_improvement", "sign_flip", "t_interval",
]  # fmt: skip
