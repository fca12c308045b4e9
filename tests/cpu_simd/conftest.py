"""What tests of kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import numba
import pytest
from lfm2kit_cpu_simd.backend import CpuSimdBackend  # first: it chooses how threads are started
from lfm2kit_cpu_simd.crew import CREW

assert CpuSimdBackend


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Have this many threads share the work of each kernel."""
    before = numba.get_num_threads()
    if request.param > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("one core")
    CREW.hire(request.param)
    yield request.param
    CREW.hire(before)
