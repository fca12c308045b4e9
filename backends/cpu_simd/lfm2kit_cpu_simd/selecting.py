"""Finds the borders of top-k and top-p without a sort, and calculates exp in float64.

Both partition as quicksort does, and go on in the part that holds the border.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

_LOG2_E = 1.4426950408889634
# ln 2 in two parts: n * _LN2_HIGH is exact for every n.
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_LEAST = -700.0  # e^_LEAST is a normal float64
_SHIFT = 1.5 * 2.0**52  # a float64 plus this is rounded to a whole number, which its last bits are


@numba.njit(inline="always")
def exp(x: Any) -> Any:
    """Return e^x for a float64 up to 0, with a relative error of 3e-16; below -700, e^-700."""
    x = max(x, _LEAST)
    shifted = x * _LOG2_E + _SHIFT
    n = shifted - _SHIFT
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = 1.0 / 6227020800.0
    p = p * r + 1.0 / 479001600.0
    p = p * r + 1.0 / 39916800.0
    p = p * r + 1.0 / 3628800.0
    p = p * r + 1.0 / 362880.0
    p = p * r + 1.0 / 40320.0
    p = p * r + 1.0 / 5040.0
    p = p * r + 1.0 / 720.0
    p = p * r + 1.0 / 120.0
    p = p * r + 1.0 / 24.0
    p = p * r + 1.0 / 6.0
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    two_n = (np.int64(n) + np.int64(1023)) << np.int64(52)
    return p * np.int64(two_n).view(np.float64)


@numba.njit
def kth_largest(scores: Any, k: int) -> Any:
    """Return the k-th largest of `scores`, whose order changes; k is at least 1."""
    low, high = 0, len(scores)
    place = high - k
    while True:
        pivot = _pivot(scores, low, high)
        first, last, ahead = low, high, low
        while ahead < last:
            score = scores[ahead]
            if score < pivot:
                scores[ahead], scores[first] = scores[first], score
                first += 1
                ahead += 1
            elif score > pivot:
                last -= 1
                scores[ahead], scores[last] = scores[last], score
            else:
                ahead += 1
        if place < first:
            high = first
        elif place >= last:
            low = last
        else:
            return pivot


@numba.njit
def border_of_top_p(scores: Any, shares: Any, below: float, rest: Any) -> Any:
    """Return the least score that top-p keeps, and how many scores that equal it are removed.

    `shares` are the probabilities, float32, and their order changes with that of `scores`.  In
    ascending order, those that add up with `below` to at most `rest`, float32, are removed, but
    never all.
    """
    low, high = 0, len(scores)
    while True:
        pivot = _pivot(scores, low, high)
        first, last, ahead, less = low, high, low, 0.0
        while ahead < last:
            score, share = scores[ahead], shares[ahead]
            if score < pivot:
                scores[ahead], scores[first] = scores[first], score
                shares[ahead], shares[first] = shares[first], share
                less += share
                first += 1
                ahead += 1
            elif score > pivot:
                last -= 1
                scores[ahead], scores[last] = scores[last], score
                shares[ahead], shares[last] = shares[last], share
            else:
                ahead += 1
        if first > low and np.float32(below + less) > rest:
            high = first
            continue
        below += less
        share, removed = np.float64(shares[first]), 0
        while removed < last - first and np.float32(below + (removed + 1) * share) <= rest:
            removed += 1
        if removed < last - first:
            return pivot, removed
        if last == high:  # nothing lies above
            return pivot, removed - 1
        below += removed * share
        low = last


@numba.njit(inline="always")
def _pivot(scores: Any, low: int, high: int) -> Any:
    """Return the median of three, so that rows in order are as fast as others."""
    a, b, c = scores[low], scores[(low + high) // 2], scores[high - 1]
    return max(min(a, b), min(max(a, b), c))
