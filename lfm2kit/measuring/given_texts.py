"""Texts that are decoded to be timed: given ones, whatever the model would write.

Tokens that a model chooses soon go round in the same experts, and each precision chooses others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from lfm2kit.engine.guesses import MOST_GUESSES, SPECULATIONS, Guesses

Int32 = npt.NDArray[np.int32]

PERIOD = 64  # tokens after which a text repeats itself, if its context is long enough
LEAST_CONTEXT = 2 * (1 + MOST_GUESSES)  # in which a text has repeated itself


class NoGuesses:
    """Guesses of plain decoding: there are none."""

    def guess(self, ids: Int32, most: int) -> list[int]:
        return []

    def told(self, guessed: int, right: int) -> None:
        """Do nothing: nothing was guessed."""


NONE = "none"
GUESSES: Mapping[str, Callable[[], Guesses]] = {NONE: NoGuesses, **SPECULATIONS}


def most_rows(speculate: str) -> int:
    """Return how many rows of a sequence a step has, at the most."""
    return 1 if speculate == NONE else 1 + MOST_GUESSES


class GivenText:
    """A text of which `length` tokens are computed, and guesses of what comes next in it.

    It has `tokens` tokens at random.  Where there are guesses, different ones repeat themselves, at
    least twice in `context`, so that every guess is right.
    """

    def __init__(
        self, speculate: str, context: int, tokens: int, vocab_size: int, rng: np.random.Generator
    ) -> None:
        self._guesses = GUESSES[speculate]()
        self._guessed: list[int] = []
        self.length = 0
        if speculate == NONE:
            self._ids: Int32 = rng.integers(0, vocab_size, tokens, dtype=np.int32)
        else:
            period = min(PERIOD, context // 2)
            self._ids = np.resize(rng.permutation(vocab_size)[:period].astype(np.int32), tokens)

    def read(self, tokens: int) -> Int32:
        """Return the next tokens of the context, which count as computed."""
        self.length += tokens
        return self._ids[self.length - tokens : self.length]

    def next(self) -> Int32:
        """Return the next token, and guesses of those after it."""
        known = self._ids[: self.length + 1]
        self._guessed = self._guesses.guess(known, MOST_GUESSES)
        return np.array([known[-1], *self._guessed], np.int32)

    def advance(self) -> None:
        """Count the next token as computed, and the guesses that the text bears out."""
        there = self._ids[self.length + 1 :][: len(self._guessed)].tolist()
        pairs = zip(self._guessed, there, strict=False)
        right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._guesses.told(len(self._guessed), right)
        self.length += 1 + right
