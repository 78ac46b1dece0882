"""Statistics against closed forms, enumeration, scipy and simulation."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from harness import statistics
from harness.contracts import HarnessError

DRAWS = 10_000
SAMPLE = np.array([0.012, 0.031, -0.004, 0.018, 0.022, 0.009, 0.027])

# ------------------------------------------------------------------------------------------------------------ t and Holm


@pytest.mark.parametrize("n", [3, 5, 10])
def test_t_intervals_cover(n: int) -> None:
    values = np.random.default_rng(n).normal(0.02, 0.01, (DRAWS, n))
    covered = 0
    for row in values:
        interval = statistics.t_interval(row)
        assert interval.low is not None and interval.high is not None
        covered += interval.low <= 0.02 <= interval.high
    assert 0.943 < covered / DRAWS < 0.957  # 3.2 standard errors; the protocol asks for 0.93 to 0.97


def test_t_interval_against_scipy() -> None:
    for level in (0.9, 0.95):
        low, high = stats.t.interval(level, len(SAMPLE) - 1, SAMPLE.mean(), stats.sem(SAMPLE))
        assert statistics.t_interval(SAMPLE, level) == statistics.Interval(
            pytest.approx(SAMPLE.mean()), pytest.approx(low), pytest.approx(high), 7
        )


def test_below_three_values_there_is_no_interval() -> None:
    assert statistics.t_interval([0.5]) == statistics.Interval(0.5, None, None, 1)
    assert statistics.t_interval([0.5, 0.7]) == statistics.Interval(pytest.approx(0.6), None, None, 2)


@pytest.mark.parametrize("values", [[], [[0.1, 0.2]], [0.1, float("nan"), 0.2], [float("inf")] * 4])
def test_what_is_not_a_row_of_numbers_is_refused(values: list[float]) -> None:
    for function in (statistics.t_interval, statistics.paired, statistics.sign_flip):
        with pytest.raises(HarnessError, match="finite numbers"):
            function(values)


def test_holm_by_hand() -> None:
    # sorted 0.01 * 4, 0.02 * 3, 0.03 * 2 (kept at 0.06), 0.5 * 1
    assert statistics.holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert statistics.holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert statistics.holm([0.7, 0.9]).tolist() == [1, 1]
    assert statistics.holm([]).shape == (0,)
    for bad in ([0.1, float("nan")], [1.1], [-0.1]):
        with pytest.raises(HarnessError, match="between 0 and 1"):
            statistics.holm(bad)


def test_holm_rejects_what_the_step_down_test_rejects() -> None:
    generator = np.random.default_rng(0)
    for p in generator.random((300, 5)) ** 3:
        rejected, order = set(), np.argsort(p)
        for place, index in enumerate(order):
            if p[index] > 0.05 / (5 - place):
                break
            rejected.add(int(index))
        assert set(np.flatnonzero(statistics.holm(p) <= 0.05)) == rejected


def test_holm_keeps_the_family_at_its_level() -> None:
    p = np.random.default_rng(1).random((DRAWS, 4))
    wrong = np.mean([(statistics.holm(row) <= 0.05).any() for row in p])
    assert 0.043 < wrong < 0.057


# -------------------------------------------------------------------------------------------------------- paired tests


def test_paired_numbers_against_scipy() -> None:
    found = statistics.paired(SAMPLE)
    assert found.p == pytest.approx(stats.ttest_1samp(SAMPLE, 0).pvalue)
    sides = (
        stats.ttest_1samp(SAMPLE, -0.01, alternative="greater"),
        stats.ttest_1samp(SAMPLE, 0.01, alternative="less"),
    )
    assert found.equivalence_p == pytest.approx(max(side.pvalue for side in sides))
    assert (found.low, found.high) == pytest.approx(
        stats.t.interval(0.95, 6, SAMPLE.mean(), SAMPLE.std(ddof=1) / 7**0.5)
    )
    assert found.n == 7 and found.mean == pytest.approx(SAMPLE.mean())


@pytest.mark.parametrize("n", [1, 2, 3, 6, 9])
def test_sign_flips_by_enumeration(n: int) -> None:
    differences = np.random.default_rng(n).normal(0.5, 1, n)
    means = [np.mean(differences * signs) for signs in itertools.product((-1, 1), repeat=n)]
    expected = np.mean(np.abs(means) >= abs(differences.mean()) - 1e-12)
    assert statistics.sign_flip(differences) == (pytest.approx(expected), 2 / 2**n)


def test_sign_flips_against_scipy_and_ties() -> None:
    permuted = stats.permutation_test((SAMPLE,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert statistics.sign_flip(SAMPLE)[0] == pytest.approx(permuted.pvalue)
    # equal tenths have sums that differ by rounding in other orders: all 2 of 2^10 extreme ones must count
    assert statistics.sign_flip([0.1] * 10) == (2 / 2**10, 2 / 2**10)
    assert statistics.sign_flip([0.0] * 4)[0] == 1


def test_many_sign_flips_are_sampled_and_always_the_same() -> None:
    differences = np.random.default_rng(3).normal(0.3, 1, 18)
    p, least = statistics.sign_flip(differences)
    sums = np.zeros(1)
    for value in differences:
        sums = np.concatenate([sums + value, sums - value])
    exact = np.mean(np.abs(sums) >= abs(differences.sum()) - 1e-9)
    assert p == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 2**16) ** 0.5)
    assert statistics.sign_flip(differences) == (p, least)
    assert statistics.sign_flip(np.ones(40)) == (1 / 65_537, 1 / 65_537)  # an honest floor, not 2 / 2^40


def test_equivalence_is_the_90_percent_interval_within_the_margin() -> None:
    generator = np.random.default_rng(4)
    seen = set()
    for _ in range(300):
        sample = generator.normal(generator.normal(0, 0.008), 0.006, 6)
        interval = statistics.t_interval(sample, 0.9)
        assert interval.low is not None and interval.high is not None
        inside = interval.low > -0.01 and interval.high < 0.01
        assert (statistics.equivalence(sample, 0.01) <= 0.05) == inside
        seen.add(inside)
    assert seen == {True, False}


def test_equivalence_is_wrong_in_five_percent_at_the_margin() -> None:
    samples = np.random.default_rng(5).normal(0.01, 0.003, (5000, 6))
    assert np.mean([statistics.equivalence(s, 0.01) <= 0.05 for s in samples]) == pytest.approx(0.05, abs=0.01)


def test_equivalence_needs_a_margin_and_two_values() -> None:
    for values, margin in (([0.1], 0.01), ([0.1, 0.2], 0.0), ([0.1, 0.2], float("nan"))):
        with pytest.raises(HarnessError, match="margin above 0"):
            statistics.equivalence(values, margin)


@pytest.mark.parametrize("n", [3, 6, 10])
def test_a_detectable_difference_is_detected_in_eight_of_ten(n: int) -> None:
    effect = statistics.detectable_effect(0.02, n)
    samples = np.random.default_rng(n).normal(effect, 0.02, (DRAWS, n))
    power = (stats.ttest_1samp(samples, 0, axis=1).pvalue <= 0.05).mean()
    assert power == pytest.approx(0.8, abs=0.013)  # 3.2 standard errors


def test_detectable_differences_of_many_seeds_are_the_normal_ones() -> None:
    normal = (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) / 10_000**0.5
    assert statistics.detectable_effect(1.0, 10_000) == pytest.approx(normal, rel=1e-3)
    assert statistics.detectable_effect(1.0, 6, power=0.9) > statistics.detectable_effect(1.0, 6)
    with pytest.raises(HarnessError, match="two seeds"):
        statistics.detectable_effect(1.0, 1)


# ------------------------------------------------------------------------------------------------------------- verdicts


def spread(mean: float, sd: float, n: int) -> np.ndarray:
    """n values with exactly this mean and standard deviation."""
    base = np.linspace(-1, 1, n)
    return mean + base * sd / base.std(ddof=1)


@pytest.mark.parametrize(
    ("differences", "verdict", "words"),
    [
        ([0.05, 0.06], "no interval", "below 3 seeds no interval"),
        (spread(0.05, 0.001, 3), "no winner", "3 seeds: the interval excludes 0, but below 6 seeds no winner"),
        (spread(-0.05, 0.001, 5), "no winner", "below 6 seeds no winner"),
        (spread(0.05, 0.001, 6), "gain", "the interval excludes 0"),
        (spread(-0.05, 0.001, 6), "loss", "the interval excludes 0"),
        (spread(0.001, 0.003, 6), "equivalent", "exclude a difference of 1 point"),
        (spread(0.005, 0.02, 6), "inconclusive", "detectable with 6 seeds: 2.9 points"),
        (spread(0.005, 0.02, 4), "inconclusive", "the interval includes 0"),
        ([0.0] * 6, "equivalent", "no difference at all"),
        ([0.3 - 0.1] * 3 + [0.2] * 3, "no winner", "they repeat one measurement"),
    ],
)
def test_verdicts(differences: list[float], verdict: str, words: str) -> None:
    found = statistics.paired(differences)
    assert found.verdict == verdict
    assert words in found.reason
    if found.n < 3:
        assert found.low is found.high is found.p is found.detectable is found.equivalence_p is None


def test_no_five_seeds_can_win() -> None:
    for n in range(1, 6):
        for sd in (1e-9, 1e-4, 0.01):
            assert statistics.paired(spread(0.5, sd, n) if n > 1 else [0.5]).verdict in ("no interval", "no winner")


def test_an_invalid_comparison_keeps_its_numbers_and_says_why() -> None:
    found = statistics.paired(spread(0.05, 0.001, 6), invalid="not converged: random_init")
    assert (found.verdict, found.reason) == ("invalid", "not converged: random_init")
    assert found.p is not None and found.low is not None


def test_the_adjusted_p_decides_as_the_adjusted_interval_does() -> None:
    """Holm's k-th smallest p of m is judged at 0.05 / (m - k + 1): the interval at that level excludes 0 or does not."""
    generator = np.random.default_rng(6)
    seen = set()
    for _ in range(200):
        family = generator.normal(generator.normal(0, 0.008, (4, 1)), 0.01, (4, 7))
        p = [statistics.paired(row).p for row in family]
        adjusted = statistics.holm(np.array(p, dtype=float))
        excluded = True
        for place, index in enumerate(np.argsort(np.array(p, dtype=float))):
            interval = statistics.t_interval(family[index], 1 - 0.05 / (4 - place))
            assert interval.low is not None and interval.high is not None
            excluded = excluded and not interval.low <= 0 <= interval.high
            found = statistics.paired(family[index], adjusted_p=float(adjusted[index]))
            assert (found.verdict in ("gain", "loss")) == excluded
            seen.add(found.verdict)
    assert {"gain", "loss", "inconclusive"} <= seen


def test_what_only_the_plain_interval_excludes_is_said_to_be_so() -> None:
    differences = spread(0.02, 0.018, 6)
    assert statistics.paired(differences).verdict == "gain"
    found = statistics.paired(differences, adjusted_p=0.08)
    assert found.verdict == "inconclusive"
    assert found.reason.startswith("the interval excludes 0, the Holm-adjusted one does not (p = 0.08)")


# -------------------------------------------------------------------------------------------------------- over test images


def test_mcnemar_is_the_binomial_test_of_disagreements() -> None:
    a = np.array([True] * 10 + [False] * 3 + [True] * 50 + [False] * 7)
    b = np.array([False] * 10 + [True] * 3 + [True] * 50 + [False] * 7)
    tail = sum(stats.binom.pmf(k, 13, 0.5) for k in range(4))
    assert statistics.mcnemar(a, b) == (10, 3, pytest.approx(2 * tail))
    assert statistics.mcnemar(a, a) == (0, 0, 1.0)
    with pytest.raises(HarnessError, match="same test images"):
        statistics.mcnemar(a, b[:-1])


def test_paired_test_set_interval_by_hand_and_where_runs_agree() -> None:
    a = np.array([True] * 10 + [False] * 3 + [True] * 87)
    b = np.array([False] * 10 + [True] * 3 + [True] * 87)
    p, q = 11 / 102, 4 / 102
    half = 1.959964 * ((p + q - (p - q) ** 2) / 102) ** 0.5
    found = statistics.paired_test_set_interval(a, b)
    assert found == statistics.Interval(
        pytest.approx(0.07), pytest.approx(p - q - half), pytest.approx(p - q + half), 100
    )
    same = statistics.paired_test_set_interval(a, a)
    assert same.low is not None and same.high is not None
    assert same.low == pytest.approx(-same.high) and 0 < same.high < 0.04


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_paired_test_set_intervals_cover(share: float) -> None:
    """Of 500 images, a share is right for a only and half as many for b only."""
    generator = np.random.default_rng(7)
    covered = 0
    for _ in range(1500):
        u = generator.random(500)
        a, b = u < 0.8 + share, (u < 0.8) | (u > 1 - share / 2)
        interval = statistics.paired_test_set_interval(a, b)
        assert interval.low is not None and interval.high is not None
        covered += interval.low <= share / 2 <= interval.high
    assert 0.93 <= covered / 1500 <= 0.98


def nested(generator: np.random.Generator, seeds: int, labels: int, images: int) -> np.ndarray:
    """0/1 with mean one half whose seeds, label draws and images are all random."""
    effect = generator.normal(0, 0.05, (seeds, 1, 1)) + generator.normal(0, 0.03, (seeds, labels, 1))
    hardness = generator.uniform(-0.4, 0.4, images)
    return (generator.random((seeds, labels, images)) < 0.5 + effect + hardness).astype(float)


def test_hierarchical_bootstrap_covers_with_many_seeds() -> None:
    generator = np.random.default_rng(8)
    covered = 0
    for trial in range(200):
        interval = statistics.hierarchical_bootstrap(nested(generator, 20, 2, 100), draws=150, seed=trial)
        assert interval.low is not None and interval.high is not None
        covered += interval.low <= 0.5 <= interval.high
    assert 0.90 <= covered / 200 <= 0.99


def test_hierarchical_bootstrap_of_equal_seeds_is_that_of_the_images() -> None:
    images = (np.random.default_rng(9).random(400) < 0.8).astype(float)
    found = statistics.hierarchical_bootstrap(np.broadcast_to(images, (4, 2, 400)), draws=4000)
    half = 1.96 * images.std() / 20  # not half of it, as if the four seeds had four test sets
    assert found.low is not None and found.high is not None
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)
    assert found.mean == pytest.approx(images.mean()) and found.n == 4


def test_hierarchical_bootstrap_takes_whole_seeds() -> None:
    correct = np.zeros((5, 1, 50))
    correct[0] = 1
    found = statistics.hierarchical_bootstrap(correct, draws=4000)
    low, high = stats.binom.ppf([0.025, 0.975], 5, 0.2) / 5
    assert (found.low, found.high) == pytest.approx((low, high))
    assert statistics.hierarchical_bootstrap(correct[:2]) == statistics.Interval(0.5, None, None, 2)
    assert statistics.hierarchical_bootstrap(correct, draws=100) == statistics.hierarchical_bootstrap(
        correct, draws=100
    )
    with pytest.raises(HarnessError, match="seeds, label draws, images"):
        statistics.hierarchical_bootstrap(correct[0])


# --------------------------------------------------------------------------------------------------------- over data sets


def test_interquartile_mean_by_hand() -> None:
    scores = np.arange(24.0).reshape(6, 4)
    assert statistics.interquartile_mean(scores).mean == np.mean(range(6, 18))
    outlier = scores.copy()
    outlier[5, 3] = 1e6
    assert statistics.interquartile_mean(outlier).mean == statistics.interquartile_mean(scores).mean


def test_probability_of_improvement_by_counting() -> None:
    generator = np.random.default_rng(10)
    a, b = generator.integers(0, 6, (5, 4)), generator.integers(0, 6, (5, 3))
    wins = [np.mean([(x > y) + 0.5 * (x == y) for x in one for y in two]) for one, two in zip(a, b, strict=True)]
    u = [stats.mannwhitneyu(one, two).statistic / 12 for one, two in zip(a, b, strict=True)]
    found = statistics.probability_of_improvement(a, b)
    assert found.mean == pytest.approx(np.mean(wins)) == pytest.approx(np.mean(u))
    assert found.low is not None and found.high is not None and found.low < found.mean < found.high
    assert statistics.probability_of_improvement(a + 10, b) == statistics.Interval(1, 1, 1, 5)


@pytest.mark.parametrize("truth", ["interquartile mean", "probability of improvement"])
def test_stratified_intervals_cover_with_many_seeds(truth: str) -> None:
    generator = np.random.default_rng(11)
    covered = 0
    for trial in range(200):
        a, b = generator.normal(0, 1, (2, 6, 20))
        if truth == "interquartile mean":
            interval, expected = statistics.interquartile_mean(a, draws=150, seed=trial), 0.0
        else:
            interval, expected = statistics.probability_of_improvement(a, b, draws=150, seed=trial), 0.5
        assert interval.low is not None and interval.high is not None
        covered += interval.low <= expected <= interval.high
    assert 0.9 <= covered / 200 <= 0.99


@pytest.mark.parametrize(
    "function", [statistics.interquartile_mean, lambda scores: statistics.probability_of_improvement(scores, scores)]
)
def test_what_is_averaged_over_data_sets_needs_five(function: Callable[[np.ndarray], statistics.Interval]) -> None:
    with pytest.raises(HarnessError, match=r"4 data sets: .* at least 5 independent ones"):
        function(np.zeros((4, 10)))
    with pytest.raises(HarnessError, match="data sets, seeds"):
        function(np.zeros(10))
    few = function(np.random.default_rng(0).random((5, 2)))
    assert few.low is few.high is None


def test_other_data_sets_are_refused() -> None:
    with pytest.raises(HarnessError, match="same data sets"):
        statistics.probability_of_improvement(np.zeros((5, 3)), np.zeros((6, 3)))
