"""Reads and writes numbers of bytes as people do: 24GiB, 20GB."""

from __future__ import annotations

import re

PREFIXES = "KMGT"
MOST = 2**62


def parse_bytes(text: str) -> int:
    """Return the bytes that "24GiB" or "20.5 GB" means; raise ValueError for anything else.

    GB are 10^9 bytes, GiB 2^30.
    """
    found = re.fullmatch(r"\s*([0-9]{1,19}(?:\.[0-9]{1,9})?)\s*([KMGT]?)(i?)B\s*", text, re.I)
    if found is None or (found[3] and not found[2]):
        raise ValueError(f"{text!r} is not a number of bytes")
    power = 1 + PREFIXES.index(found[2].upper()) if found[2] else 0
    count = float(found[1]) * (1024 if found[3] else 1000) ** power
    if not 1 <= count <= MOST:
        raise ValueError(f"{text!r} is out of bounds")
    return int(count)


def size(count: float) -> str:
    """Format a number of bytes for people, in a unit that shows it: "512 MB", "46.9 GB"."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:  # what is more would be rounded to 1e+03
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
