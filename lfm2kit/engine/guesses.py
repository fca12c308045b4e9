"""Guesses the next tokens of a sequence, so that one forward can compute several of them.

A guess changes no token.  Each token is drawn from the logits that plain decoding has at its
position, which do not depend on what else is in a forward, with the random number of its position.
What was computed after a wrong guess is computed again.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]

MOST_GUESSES = 7  # in a forward; a state's sequences can step back further
SIZES = (3, 2)  # of what is looked for, the longer one first


@runtime_checkable
class Guesses(Protocol):
    """Guesses the tokens of one sequence."""

    def guess(self, ids: Int32, most: int) -> list[int]:
        """Return up to `most` tokens that may come next after all of a sequence's tokens."""
        ...

    def told(self, guessed: int, right: int) -> None:
        """Take note of how many of the last guesses were right, from the first one on."""
        ...


class RepeatedText:
    """Guesses that a text goes on as it did after the last place with its last tokens.

    This is prompt lookup decoding (Saxena, 2023).  It guesses more, the more guesses were right.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # the place after these tokens
        self._most = MOST_GUESSES

    def guess(self, ids: Int32, most: int) -> list[int]:
        self._learn(ids[len(self._ids) :].tolist())
        for size in SIZES:
            place = self._next.get(tuple(self._ids[-size:]))
            if place is not None:
                return self._ids[place : place + min(most, self._most)]
        return []

    def told(self, guessed: int, right: int) -> None:
        self._most = min(MOST_GUESSES, 2 * right + 1)

    def _learn(self, ids: list[int]) -> None:
        for token_id in ids:
            for size in SIZES:
                if len(self._ids) >= size:
                    self._next[tuple(self._ids[-size:])] = len(self._ids)
            self._ids.append(token_id)


SPECULATIONS = {"ngram": RepeatedText}  # by the name that users type
