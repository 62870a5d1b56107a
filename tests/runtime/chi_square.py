"""A chi-square test without scipy."""

from __future__ import annotations

import math

import numpy as np


def assert_distributed(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Counts fit the probabilities, at a level that fails once in about 30,000 by chance.

    The quantile is Wilson and Hilferty's approximation (1931).
    """
    expected = counts.sum() * probabilities / probabilities.sum()
    assert expected.min() > 5, "too few samples for a chi-square test"
    statistic = float(((counts - expected) ** 2 / expected).sum())
    df = counts.size - 1
    limit = df * (1 - 2 / (9 * df) + 4.0 * math.sqrt(2 / (9 * df))) ** 3
    assert statistic < limit, f"chi-square {statistic:.1f}, limit {limit:.1f} at df {df}"
