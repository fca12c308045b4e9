"""The mark of tests that take the memory of a whole GPU, or measure its memory or speed."""

from __future__ import annotations

import os

import pytest

ALONE = pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" in os.environ,
    reason="tests beside this one use the same GPU; run it without -n",
)
