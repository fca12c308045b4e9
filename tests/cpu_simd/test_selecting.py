"""The borders of top-k and top-p, and exp, against NumPy."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
from lfm2kit_cpu_simd.selecting import border_of_top_p, exp, kth_largest


def rows() -> list[Any]:
    random = np.random.default_rng(0)
    normal = random.normal(size=300).astype(np.float32)
    orders = [normal, np.sort(normal), np.sort(normal)[::-1].copy(), np.round(normal)]
    return [*orders, np.zeros(50, np.float32), normal[:1], normal[:2]]


@pytest.mark.parametrize("row", rows(), ids=range(len(rows())))
def test_the_kth_largest_is_that_of_a_sort(row: Any) -> None:
    for k in range(1, len(row) + 1):
        assert kth_largest(row.copy(), k) == np.sort(row)[-k]


@pytest.mark.parametrize("row", rows(), ids=range(len(rows())))
def test_the_border_of_top_p_is_that_of_a_sort(row: Any) -> None:
    ascending = np.sort(row)
    weights = np.exp(ascending.astype(np.float64))
    shares = (weights / weights.sum()).astype(np.float32)
    sums = np.cumsum(shares, dtype=np.float64).astype(np.float32)
    shuffled = np.random.default_rng(1).permutation(len(row))
    for rest in (0.0, 1e-6, 0.1, 0.25, 0.5, 0.999, 2.0):
        removed = min(np.count_nonzero(sums <= np.float32(rest)), len(row) - 1)
        border = ascending[removed]
        found = border_of_top_p(ascending[shuffled], shares[shuffled], 0.0, np.float32(rest))
        assert found == (border, removed - np.count_nonzero(ascending < border))


def test_what_is_below_counts() -> None:
    scores, shares = np.array([1, 2, 3], np.float32), np.array([0.1, 0.2, 0.3], np.float32)
    assert border_of_top_p(scores.copy(), shares.copy(), 0.4, np.float32(0.45)) == (1, 0)
    assert border_of_top_p(scores.copy(), shares.copy(), 0.4, np.float32(0.55)) == (2, 0)
    assert border_of_top_p(scores.copy(), shares.copy(), 0.4, np.float32(1)) == (3, 0)


def test_exp_is_that_of_numpy_to_two_units_of_the_last_place() -> None:
    of_all = numba.njit(lambda x: np.array([exp(one) for one in x]))
    x = -np.concatenate([np.linspace(0, 700, 20_001), np.geomspace(1e-300, 1, 5000), [0.0]])
    found, expected = of_all(x), np.exp(x)
    np.testing.assert_allclose(found, expected, rtol=4.5e-16)
    assert found[-1] == 1
