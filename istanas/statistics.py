"""The statistics of a study with several seeds: intervals, tests, effect sizes and rank correlations.

A study compares methods by one value per seed. With few seeds, the usual formulas need care, and each function says
what it does then. Every resampling uses a fixed seed, so that the same values always have the same statistics.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from istanas.errors import ConfigError

CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE
POWER = 0.8
RESAMPLES = 4000
FEWEST_FOR_BOOTSTRAP = 8
"""With n values, a percentile interval of the mean lies between the smallest and the largest value. All values lie on
the same side of the median with a probability of 2^(1 - n). Such an interval therefore cannot cover in 95 % of all
studies if n < 6, and does so only approximately if n is just above."""

Values = NDArray[np.float64]
Resample = Callable[[np.random.Generator], Values]


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    Args:
        estimate: The estimate.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Number of values, or of pairs of values; the smaller number for two independent samples.
        method: "bootstrap", "student" if there are too few values for a bootstrap, or "wilson" for a proportion.
        confidence: The fraction of all studies whose interval contains the true value, in (0, 1).

    Example:
        >>> str(Interval(1.5, 1.0, 2.25, n=8, method="bootstrap"))
        '1.5 (95 % interval 1 to 2.25)'
    """

    estimate: float
    low: float
    high: float
    n: int
    method: str
    confidence: float = CONFIDENCE

    def __str__(self) -> str:
        return f"{_shown(self.estimate)} ({self.range})"

    @property
    def range(self) -> str:
        """The ends in words."""
        return f"{100 * self.confidence:.3g} % interval {_shown(self.low)} to {_shown(self.high)}"


@dataclass(frozen=True)
class Comparison:
    """The comparison of two methods by the values of their seeds.

    Args:
        first: Name of the first method.
        second: Name of the second method.
        difference: Mean of the first minus mean of the second, with its interval.
        p_value: Probability of a difference at least as large if the methods are equal, by a permutation test.
        adjusted_p: `p_value` after Holm's correction over all comparisons that were made.
        smallest_p: The smallest p-value that the test can return with this number of seeds.
        effect_size: Hedges' g, see `hedges_g`; None if it is undefined.
        detectable: The smallest difference that is found with a probability of 0.8, see `detectable_difference`; None
            if no difference can be found with this number of seeds.
        comparisons: Number of comparisons over which `adjusted_p` is corrected.
        paired: Whether the values with the same index have the same seed.
        alpha: Highest `adjusted_p` of a difference that is called found, in (0, 1).
    """

    first: str
    second: str
    difference: Interval
    p_value: float
    adjusted_p: float
    smallest_p: float
    effect_size: float | None
    detectable: float | None
    comparisons: int = 1
    paired: bool = True
    alpha: float = ALPHA

    @property
    def found(self) -> bool:
        """Return whether a difference was found."""
        return self.adjusted_p <= self.alpha


def mean_interval(
    values: ArrayLike,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    confidence: float = CONFIDENCE,
    name: str = "values",
) -> Interval:
    """Return the mean of a sample with its interval.

    With n >= 8 values, the interval is that of the bootstrap: the quantiles at q and 1 - q of the means of 4,000
    resamples. With q = alpha / 2, it would be too narrow for small samples; therefore, with the quantile t of Student's
    distribution at 1 - alpha / 2 with n - 1 degrees of freedom,

        q = Phi(-t sqrt(n / (n - 1))).

    With fewer values, no bootstrap interval covers (see `FEWEST_FOR_BOOTSTRAP`), and the interval is Student's:
    mean +- t s / sqrt(n). Values with a skewed distribution are covered less often: in about 90 % of all studies for
    values with an exponential distribution.

    Args:
        values: Shape (n,), n >= 2, finite.
        low: The smallest possible mean: the interval ends there.
        high: The largest possible mean.
        confidence: In (0, 1).
        name: What the values are, for an error message.

    Returns:
        The interval. Equal values have an interval of width 0.

    Raises:
        ConfigError: If there are fewer than 2 values, or a value is not finite.

    Example:
        >>> print(mean_interval([90.0, 91.0, 92.0]))
        91 (95 % interval 88.5 to 93.5)

    Source:
        Hesterberg, What teachers should know about the bootstrap, The American Statistician 69, 2015 (the expanded
        percentile interval).
    """
    x = _checked(values, name, 2)
    n = len(x)

    def means(rng: np.random.Generator) -> Values:
        return _means(x, rng)

    return _interval(x.mean(), x.std(ddof=1) / math.sqrt(n), n - 1, n, means, low, high, confidence)


def difference_interval(
    first: ArrayLike, second: ArrayLike, *, paired: bool = True, confidence: float = CONFIDENCE
) -> Interval:
    """Return the difference of two means, first - second, with its interval.

    Args:
        first: Shape (n,), n >= 2, finite.
        second: Shape (n,) if paired, or else (m,), m >= 2; finite.
        paired: Whether values with the same index have the same seed. The interval is then that of the mean of their
            differences (`mean_interval`). Otherwise, both samples are resampled; with fewer than 8 values in one of
            them, the interval is Welch's.
        confidence: In (0, 1).

    Raises:
        ConfigError: If there are too few values, a value is not finite, or the lengths of paired samples differ.

    Example:
        >>> print(difference_interval([3.0, 5.0, 7.0], [2.0, 3.0, 4.0]))
        2 (95 % interval -0.484 to 4.48)

    Source:
        Welch, The generalization of Student's problem, Biometrika 34, 1947.
    """
    x, y = _checked_two(first, second, paired)
    if paired:
        return mean_interval(x - y, confidence=confidence)
    n, m = len(x), len(y)
    errors = np.array([x.var(ddof=1) / n, y.var(ddof=1) / m])
    square = errors.sum()
    df = n + m - 2.0 if square == 0 else square**2 / (errors**2 / np.array([n - 1, m - 1])).sum()

    def differences(rng: np.random.Generator) -> Values:
        return _means(x, rng) - _means(y, rng)

    return _interval(
        x.mean() - y.mean(),
        math.sqrt(square),
        df,
        min(n, m),
        differences,
        -math.inf,
        math.inf,
        confidence,
    )


def permutation_p_value(first: ArrayLike, second: ArrayLike, *, paired: bool = True) -> float:
    """Return the two-sided p-value of the difference of two means, by a permutation test.

    If two methods are equal, the two values of a seed can be swapped (paired: the sign of each difference can be
    flipped), or any value can belong to any method (not paired). The p-value is twice the smaller of two fractions, at
    most 1: of the permutations whose difference is at least, and at most, the observed one. All permutations are
    computed if there are at most 4,000, which makes the test exact (up to 11 pairs); otherwise, 4,000 random ones are
    used, and the observed one is counted with them.

    Args:
        first: Shape (n,), n >= 2, finite.
        second: Shape (n,) if paired, or else (m,), m >= 2; finite.
        paired: Whether values with the same index have the same seed.

    Returns:
        In (0, 1]; never below `smallest_p_value`.

    Raises:
        ConfigError: If there are too few values, a value is not finite, or the lengths of paired samples differ.

    Example:
        >>> permutation_p_value([1.0, 2.0, 3.0], [0.5, 1.0, 2.5])
        0.25

    Source:
        Fisher, The Design of Experiments, 1935, section 21.
    """
    from scipy.stats import permutation_test

    x, y = _checked_two(first, second, paired)
    result = permutation_test(
        (x, y),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        permutation_type="samples" if paired else "independent",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def smallest_p_value(n: int, m: int | None = None) -> float:
    """Return the smallest p-value that `permutation_p_value` can return: 2 divided by the number of permutations.

    Args:
        n: Number of pairs, or of values of the first sample, >= 1.
        m: Number of values of the second sample; None if paired.

    Example:
        >>> smallest_p_value(5), smallest_p_value(6), round(smallest_p_value(3, 3), 3)
        (0.0625, 0.03125, 0.1)
    """
    permutations = 2**n if m is None else math.comb(n + m, n)
    return min(1.0, 2 / min(permutations, RESAMPLES + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values with Holm's correction for several comparisons, in the given order.

    The i-th smallest of k p-values becomes max over j <= i of min(1, (k - j + 1) p_(j)), where p_(j) is the j-th
    smallest. If all differences with a corrected p-value of at most alpha are called found, the probability that any of
    them is false is at most alpha.

    Args:
        p_values: k values in [0, 1].

    Raises:
        ConfigError: If a value is outside 0..1 or not a number.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03, 0.005])]
        [0.03, 0.06, 0.06, 0.02]

    Source:
        Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979.
    """
    p = np.asarray(p_values, dtype=float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ConfigError(f"{list(p_values)} are not all in 0..1", field="p-values")
    order = p.argsort(kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1, (len(p) - np.arange(len(p))) * p[order]))
    return [float(each) for each in adjusted]


def hedges_g(first: ArrayLike, second: ArrayLike) -> float | None:
    """Return the effect size of a difference of means: Hedges' g.

        g = (1 - 3 / (4 (n + m) - 9)) (mean(x) - mean(y)) / s,    s^2 = ((n - 1) s_x^2 + (m - 1) s_y^2) / (n + m - 2)

    It is used for paired values, too. The alternative, the mean of the differences over their deviation, grows with the
    correlation within the pairs, so that it cannot be compared with studies without pairs; and without the first
    factor (Cohen's d), three seeds per method overestimate the effect by a quarter.

    Args:
        first: Shape (n,), n >= 2, finite.
        second: Shape (m,), m >= 2, finite.

    Returns:
        The effect size; None if no value differs from the mean of its sample.

    Raises:
        ConfigError: If there are fewer than 2 values, or a value is not finite.

    Example:
        >>> round(hedges_g([3.0, 4.0, 5.0], [1.0, 2.0, 3.0]), 6)
        1.6

    Source:
        Hedges, Distribution theory for Glass's estimator of effect size, Journal of Educational Statistics 6, 1981.
    """
    x, y = _checked_two(first, second, paired=False)
    pooled, n = _pooled_deviation(x, y), len(x) + len(y)
    if pooled == 0:
        return None
    return float((1 - 3 / (4 * n - 9)) * (x.mean() - y.mean()) / pooled)


def detectable_difference(
    deviation: float, n: int, m: int | None = None, *, alpha: float = ALPHA, power: float = POWER
) -> float | None:
    """Return the smallest true difference of means that a test at level alpha finds with a given probability.

    The power is that of the t-test, to which the permutation test is close: the difference is e d, with the smallest d
    such that

        P(T > t) = power,    T ~ noncentral t with df degrees of freedom and noncentrality d,

    with the quantile t of Student's distribution at 1 - alpha / 2, and with e = s / sqrt(n) and df = n - 1 (paired), or
    e = s sqrt(1 / n + 1 / m) and df = n + m - 2. With so few seeds that only the most extreme permutation has a p-value
    of at most alpha, the difference is at least the one at which this permutation has the probability `power`: s
    Phi^-1(power^(1 / n)), at which all n differences have the same sign, or the difference at which all values of one
    sample are above all of the other.

    Args:
        deviation: Standard deviation of the differences (paired) or of the values, s >= 0.
        n: Number of pairs, or of values of the first sample, >= 2.
        m: Number of values of the second sample; None if paired.
        alpha: Level of the test, in (0, 1).
        power: Probability, in (0, 1).

    Returns:
        The difference, >= 0; None if the smallest p-value is above alpha, so that no difference can be found.

    Example:
        >>> detectable_difference(1.0, 5)  # 5 pairs cannot have a p-value below 0.0625
        >>> round(detectable_difference(1.0, 6), 2), round(detectable_difference(1.0, 20), 2)
        (1.79, 0.66)

    Source:
        Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988, section 2.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    smallest = smallest_p_value(n, m)
    if smallest > alpha:
        return None
    df, error = (n - 1, math.sqrt(1 / n)) if m is None else (n + m - 2, math.sqrt(1 / n + 1 / m))
    critical = t.ppf(1 - alpha / 2, df)
    in_deviations = error * brentq(lambda shift: nct.sf(critical, df, shift) - power, 0, critical + 10)
    if 2 * smallest > alpha:
        extreme = brentq(lambda shift: _probability_of_extreme(shift, n, m) - power, 0, 20)
        in_deviations = max(in_deviations, extreme)
    return float(deviation * in_deviations)


def _probability_of_extreme(shift: float, n: int, m: int | None) -> float:
    """Return the probability of the most extreme permutation, with normal values that differ by `shift` deviations."""
    from scipy.integrate import quad
    from scipy.stats import norm

    if m is None:
        return float(norm.cdf(shift) ** n)
    # All n values of one sample are above the largest of the m values of the other, which is integrated over.
    return float(
        quad(
            lambda x: m * norm.pdf(x) * norm.cdf(x) ** (m - 1) * norm.sf(x - shift) ** n, -8, 8, epsabs=1e-6
        )[0]
    )


def compare(
    samples: Mapping[str, Sequence[float]],
    pairs: Sequence[tuple[str, str]] | None = None,
    *,
    paired: bool = True,
    alpha: float = ALPHA,
) -> tuple[Comparison, ...]:
    """Compare methods by the values of their seeds, with Holm's correction over all comparisons.

    Args:
        samples: Name of a method -> its values, one for each seed, at least 2, finite.
        pairs: The names of the methods of each comparison; None compares each method with each later one.
        paired: Whether values with the same index have the same seed.
        alpha: Highest corrected p-value of a difference that is called found, in (0, 1).

    Returns:
        One comparison for each pair, in the given order.

    Raises:
        ConfigError: If a sample has too few values, one that is not finite, or another length than its partner.

    Example:
        >>> values = {"search": [92.1, 92.4, 91.9, 92.3, 92.0, 92.5], "random": [91.0, 91.2, 90.7, 91.1, 91.3, 90.9]}
        >>> [found] = compare(values)
        >>> round(found.difference.estimate, 2), found.p_value, found.found
        (1.17, 0.03125, True)
    """
    chosen = list(itertools.combinations(samples, 2)) if pairs is None else list(pairs)
    arrays = {name: _checked(values, name, 2) for name, values in samples.items()}
    p_values = [permutation_p_value(arrays[a], arrays[b], paired=paired) for a, b in chosen]
    found = []
    for (a, b), p, adjusted in zip(chosen, p_values, holm(p_values), strict=True):
        x, y = arrays[a], arrays[b]
        n, m = len(x), None if paired else len(y)
        deviation = float((x - y).std(ddof=1)) if paired else _pooled_deviation(x, y)
        found.append(
            Comparison(
                first=a,
                second=b,
                difference=difference_interval(x, y, paired=paired, confidence=1 - alpha),
                p_value=p,
                adjusted_p=adjusted,
                smallest_p=smallest_p_value(n, m),
                effect_size=hedges_g(x, y),
                # The first of Holm's tests, which decides whether anything is found, has this level.
                detectable=detectable_difference(deviation, n, m, alpha=alpha / len(chosen)),
                comparisons=len(chosen),
                paired=paired,
                alpha=alpha,
            )
        )
    return tuple(found)


def describe_comparison(
    comparison: Comparison, *, unit: str = "points", higher_is_better: bool = True
) -> str:
    """Return a comparison in words.

    Args:
        comparison: The comparison.
        unit: The unit of the values, in the plural.
        higher_is_better: Whether higher values are better.

    Returns:
        One or two sentences. If no difference was found, the second says which differences could have been found.

    Example:
        >>> values = {"search": [92.1, 92.4, 91.9, 92.3], "random": [92.0, 92.5, 92.2, 92.1]}
        >>> print(describe_comparison(compare(values)[0]))  # doctest: +NORMALIZE_WHITESPACE
        No difference between random and search was found: the mean of random is better by 0.025 points
        (95 % interval -0.328 to 0.378, p = 1, effect size 0.0993, 4 seeds). With 4 seeds, this test cannot find any
        difference; at least 6 are required.
    """
    c = comparison
    d, effect, better, worse = c.difference, c.effect_size, c.first, c.second
    if d.estimate != 0 and (d.estimate > 0) != higher_is_better:
        better, worse = worse, better
    if d.estimate < 0:
        d = replace(d, estimate=-d.estimate, low=-d.high, high=-d.low)
        effect = None if effect is None else -effect
    seeds = f"{d.n} seeds"
    figures = ", ".join(
        [
            d.range,
            f"p = {c.adjusted_p:.2g}"
            + (f" corrected for {c.comparisons} comparisons" if c.comparisons > 1 else ""),
            *([] if effect is None else [f"effect size {effect:.3g}"]),
            seeds,
        ]
    )
    if c.found:
        return f"{better} is better than {worse} by {_shown(d.estimate)} {unit} ({figures})."
    means = (
        "the means are equal"
        if d.estimate == 0
        else f"the mean of {better} is better by {_shown(d.estimate)} {unit}"
    )
    text = f"No difference between {better} and {worse} was found: {means} ({figures})."
    fewest = fewest_seeds(c.comparisons, paired=c.paired, alpha=c.alpha) if c.detectable is None else None
    if c.detectable is None and fewest is None:
        limit = f"this test cannot find any difference among {c.comparisons} comparisons"
    elif c.detectable is None:
        limit = f"this test cannot find any difference; at least {fewest} are required"
    elif c.detectable == 0:
        limit = "all values are equal"
    else:
        limit = f"differences below {_shown(c.detectable)} {unit} would go unnoticed in at least one study out of five"
    return f"{text} With {seeds}, {limit}."


def _shown(value: float) -> str:
    """Return a number with three digits, or without decimals if it is large."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def fewest_seeds(comparisons: int = 1, *, paired: bool = True, alpha: float = ALPHA) -> int | None:
    """Return the fewest seeds of each method with which the first test of Holm's procedure can find a difference.

    Args:
        comparisons: Number of comparisons, >= 1.
        paired: Whether the values of two methods with the same index have the same seed.
        alpha: Highest corrected p-value of a difference that is called found, in (0, 1).

    Returns:
        None if the p-value of 4,000 random permutations is never small enough for so many comparisons.

    Example:
        >>> fewest_seeds(), fewest_seeds(3), fewest_seeds(1000)
        (6, 7, None)
    """
    level = alpha / comparisons
    if level < 2 / (RESAMPLES + 1):
        return None
    return next(n for n in itertools.count(2) if smallest_p_value(n, None if paired else n) <= level)


def kendall(x: ArrayLike, y: ArrayLike, *, confidence: float = CONFIDENCE) -> Interval:
    """Return Kendall's rank correlation tau-b with its bootstrap interval.

        tau_b = sum sign(x_i - x_j) sign(y_i - y_j) / sqrt(sum [x_i != x_j] sum [y_i != y_j]),    sums over i < j

    The interval consists of quantiles of tau-b over 4,000 resamples of the pairs (x, y). With fewer than 6 pairs, it
    covers clearly less often than its confidence says. Resamples in which all x or all y are equal have no correlation
    and are left out.

    Args:
        x: Shape (n,), n >= 4, finite, not all equal.
        y: Shape (n,), finite, not all equal.
        confidence: In (0, 1).

    Returns:
        Estimate and interval in [-1, 1].

    Raises:
        ConfigError: If there are too few values, a value is not finite, all values are equal, or the lengths differ.

    Example:
        >>> round(kendall([1, 2, 3, 4, 5], [1, 2, 3, 5, 4]).estimate, 6)
        0.8

    Source:
        Kendall, The treatment of ties in ranking problems, Biometrika 33, 1945.
    """
    from scipy.stats import kendalltau

    a, b = _checked_ranked(x, y)
    signs = [np.sign(each[:, None] - each) for each in (a, b)]
    products, x_differ, y_differ = signs[0] * signs[1], np.abs(signs[0]), np.abs(signs[1])
    n = len(a)
    # A resample is described by how often it contains each pair. Each sum over its pairs of pairs is a quadratic form.
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)
    sums = [((counts @ matrix) * counts).sum(1) for matrix in (products, x_differ, y_differ)]
    return _correlation(
        kendalltau(a, b).statistic, sums[0], np.sqrt(sums[1]) * np.sqrt(sums[2]), n, confidence
    )


def spearman(x: ArrayLike, y: ArrayLike, *, confidence: float = CONFIDENCE) -> Interval:
    """Return Spearman's rank correlation, the correlation of the ranks of x and y, with its bootstrap interval.

    Equal values have the mean of their ranks. The interval is computed as in `kendall`.

    Args:
        x: Shape (n,), n >= 4, finite, not all equal.
        y: Shape (n,), finite, not all equal.
        confidence: In (0, 1).

    Returns:
        Estimate and interval in [-1, 1].

    Raises:
        ConfigError: If there are too few values, a value is not finite, all values are equal, or the lengths differ.

    Example:
        >>> round(spearman([1, 2, 3, 4, 5], [1, 2, 3, 5, 4]).estimate, 6)
        0.9

    Source:
        Spearman, The proof and measurement of association between two things, American Journal of Psychology 15, 1904.
    """
    from scipy.stats import rankdata, spearmanr

    a, b = _checked_ranked(x, y)
    n = len(a)
    chosen = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    ranks = [rankdata(each[chosen], axis=1) - (n + 1) / 2 for each in (a, b)]
    products, squares = (ranks[0] * ranks[1]).sum(1), [(each**2).sum(1) for each in ranks]
    return _correlation(
        spearmanr(a, b).statistic, products, np.sqrt(squares[0]) * np.sqrt(squares[1]), n, confidence
    )


def precision_at_top(predicted: ArrayLike, true: ArrayLike, k: int) -> float:
    """Return the fraction of the k best by prediction that are among the k best in truth.

    Args:
        predicted: Shape (n,), finite; higher is better.
        true: Shape (n,), finite; higher is better.
        k: In 1..n. Chance is k / n.

    Returns:
        In [0, 1]. Equal values at the border of the k best share the remaining places, so that a constant prediction
        has the precision of chance.

    Raises:
        ConfigError: If k is out of range, a value is not finite, or the lengths differ.

    Example:
        >>> precision_at_top([1, 2, 3, 4], [10, 40, 20, 30], k=2), precision_at_top([0, 0, 0, 0], [1, 2, 3, 4], k=2)
        (0.5, 0.5)
    """
    a, b = _checked(predicted, "predicted values", 1), _checked(true, "true values", 1)
    _check_lengths(a, b)
    if not 1 <= k <= len(a):
        raise ConfigError(
            f"{k} is not in 1..{len(a)}", field="k", remedy="use the number of the best to compare"
        )
    return float((_share_of_top(a, k) * _share_of_top(b, k)).sum() / k)


def wilson_interval(successes: int, n: int, *, confidence: float = CONFIDENCE) -> Interval:
    """Return a proportion with Wilson's interval, which also covers for small n and proportions near 0 or 1.

    With p = successes / n and the quantile z of the normal distribution at (1 + confidence) / 2, its ends are

        (p + z^2 / (2 n) +- z sqrt(p (1 - p) / n + z^2 / (4 n^2))) / (1 + z^2 / n).

    Args:
        successes: In 0..n.
        n: Number of trials, >= 1.
        confidence: In (0, 1).

    Raises:
        ConfigError: If n or the number of successes is out of range.

    Example:
        >>> print(wilson_interval(9, 10))
        0.9 (95 % interval 0.596 to 0.982)

    Source:
        Wilson, Probable inference, the law of succession, and statistical inference, Journal of the American
        Statistical Association 22, 1927.
    """
    from scipy.stats import binomtest

    if not 0 <= successes <= n or n == 0:
        raise ConfigError(
            f"{successes} of {n} is no proportion", field="successes", remedy="use 0..n, n >= 1"
        )
    ends = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Interval(successes / n, float(ends.low), float(ends.high), n, "wilson", confidence)


def expected_calibration_error(confidences: ArrayLike, correct: ArrayLike, *, bins: int = 15) -> float:
    """Return the mean difference between the confidence and the accuracy of predictions.

    The predictions are divided into bins B_k by their confidence, ((k - 1) / bins, k / bins]; the error is

        sum over k of |B_k| / n |accuracy(B_k) - mean confidence(B_k)|.

    Args:
        confidences: Shape (n,), in [0, 1], n >= 1: the probability of each predicted class.
        correct: Shape (n,): whether each prediction is correct.
        bins: Number of bins, >= 1.

    Returns:
        In [0, 1]; 0 if the predictions of each bin are as often correct as they claim.

    Raises:
        ConfigError: If a confidence is not in [0, 1], or the lengths differ.

    Example:
        >>> expected_calibration_error([0.75, 0.75, 0.75, 0.75], [True, True, True, False])
        0.0
        >>> expected_calibration_error([0.5, 1.0], [True, False], bins=2)
        0.75

    Source:
        Guo et al., On calibration of modern neural networks, International Conference on Machine Learning, 2017.
    """
    p, hits = _checked(confidences, "confidences", 1), _checked(np.asarray(correct, float), "correct", 1)
    _check_lengths(p, hits)
    if p.min() < 0 or p.max() > 1:
        raise ConfigError(
            f"{p.min():g}..{p.max():g} are no probabilities", field="confidences", remedy="use 0 to 1"
        )
    places = np.clip(np.ceil(p * bins) - 1, 0, bins - 1).astype(int)
    return float(np.abs(np.bincount(places, weights=hits - p)).sum() / len(p))


def information_of_tau(tau: float) -> float:
    """Return the information, in nats, that a measurement gives about a true value, from their rank correlation.

        rho = sin(pi tau / 2),    I = -1/2 log(1 - rho^2) = -log cos(pi tau / 2)

    This is the mutual information of two normal variables with Kendall's tau. Divided by the seconds of a measurement,
    it compares cheap measurements with expensive ones, because independent measurements add up.

    Args:
        tau: In [-1, 1]. A negative tau counts as 0: nobody would choose by the opposite of a measurement.

    Returns:
        >= 0; infinite for a tau of 1.

    Raises:
        ConfigError: If tau is outside [-1, 1] or NaN.

    Example:
        >>> [round(information_of_tau(tau), 3) for tau in (-0.2, 0.0, 0.5)]
        [0.0, 0.0, 0.347]

    Source:
        Cover, Thomas, Elements of Information Theory, 2006, chapter 8; Kendall, Gibbons, Rank Correlation Methods, 1990
        (the arcsine relation of tau and rho).
    """
    if not -1 <= tau <= 1:
        raise ConfigError(f"{tau} is not in -1..1", field="tau", remedy="use a rank correlation")
    if tau <= 0:
        return 0.0
    return math.inf if tau == 1 else -math.log(math.cos(math.pi * tau / 2))


def _pooled_deviation(x: Values, y: Values) -> float:
    """Return the standard deviation within two samples."""
    squares = ((x - x.mean()) ** 2).sum() + ((y - y.mean()) ** 2).sum()
    return math.sqrt(squares / (len(x) + len(y) - 2))


def _share_of_top(values: Values, k: int) -> Values:
    """Return 1 for each of the k largest values and 0 for the others; equal ones at the border share their places."""
    border = np.sort(values)[-k]
    above, at = values > border, values == border
    share: Values = np.where(at, (k - above.sum()) / at.sum(), above)
    return share


def _means(x: Values, rng: np.random.Generator) -> Values:
    """Return the means of resamples of a sample."""
    means: Values = x[rng.integers(len(x), size=(RESAMPLES, len(x)))].mean(1)
    return means


def _interval(
    estimate: float,
    error: float,
    df: float,
    n: int,
    resample: Resample,
    low: float,
    high: float,
    confidence: float,
) -> Interval:
    """Return an interval from resamples, or from the standard error if there are too few values for resamples."""
    from scipy.stats import norm, t

    critical = t.ppf((1 + confidence) / 2, df)
    if n < FEWEST_FOR_BOOTSTRAP:
        method, ends = "student", np.array([estimate - critical * error, estimate + critical * error])
    else:
        q = norm.cdf(-math.sqrt(n / (n - 1)) * critical)
        method, ends = "bootstrap", np.quantile(resample(np.random.default_rng(0)), [q, 1 - q])
    lower, upper = np.clip(ends, low, high)
    return Interval(float(estimate), float(lower), float(upper), n, method, confidence)


def _correlation(
    estimate: float, numerators: Values, denominators: Values, n: int, confidence: float
) -> Interval:
    defined = denominators > 0
    resampled = numerators[defined] / denominators[defined]
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(estimate), float(low), float(high), n, "bootstrap", confidence)


def _checked(values: ArrayLike, name: str, fewest: int) -> Values:
    """Return values as an array.

    Raises:
        ConfigError: If there are too few, or one is not finite.
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    if len(array) < fewest:
        raise ConfigError(
            f"{len(array)} given, the statistic requires at least {fewest}",
            field=name,
            remedy="use more seeds or architectures",
        )
    if not np.isfinite(array).all():
        number = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ConfigError(
            f"value {number + 1} of {len(array)} is {array[number]}, not a finite number",
            field=name,
            remedy="leave out runs without a result",
        )
    return array


def _checked_two(first: ArrayLike, second: ArrayLike, paired: bool) -> tuple[Values, Values]:
    x, y = _checked(first, "first sample", 2), _checked(second, "second sample", 2)
    if paired:
        _check_lengths(x, y)
    return x, y


def _checked_ranked(x: ArrayLike, y: ArrayLike) -> tuple[Values, Values]:
    a, b = _checked(x, "x", 4), _checked(y, "y", 4)
    _check_lengths(a, b)
    for name, values in (("x", a), ("y", b)):
        if (values == values[0]).all():
            raise ConfigError(
                f"all {len(values)} values are {values[0]:g}, which have no order",
                field=name,
                remedy="leave out a figure that does not differ",
            )
    return a, b


def _check_lengths(x: Values, y: Values) -> None:
    if len(x) != len(y):
        raise ConfigError(
            f"the samples have {len(x)} and {len(y)} values, but belong together",
            field="samples",
            remedy="give both the same seeds",
        )
