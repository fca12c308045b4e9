"""The interval of a median, against tables and counts of all orders."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from lfm2kit.records.noise import LEAST, median_interval


@pytest.mark.parametrize(
    ("n", "interval"),
    # The narrowest with 15/16 or more of the published tables, such as 0.938 of 5, and 0.961 of 9.
    [(5, (1, 5)), (6, (1, 6)), (8, (1, 8)), (9, (2, 8)), (12, (3, 10)), (20, (6, 15))],
)
def test_intervals_are_those_of_tables(n: int, interval: tuple[float, float]) -> None:
    values = np.random.default_rng(0).permutation(np.arange(1.0, n + 1)).tolist()
    assert median_interval(values) == interval


def test_few_values_have_none() -> None:
    for n in range(1, LEAST):
        assert median_interval([1.0] * n) is None
    assert median_interval([1.0] * LEAST) == (1.0, 1.0)


def apart_by_chance(n: int, m: int) -> float:
    """Return how often intervals of n and of m values of one distribution do not overlap.

    All orders of the n + m values are as probable.  Those are counted in which the last value of
    one interval comes before the first of the other.
    """
    (_, last), (first, _) = median_interval([*range(1, n + 1)]), median_interval([*range(1, m + 1)])  # type: ignore[misc]
    orders = (
        comb(before + int(first) - 1, before) * comb(n - before + m - int(first), n - before)
        for before in range(int(last), n + 1)
    )
    return sum(orders) / comb(n + m, n)


def test_equal_distributions_differ_seldom() -> None:
    sizes = (*range(LEAST, 30), 50, 100)
    assert all(2 * apart_by_chance(n, n) < 0.01 for n in sizes)
    assert 2 * apart_by_chance(5, 5) == pytest.approx(2 / comb(10, 5))
    assert all(apart_by_chance(n, m) + apart_by_chance(m, n) < 1 / 16 for n in sizes for m in sizes)


def test_the_coverage_is_what_the_formula_says() -> None:
    """Of skewed values with many ties as well: at least 15/16, as far as 4,000 draws can tell."""
    rng = np.random.default_rng(1)
    for n in (5, 9, 20):
        for draws, true in (
            (rng.exponential(size=(4000, n)), np.log(2)),
            (rng.integers(0, 3, (4000, n)), 1),
        ):
            intervals = [median_interval(one) for one in draws.tolist()]
            covered = np.mean([i is not None and i.low <= true <= i.high for i in intervals])
            assert covered > 15 / 16 - 3 * np.sqrt(15 / 16 / 16 / 4000)
