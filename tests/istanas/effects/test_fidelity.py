import numpy as np
import pytest

from istanas.effects import (
    Fidelities,
    balanced_design,
    coded,
    join_fidelities,
    linear_system,
    next_fidelity,
    ridge,
    sum_to_zero,
)
from istanas.errors import ConfigError
from tests.istanas.effects.spaces import NAS_BENCH_201


def two_fidelities(
    seed: int, low: int = 120, high: int = 40
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return measurements and the true effects. The low fidelity has slope 0.6 and twice the noise of the high one."""
    rng = np.random.default_rng(seed)
    rows = coded(NAS_BENCH_201, balanced_design(NAS_BENCH_201, low + high, seed))
    truth = sum_to_zero(NAS_BENCH_201, rng.normal(size=30))
    levels = np.repeat([0, 1], [low, high])
    slope, noise, offset = (
        np.array([0.6, 1.0])[levels],
        np.array([1.0, 0.5])[levels],
        np.array([5.0, -3.0])[levels],
    )
    return rows, offset + slope * (rows @ truth) + noise * rng.normal(size=len(levels)), levels, truth


def test_planted_slopes_and_noise_are_found() -> None:
    found = [join_fidelities(*two_fidelities(seed)[:3], 2) for seed in range(20)]
    slopes, noise = np.array([f.slopes for f in found]), np.array([f.noise for f in found])
    assert (slopes[:, 1] == 1.0).all()
    assert (noise[:, 1] == 1.0).all()
    assert slopes[:, 0].mean() == pytest.approx(0.6, abs=0.06)
    assert noise[:, 0].mean() == pytest.approx(2.0, abs=0.3)


def test_joint_fidelities_estimate_effects_better_than_the_high_one_alone() -> None:
    errors = []
    for seed in range(10):
        rows, score, levels, truth = two_fidelities(seed)
        of = join_fidelities(rows, score, levels, 2)
        joint = ridge(linear_system(rows, score, levels, of), 1, 0).mean
        own = levels == 1
        alone = ridge(linear_system(rows[own], score[own]), 1, 0).mean
        ignoring = ridge(linear_system(rows, score - np.where(own, -3.0, 5.0)), 1, 0).mean
        errors.append([np.linalg.norm(each - truth) for each in (joint, alone, ignoring)])
    joint, alone, ignoring = np.mean(errors, axis=0)
    assert joint < 0.8 * alone
    assert joint < 0.9 * ignoring


def test_a_single_fidelity_has_slope_and_noise_1() -> None:
    rows, score, _, _ = two_fidelities(0)
    one = join_fidelities(rows, score, np.zeros(160, dtype=int), 3)
    assert one == Fidelities((1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    middle = join_fidelities(rows, score, np.repeat([0, 1], 80), 3)
    assert middle.slopes[1:] == (1.0, 1.0)  # The highest fidelity in use is the scale.
    assert middle.slopes[0] != 1.0


@pytest.mark.parametrize("high", [1, 2, 3])
def test_few_measurements_at_the_high_fidelity_change_little(high: int) -> None:
    rows, score, levels, truth = two_fidelities(1, low=120, high=high)
    of = join_fidelities(rows, score, levels, 2)
    joint = ridge(linear_system(rows, score, levels, of), 1, 0).mean
    assert 0.3 < of.slopes[0] < 1.7
    assert np.corrcoef(joint, truth)[0, 1] > 0.8


def test_the_fidelity_rises_when_the_bias_exceeds_what_is_in_question() -> None:
    slopes, noise, bias, seconds = (1.0, 1.0, 1.0), (1.0, 0.8, 0.6), (0.6, 0.3, 0.05), (15.0, 40.0, 120.0)
    spreads = (1.0, 0.5, 0.2, 0.01)
    assert [next_fidelity(s, slopes, noise, bias, seconds) for s in spreads] == [0, 1, 2, 2]


def test_information_per_second_decides_among_fidelities_without_bias() -> None:
    """1/2 log(1 + v / noise^2) is 0.35 and 1.15 nats; three times the information is worth twice the time."""
    arguments = (1.0, (1.0, 1.0), (1.0, 1.0 / 3.0), (0.0, 0.0))
    assert next_fidelity(*arguments, (10.0, 20.0)) == 1
    assert next_fidelity(*arguments, (10.0, 40.0)) == 0


def test_invalid_fidelities() -> None:
    with pytest.raises(ConfigError, match=r"\[2, 1, 2, 2\] values; give slope, noise, bias"):
        next_fidelity(1.0, (1, 1), (1,), (0, 0), (1, 2))
    with pytest.raises(ConfigError, match="use positive numbers"):
        next_fidelity(1.0, (1, 1), (1, 0), (0, 0), (1, 2))
