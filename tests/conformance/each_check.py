"""Every check of the suite, of which those that take longest are left to --long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lfm2kit.testing import CHECKS

# Large blocks, many rows and long contexts.  All installed backends are judged by them each time.
LONGEST = {
    "real-widths",
    "rows-among-100000",
    "state-chunked-equals-one-shot",
    "state-decode-after-600-tokens",
    "state-steps-back",
}


def each_check() -> Iterator[Any]:
    """Yield a parameter for each check."""
    for name in CHECKS:
        yield pytest.param(name, marks=[pytest.mark.long] * (name in LONGEST))
