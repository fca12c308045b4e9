"""Random numbers that depend on a seed and a position, and on nothing else.

They come from Philox4x32-10, a bijection of counters that a key chooses (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", 2011).  Nothing is kept from one number to the next, so a
sequence gets the same ones alone, in a batch, after it was put back, and on every machine.
"""

from __future__ import annotations

from lfm2kit import bounds

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key from round to round
WORD = 0xFFFFFFFF

DRAWS, FORKS = 0, 1  # what numbers are for: those of different purposes are independent

Words = tuple[int, int, int, int]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Return four random words of 32 bits for a counter of four words and a key of two."""
    a, b, c, d = counter
    left, right = key
    for _ in range(ROUNDS):
        first, second = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c
        a, b, c, d = second >> 32 ^ b ^ left, second & WORD, first >> 32 ^ d ^ right, first & WORD
        left, right = left + WEYL[0] & WORD, right + WEYL[1] & WORD
    return a, b, c, d


def bits_of_draw(seed: int, position: int) -> int:
    """Return 64 random bits for the token at `position` of a sequence."""
    return _bits(seed, position, DRAWS)


def seed_of_fork(seed: int, fork: int) -> int:
    """Return the seed of one of several sequences of a request; the first, 0, keeps its own."""
    return seed if fork == 0 else _bits(seed, fork, FORKS) & bounds.SEED


def _bits(seed: int, index: int, purpose: int) -> int:
    low, high, _, _ = philox((index, purpose, 0, 0), (seed & WORD, seed >> 32))
    return high << 32 | low
