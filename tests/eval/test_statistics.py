"""The interval is what it says: quantiles, a case worked by hand, its coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from inlay.eval.statistics import paired_increase, student_t


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    # Abramowitz and Stegun, table 26.10, to the last digit printed there.
    [(1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_quantiles_of_t(freedom: int, quantile: float) -> None:
    assert student_t(0.975, freedom) == pytest.approx(quantile, abs=5e-4)


def test_windows_of_one_size_give_the_usual_t_interval() -> None:
    """Means 1, 2 and 3 thousandths: mean 2, standard error 1 / sqrt(3), t 4.3027."""
    found = paired_increase([0.01, 0.02, 0.03], [10, 10, 10])
    reach = 4.302653 * 0.001 / math.sqrt(3)
    assert found.value == pytest.approx(math.expm1(0.002))
    assert found.low == pytest.approx(math.expm1(0.002 - reach), rel=1e-5)
    assert found.high == pytest.approx(math.expm1(0.002 + reach), rel=1e-5)


def test_no_difference_has_an_interval_of_no_width() -> None:
    found = paired_increase([0.0] * 4, [512, 512, 512, 7])
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_one_window_leaves_no_interval() -> None:
    found = paired_increase([0.5], [10])
    assert found.value == pytest.approx(math.expm1(0.05))
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_a_short_window_weighs_less() -> None:
    """Nine tokens of ten are as before, whatever the tenth alone says."""
    assert paired_increase([0.0, 1.0], [9, 1]).value == pytest.approx(math.expm1(0.1))


def test_nan_and_infinity_reach_the_interval() -> None:
    assert math.isnan(paired_increase([0.1, math.nan], [5, 5]).high)
    assert not paired_increase([0.1, math.inf], [5, 5]).high <= 1.0
    assert paired_increase([1e6, 1e6 + 1], [5, 5]).value == math.inf


@pytest.mark.parametrize(
    ("count", "correlation", "least"),
    # 950 of 1000 expected, and the count's own standard deviation is 7; 935 where batches of seven
    # windows still depend on each other a little. Correlated windows taken for independent would
    # hold the truth 800 times, and tokens 400 times.
    [(20, 0.0, 925), (30, 0.0, 925), (210, 0.4, 905)],
)
def test_the_truth_is_inside_as_often_as_claimed(
    count: int, correlation: float, least: int
) -> None:
    """Windows with an effect of their own and of the window before, beside that of each token."""
    generator, truth, inside = np.random.default_rng(0), 0.01, 0
    sizes = np.array([64] * (count - 1) + [20])
    for _ in range(1000):
        shared = generator.normal(0, 0.05, count)
        for i in range(1, count):
            shared[i] = correlation * shared[i - 1] + (1 - correlation**2) ** 0.5 * shared[i]
        sums = sizes * (truth + shared) + np.sqrt(sizes) * generator.normal(0, 0.1, count)
        found = paired_increase(sums.tolist(), sizes.tolist())
        inside += found.low <= math.expm1(truth) <= found.high
    assert least <= inside <= 975
