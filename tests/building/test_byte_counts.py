"""Numbers of bytes are shown in a unit that shows them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm2kit.building.byte_counts import parse_bytes, size

ROOT = Path(__file__).parents[2]
# A figure in a fixed unit, such as f"{nbytes / 1e9:.1f} GB"; a rate per second is another thing.
FIXED = re.compile(r"\} ?[kKMG]i?B\b(?!/s)")


@pytest.mark.parametrize(
    ("count", "says"),
    [
        (0, "0 B"),
        (267.4, "267 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_900, "1 MB"),
        (9_880_000, "9.88 MB"),
        (999_700_000, "1.0 GB"),
        (46_900_000_000, "46.9 GB"),
    ],
)
def test_a_number_has_three_digits_and_a_unit(count: float, says: str) -> None:
    assert size(count) == says


@given(st.integers(1, 2**50))
def test_what_is_shown_is_what_it_says(count: int) -> None:
    assert parse_bytes(size(count)) == pytest.approx(count, rel=0.05)


def test_no_size_is_shown_in_a_fixed_unit() -> None:
    """What is small would be 0.0 GB."""
    folders = (ROOT / name for name in ("lfm2kit", "backends", "plugins"))
    sources = [path for folder in folders for path in folder.rglob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sources
        if "tests" not in path.parts and path.name != "byte_counts.py"
        for line in path.read_text().splitlines()
        if FIXED.search(line)
    ]
    assert len(sources) > 200
    assert not found
