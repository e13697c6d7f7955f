"""The statistics of a study: coverage and error rates on simulated studies, closed forms, and textbook examples."""

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, kendalltau

from istanas import statistics as s
from istanas.errors import ConfigError

STUDIES = 200
# A correct 95 % interval covers in a binomial number of 200 studies. Counts outside of these bounds would occur in one
# of 1,000 test runs, if the studies were not the same in every run.
FEWEST, MOST = binom.ppf([0.0005, 0.9995], STUDIES, 0.95)


def covered(study: Callable[[np.random.Generator], s.Interval], truth: float) -> int:
    generators = np.random.default_rng(3).spawn(STUDIES)
    return sum(i.low <= truth <= i.high for i in map(study, generators))


@pytest.mark.parametrize("n", [2, 3, 5, 8, 20])
def test_the_interval_of_a_mean_covers_in_95_percent_of_the_studies(n: int) -> None:
    count = covered(lambda rng: s.mean_interval(rng.normal(70, 5, n)), 70)
    assert FEWEST <= count <= MOST


def test_a_plain_percentile_interval_of_five_seeds_would_not_cover() -> None:
    """The reason why fewer than 8 values have Student's interval."""

    def study(rng: np.random.Generator) -> s.Interval:
        x = rng.normal(70, 5, 5)
        low, high = np.quantile(x[rng.integers(5, size=(2000, 5))].mean(1), [0.025, 0.975])
        return s.Interval(x.mean(), low, high, 5, "percentile")

    assert covered(study, 70) < FEWEST


@pytest.mark.parametrize(("n", "m", "paired"), [(3, 3, True), (10, 10, True), (3, 5, False), (10, 14, False)])
def test_the_interval_of_a_difference_covers_in_95_percent_of_the_studies(
    n: int, m: int, paired: bool
) -> None:
    def study(rng: np.random.Generator) -> s.Interval:
        seed_effects = rng.normal(0, 10, n) if paired else 0.0
        return s.difference_interval(
            rng.normal(3, 1, n) + seed_effects, rng.normal(1, 2, m) + seed_effects, paired=paired
        )

    assert FEWEST <= covered(study, 2) <= MOST


def test_pairs_remove_what_both_methods_share_from_the_interval() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 10, 10)
    x, y = shared + rng.normal(1, 0.1, 10), shared + rng.normal(0, 0.1, 10)
    paired, independent = (s.difference_interval(x, y, paired=p) for p in (True, False))
    assert paired.estimate == pytest.approx(independent.estimate)
    assert paired.high - paired.low < (independent.high - independent.low) / 20
    assert s.permutation_p_value(x, y) < 0.01 < s.permutation_p_value(x, y, paired=False)


def test_the_ends_stay_within_the_possible_range() -> None:
    free, ranks = s.mean_interval([1, 500, 9000]), s.mean_interval([1, 500, 9000], low=1, high=15_625)
    assert free.low < 0
    assert free.high > 15_625
    assert (ranks.low, ranks.high, ranks.estimate) == (1, 15_625, free.estimate)


@pytest.mark.parametrize("values", [[90.5] * 2, [90.5] * 12])
def test_equal_values_have_an_interval_of_width_zero(values: list[float]) -> None:
    found = s.mean_interval(values)
    assert (found.low, found.estimate, found.high) == (90.5, 90.5, 90.5)


def test_the_sign_flip_test_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.5, 1, 7), rng.normal(0, 1, 7)
    differences = x - y
    means = [np.mean(np.array(signs) * differences) for signs in itertools.product((-1, 1), repeat=len(x))]
    expected = np.mean([abs(mean) >= abs(differences.mean()) - 1e-12 for mean in means])
    assert s.permutation_p_value(x, y) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("x", "y", "p"),
    [
        ([1, 2], [0, 0], 0.5),
        ([1, 2, 3], [0, 0, 0], 0.25),
        ([5] * 5, [4] * 5, 2 / 32),
        ([5] * 6, [4] * 6, 2 / 64),
        ([1, 2, 3], [1, 2, 3], 1),
        ([1, -1], [0, 0], 1),
    ],
)
def test_few_pairs_have_exact_p_values(x: list[float], y: list[float], p: float) -> None:
    assert s.permutation_p_value(x, y) == pytest.approx(p)
    assert p >= s.smallest_p_value(len(x))


def test_many_pairs_are_tested_with_random_sign_flips() -> None:
    x = np.arange(1.0, 31)
    assert s.permutation_p_value(x, np.zeros(30)) == pytest.approx(2 / 4001, rel=0.01)
    assert s.smallest_p_value(30) == 2 / 4001


@pytest.mark.parametrize(("n", "paired"), [(7, True), (5, False)])
def test_equal_methods_are_found_different_no_more_often_than_alpha(n: int, paired: bool) -> None:
    """Of 400 studies, at most 32 is what a test with an error rate of 0.05 does in 99.5 % of all cases."""
    generators = np.random.default_rng(11).spawn(400)
    found = [
        s.compare({"a": rng.normal(0, 1, n), "b": rng.normal(0, 1, n)}, paired=paired)[0].found
        for rng in generators
    ]
    assert 0 < sum(found) <= binom.ppf(0.995, 400, 0.05)


def test_three_equal_methods_differ_no_more_often_than_alpha_with_holm() -> None:
    generators = np.random.default_rng(12).spawn(200)
    studies = [s.compare({name: rng.normal(0, 1, 8) for name in "abc"}) for rng in generators]
    corrected = sum(any(c.found for c in study) for study in studies)
    uncorrected = sum(any(c.p_value <= 0.05 for c in study) for study in studies)
    assert corrected <= binom.ppf(0.995, 200, 0.05) < uncorrected


def test_a_method_that_is_better_by_construction_is_found_better() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(80, 3, 8)
    samples = {
        "good": difficulty + 2 + rng.normal(0, 0.5, 8),
        "plain": difficulty + rng.normal(0, 0.5, 8),
        "equal": difficulty + rng.normal(0, 0.5, 8),
    }
    better, also_better, equal = s.compare(samples)
    assert [c.found for c in (better, also_better, equal)] == [True, True, False]
    assert better.difference.low > 1
    text = s.describe_comparison(better, unit="points of accuracy")
    assert text.startswith("good is better than plain by 1.46 ")
    assert "points of accuracy (95 % interval" in text
    assert "corrected for 3 comparisons" in text
    assert s.describe_comparison(equal).startswith("No difference between")


def test_the_better_method_is_named_in_both_orders_and_directions() -> None:
    low, high = [1.0, 2, 3, 4, 5, 6], [11.0, 12, 13, 14, 15, 16]
    for samples in ({"low": low, "high": high}, {"high": high, "low": low}):
        [comparison] = s.compare(samples)
        accuracy = s.describe_comparison(comparison)
        rank = s.describe_comparison(comparison, unit="ranks", higher_is_better=False)
        assert accuracy.startswith(
            "high is better than low by 10 points (95 % interval 10 to 10, p = 0.031, "
        )
        assert rank.startswith("low is better than high by 10 ranks (95 % interval 10 to 10, p = 0.031, ")
        assert "effect size 4.93, 6 seeds" in accuracy


@pytest.mark.parametrize(
    ("paired", "pairs", "fewest"), [(True, 1, 6), (True, 3, 7), (False, 1, 4), (False, 3, 5)]
)
def test_too_few_seeds_to_find_anything_are_reported(paired: bool, pairs: int, fewest: int) -> None:
    samples = {f"m{number}": [100.0 * number, 100.0 * number + 1] for number in range(3)}
    chosen = list(itertools.combinations(samples, 2))[:pairs]
    comparison = s.compare(samples, chosen, paired=paired)[0]
    assert (comparison.found, comparison.detectable) == (False, None)
    text = s.describe_comparison(comparison)
    assert f"With 2 seeds, this test cannot find any difference; at least {fewest} are required." in text
    other = None if paired else fewest
    assert s.smallest_p_value(fewest, other) <= 0.05 / pairs
    assert s.smallest_p_value(fewest - 1, None if paired else fewest - 1) > 0.05 / pairs


def test_what_would_go_unnoticed_is_in_the_sentence() -> None:
    rng = np.random.default_rng(1)
    [comparison] = s.compare({"a": rng.normal(0, 1, 8), "b": rng.normal(0, 1, 8)})
    assert comparison.detectable is not None
    text = s.describe_comparison(comparison)
    assert f"With 8 seeds, differences below {comparison.detectable:.3g} points would go unnoticed" in text
    [same] = s.compare({"a": [1.0] * 6, "b": [1.0] * 6})
    assert (same.p_value, same.effect_size, same.detectable) == (1, None, 0)
    assert "the means are equal" in s.describe_comparison(same)
    assert "With 6 seeds, all values are equal." in s.describe_comparison(same)


@pytest.mark.parametrize(("n", "m"), [(6, None), (7, None), (9, None), (12, None), (4, 4), (4, 5)])
def test_the_detectable_difference_is_found_in_80_percent_of_the_studies(n: int, m: int | None) -> None:
    """The bounds are those of the permutation test's power relative to the t-test's, and of 500 studies."""
    difference = s.detectable_difference(2.0, n, m)
    assert difference is not None
    p_values = [
        s.permutation_p_value(rng.normal(difference, 2, n), np.zeros(n))
        if m is None
        else s.permutation_p_value(rng.normal(difference, 2, n), rng.normal(0, 2, m), paired=False)
        for rng in np.random.default_rng(0).spawn(500)
    ]
    assert 0.73 <= np.mean(np.array(p_values) <= 0.05) <= 0.87


def test_holm_on_a_textbook_example() -> None:
    """p = 0.01, 0.04, 0.03, 0.005: only the two smallest remain below 0.05 (Wikipedia, "Holm-Bonferroni method")."""
    assert s.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert s.holm([]) == []
    assert s.holm([0.5, 0.5, 0.9]) == [1, 1, 1]


def test_hedges_g_is_unbiased_for_three_seeds() -> None:
    """The mean over many studies is the true effect; without the small-sample factor it is a quarter larger."""
    rng = np.random.default_rng(0)
    effects = [s.hedges_g(rng.normal(1, 1, 3), rng.normal(0, 1, 3)) or 0 for _ in range(20_000)]
    assert np.mean(effects) == pytest.approx(1, abs=0.03)
    assert np.mean(effects) / (1 - 3 / 15) > 1.2


def test_kendall_and_spearman_equal_scipy_on_the_pairs_and_resamples() -> None:
    from scipy.stats import kendalltau, spearmanr

    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, 25).astype(float)  # with ties
    y = x + rng.integers(0, 5, 25)
    tau, rho = s.kendall(x, y), s.spearman(x, y)
    assert tau.estimate == kendalltau(x, y).statistic
    assert rho.estimate == pytest.approx(spearmanr(x, y).statistic)
    chosen = rng.integers(25, size=(600, 25))
    expected = np.quantile([kendalltau(x[i], y[i]).statistic for i in chosen], [0.025, 0.975])
    assert [tau.low, tau.high] == pytest.approx(expected, abs=0.05)
    expected = np.quantile([spearmanr(x[i], y[i]).statistic for i in chosen], [0.025, 0.975])
    assert [rho.low, rho.high] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("correlation", "truth"),
    [
        (s.kendall, 2 / math.pi * math.asin(0.6)),
        (s.spearman, 6 / math.pi * math.asin(0.3)),
    ],
)
def test_intervals_of_rank_correlations_cover(correlation: Any, truth: float) -> None:
    """Normal values with a correlation of 0.6 have these rank correlations. Resamples have ties, so that the interval
    is a little too wide: only too narrow ones fail."""

    def study(rng: np.random.Generator) -> s.Interval:
        x, noise = rng.normal(size=(2, 12))
        interval: s.Interval = correlation(x, 0.6 * x + 0.8 * noise)
        return interval

    assert covered(study, truth) >= FEWEST


def test_information_of_a_tau_is_that_of_two_normal_variables() -> None:
    """With a correlation of 0.6, from draws: tau, and the information as the difference of two entropies."""
    rho = 0.6
    x, noise = np.random.default_rng(0).normal(size=(2, 4000))
    y = rho * x + np.sqrt(1 - rho**2) * noise
    entropy_of_y, entropy_of_y_given_x = (0.5 * np.log(2 * np.pi * np.e * v) for v in (1.0, 1 - rho**2))
    tau = float(kendalltau(x, y).statistic)
    assert s.information_of_tau(tau) == pytest.approx(entropy_of_y - entropy_of_y_given_x, abs=0.02)
    assert s.information_of_tau(-0.5) == s.information_of_tau(0.0) == 0.0
    assert s.information_of_tau(1.0) == np.inf
    with pytest.raises(ConfigError, match=r"1\.5 is not in -1\.\.1"):
        s.information_of_tau(1.5)


def test_precision_at_the_top() -> None:
    truth = np.arange(20.0)
    assert s.precision_at_top(truth, truth, 5) == 1
    assert s.precision_at_top(-truth, truth, 5) == 0
    assert s.precision_at_top(np.zeros(20), truth, 5) == pytest.approx(5 / 20)
    swapped = truth.copy()
    swapped[[14, 15]] = swapped[[15, 14]]
    assert s.precision_at_top(swapped, truth, 5) == pytest.approx(4 / 5)
    # Two equal predictions compete for the last place, and one of them is among the best.
    assert s.precision_at_top([4, 3, 3, 0], [4, 3, 2, 1], 2) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: s.mean_interval([1.0]),
            "values: 1 given, the statistic requires at least 2; use more seeds or architectures",
        ),
        (
            lambda: s.mean_interval([1.0, math.nan], name="rank"),
            "rank: value 2 of 2 is nan, not a finite number; leave out runs without a result",
        ),
        (
            lambda: s.permutation_p_value([1, 2, math.inf], [1, 2, 3]),
            "first sample: value 3 of 3 is inf, not a finite number; leave out runs without a result",
        ),
        (
            lambda: s.difference_interval([1, 2, 3], [1, 2]),
            "samples: the samples have 3 and 2 values, but belong together; give both the same seeds",
        ),
        (
            lambda: s.compare({"a": [1.0, 2.0], "b": [1.0, math.nan]}),
            "b: value 2 of 2 is nan, not a finite number; leave out runs without a result",
        ),
        (
            lambda: s.kendall([1, 1, 1, 1], [1, 2, 3, 4]),
            "x: all 4 values are 1, which have no order; leave out a figure that does not differ",
        ),
        (
            lambda: s.spearman([1, 2, 3], [1, 2, 3]),
            "x: 3 given, the statistic requires at least 4; use more seeds or architectures",
        ),
        (
            lambda: s.precision_at_top([1, 2], [1, 2], 3),
            "k: 3 is not in 1..2; use the number of the best to compare",
        ),
        (lambda: s.holm([0.1, math.nan]), "p-values: [0.1, nan] are not all in 0..1"),
    ],
)
def test_bad_input_is_one_clear_line(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        call()
    assert str(error.value) == message


def test_equal_input_gives_equal_statistics() -> None:
    values = np.random.default_rng(0).normal(size=(2, 15))
    assert s.compare({"a": values[0], "b": values[1]}) == s.compare({"a": values[0], "b": values[1]})


def test_the_module_needs_no_torch() -> None:
    code = "import sys; import istanas.statistics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_too_many_comparisons_are_said_to_find_nothing() -> None:
    """With 105 comparisons, no p-value of 4,000 permutations is below Holm's first level."""
    rng = np.random.default_rng(0)
    values = {f"method {k}": rng.normal(size=4).tolist() for k in range(15)}
    comparisons = s.compare(values)
    assert len(comparisons) == 105
    assert "this test cannot find any difference among 105 comparisons." in s.describe_comparison(
        comparisons[0]
    )


def test_wilson_interval_is_its_closed_form() -> None:
    for successes, n in ((0, 5), (3, 7), (355, 359), (20, 20)):
        z, p = 1.959963984540054, successes / n
        centre = p + z**2 / (2 * n)
        half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        found = s.wilson_interval(successes, n)
        assert found.low == pytest.approx((centre - half) / (1 + z**2 / n), abs=1e-9)
        assert found.high == pytest.approx((centre + half) / (1 + z**2 / n), abs=1e-9)
    with pytest.raises(ConfigError, match="3 of 2 is no proportion"):
        s.wilson_interval(3, 2)
    with pytest.raises(ConfigError, match="0 of 0 is no proportion"):
        s.wilson_interval(0, 0)


def test_calibration_error_of_known_bins() -> None:
    """Two bins of ten: one with 3 of 4 correct at 0.95, one with 1 of 2 at 0.4; certain and right costs nothing."""
    confidences = [0.95] * 4 + [0.4] * 2
    correct = [True, True, True, False, True, False]
    expected = 4 / 6 * (0.95 - 0.75) + 2 / 6 * (0.5 - 0.4)
    assert s.expected_calibration_error(confidences, correct, bins=10) == pytest.approx(expected)
    assert s.expected_calibration_error([1.0, 0.0], [True, False]) == 0
    with pytest.raises(ConfigError, match="no probabilities"):
        s.expected_calibration_error([1.5], [True])
