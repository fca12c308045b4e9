"""Promises about the bits of results, which every backend makes unless it takes them back."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class Promise(Enum):
    """What a backend promises about the bits of its blocks' results, in words.

    A promise rests on the one before it, and two rest on `BATCH_INVARIANCE`.  Who takes a promise
    back takes back what rests on it.
    """

    REPEATABILITY = "the same call gives the same bits every time"
    BATCH_INVARIANCE = "a row has the same bits whatever other rows are in the call"
    CHUNK_INVARIANCE = "a sequence has the same bits in one call and in chunks"
    SPLIT_INVARIANCE = "experts have the same bits in one call and apart, added in the order of k"

    @property
    def rests_on(self) -> Promise | None:
        """Return the promise without which this one cannot be kept."""
        return _RESTS_ON.get(self)

    def why_not(self, taken_back: Mapping[Promise, str]) -> str | None:
        """Return the reason why this promise, or one that it rests on, is taken back; else None."""
        if self in taken_back:
            return taken_back[self]
        return None if self.rests_on is None else self.rests_on.why_not(taken_back)


_RESTS_ON = {
    Promise.BATCH_INVARIANCE: Promise.REPEATABILITY,
    Promise.CHUNK_INVARIANCE: Promise.BATCH_INVARIANCE,
    Promise.SPLIT_INVARIANCE: Promise.BATCH_INVARIANCE,
}
