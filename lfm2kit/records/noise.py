"""The noise of repetitions: an interval for a median, whatever the distribution of the values."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

LEAST = 5  # values that an interval needs: the first and the last of four leave 7/8


class Interval(NamedTuple):
    """Where the median lies that ever more repetitions would have."""

    low: float
    high: float


def median_interval(values: Sequence[float]) -> Interval | None:
    """Return an interval that covers the median with a confidence of 15/16 or more.

    Of n independent values with one continuous distribution, the number of those below its median
    is binomial with p = 1/2.  The median thus lies between the k-th smallest and the k-th largest
    of them with the probability 1 - 2 (C(n, 0) + ... + C(n, k-1)) / 2^n (H. A. David and
    H. N. Nagaraja, Order Statistics, 3rd edition, 2003, section 7.1).  The largest k is taken that
    leaves 15/16, which is what five values can give.  None: there are fewer.

    If two such intervals do not overlap, the medians differ by more than the noise.  By chance this
    happens in less than 1 % of all comparisons of equally many values, and in 1/16 at most.
    """
    ordered, n = sorted(values), len(values)
    k, outside = 0, 2 * comb(n, 0)
    while 16 * outside <= 2**n:
        k += 1
        outside += 2 * comb(n, k)
    return Interval(ordered[k - 1], ordered[n - k]) if k else None
