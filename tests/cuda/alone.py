"""The mark of tests that take, or measure, the memory of a whole GPU."""

from __future__ import annotations

import os

import pytest

ALONE = pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" in os.environ,
    reason="tests beside this one take the same GPU's memory; run it without -n",
)
