"""Which tokens may be drawn: temperature, top-k, top-p and min-p, as in transformers.

Where top-k or min-p remove most of a row, a comparison does so first, and the definitions see few
numbers.
"""

from __future__ import annotations

from math import log
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit.engine.sampling import LARGEST, Sampling

GROUP = 64  # logits, of which the largest is found first

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class Kept(NamedTuple):
    """The tokens that may be drawn, and their logits divided by the temperature."""

    ids: npt.NDArray[np.intp]  # ascending
    scores: Floats

    def only(self, keep: Bools) -> Kept:
        return Kept(self.ids[keep], self.scores[keep])

    def weights(self) -> Doubles:
        """Return what the probabilities are in proportion to; the best token's weight is 1."""
        weights: Doubles = np.exp(self.scores.astype(np.float64) - self.scores.max())
        return weights


def kept(logits: Floats, sampling: Sampling) -> Kept:
    """Return the tokens of a row that may be drawn.

    `logits` is float32 [vocab_size], none is NaN, and the largest lies between -`LARGEST` and
    `LARGEST`.  The temperature is above 0.
    """
    ids = np.flatnonzero(logits >= _least(logits, sampling))
    there = Kept(ids, logits[ids] / np.float32(sampling.temperature))
    if 0 < sampling.top_k < len(there.ids):
        there = there.only(_top_k(there, sampling.top_k))
    if sampling.top_p < 1:
        there = there.only(_top_p(there, sampling.top_p))
    if sampling.min_p > 0:
        there = there.only(there.weights() >= sampling.min_p)
    return there


def _least(logits: Floats, sampling: Sampling) -> np.float32:
    """Return a logit such that all lower ones are surely removed.

    For min-p they are known only if top-p does not change the best token's share.
    """
    least = -LARGEST
    if 0 < sampling.top_k * GROUP <= len(logits):
        least = max(least, _below(_least_of_top_k(logits, sampling.top_k)))
    if sampling.min_p > 0 and sampling.top_p == 1:
        border = float(logits.max()) + log(sampling.min_p) * sampling.temperature
        least = max(least, _below(border) - 1e-3 * sampling.temperature)
    return np.float32(least)


def _below(border: float) -> float:
    """Return a logit whose score, rounded to float32, is below that of `border`."""
    return border - 1e-6 * abs(border)


def _least_of_top_k(logits: Floats, k: int) -> float:
    """Return the k-th largest of groups' largest logits: at least k logits are as large."""
    largest = logits[: len(logits) // GROUP * GROUP].reshape(GROUP, -1).max(axis=0)
    return float(np.partition(largest, -k)[-k])


def _top_k(there: Kept, k: int) -> Bools:
    """Keep the k best, and all that equal the last of them."""
    keep: Bools = there.scores >= np.partition(there.scores, -k)[-k]
    return keep


def _top_p(there: Kept, top_p: float) -> Bools:
    """Remove the least likely whose probabilities sum up to no more than 1 - top_p.

    transformers calculates in float32, whose roundings decide where probabilities are equal: of 10
    equal ones, a top_p of 0.9 keeps 9.  So probabilities and sums are rounded to float32 here.  Of
    equal tokens those with the lowest ids are kept, where transformers leaves it to its sort.
    """
    ascending = np.sort(there.scores)
    weights = np.exp(ascending.astype(np.float64) - ascending[-1])
    probabilities = (weights / weights.sum()).astype(np.float32)
    sums = np.cumsum(probabilities, dtype=np.float64).astype(np.float32)
    removed = min(int(np.searchsorted(sums, np.float32(1 - top_p), side="right")), len(sums) - 1)
    border = ascending[removed]
    keep: Bools = there.scores > border
    equal = np.flatnonzero(there.scores == border)
    keep[equal[: len(sums) - removed - np.count_nonzero(keep)]] = True
    return keep
