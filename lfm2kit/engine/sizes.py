"""The sizes of captured steps: few, so that sequences may join and leave (decision 0046)."""

from __future__ import annotations

FEW_ROWS = 16  # up to here a product costs what reading its weights does


def size_for(rows: int) -> int:
    """Return the least size of 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, ... that holds `rows`."""
    power = 1 << (rows - 1).bit_length()
    between = power - power // 4
    return between if rows <= between and power > FEW_ROWS else power
