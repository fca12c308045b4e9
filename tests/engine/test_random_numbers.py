"""Random numbers by seed and position, with values that may never change."""

from __future__ import annotations

import pytest

from lfm2kit.engine.random_numbers import bits_of_draw, philox, seed_of_fork

# The known answers of the library Random123, its file kat_vectors: philox4x32 of 10 rounds.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


# Of the seeds 0, 1 and the largest, at the positions 0 and 127 999.
GOLDEN = [
    0xE169C58D6627E8D5,
    0xD9EF12CDD81196A0,
    0xE50A0EBCE3E80670,
    0xCEAF4FF7D6A3C73E,
    0x93EBECF532E74FA9,
    0x4746A1A3B92BC95D,
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_has_the_published_values(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert philox(counter, key) == expected


def test_the_bits_of_a_draw_never_change() -> None:
    drawn = [
        bits_of_draw(seed, position) for seed in (0, 1, 2**63 - 1) for position in (0, 127_999)
    ]
    assert drawn == GOLDEN


def test_no_two_draws_share_their_bits() -> None:
    drawn = {bits_of_draw(seed, position) for seed in range(40) for position in range(100)}
    assert len(drawn) == 4000


def test_the_bits_are_even() -> None:
    """Each of the 64 is set in half of the draws, within six standard deviations."""
    drawn = [bits_of_draw(7, position) for position in range(4096)]
    for bit in range(64):
        assert abs(sum(value >> bit & 1 for value in drawn) - 2048) < 6 * 32


def test_forks_have_seeds_of_their_own() -> None:
    assert seed_of_fork(5, 0) == 5
    seeds = {seed_of_fork(seed, fork) for seed in range(20) for fork in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
