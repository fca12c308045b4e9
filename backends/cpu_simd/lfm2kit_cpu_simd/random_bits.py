"""The random bits of draws in kernels: those of `lfm2kit.engine.random_numbers`."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from lfm2kit.engine.random_numbers import DRAWS, MULTIPLIERS, ROUNDS, WEYL, WORD

_WORD, _HIGH = np.uint64(WORD), np.uint64(32)
_FIRST, _SECOND = (np.uint64(multiplier) for multiplier in MULTIPLIERS)
_LEFT, _RIGHT = (np.uint64(added) for added in WEYL)
_PURPOSE = np.uint64(DRAWS)


@numba.njit
def bits_of_draw(seed: Any, position: Any) -> Any:
    """Return 64 random bits for the token at `position` of a sequence; all are uint64."""
    a, b, c, d = position, _PURPOSE, np.uint64(0), np.uint64(0)
    left, right = seed & _WORD, seed >> _HIGH
    for _ in range(ROUNDS):
        first, second = _FIRST * a, _SECOND * c
        a, b = second >> _HIGH ^ b ^ left, second & _WORD
        c, d = first >> _HIGH ^ d ^ right, first & _WORD
        left, right = left + _LEFT & _WORD, right + _RIGHT & _WORD
    return b << _HIGH | a
