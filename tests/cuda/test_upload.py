"""Arrays reach the device as they are, whichever way their size takes, and come back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from lfm2kit_cuda.requirements import why_unavailable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

MEGABYTE = 1 << 20


def cuda_memory() -> Any:
    from lfm2kit_cuda.memory import memory_of

    return memory_of(0)


@pytest.mark.parametrize(
    "size",
    [0, 1, 5, *(n * MEGABYTE + more for n in (1, 8, 16, 50) for more in (-1, 0, 1))],
)
def test_bytes_stay_what_they_are(size: int) -> None:
    memory = cuda_memory()
    array = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    assert np.array_equal(memory.to_host(memory.from_host(array)), array)


def test_an_array_may_be_written_as_soon_as_it_is_handed_over() -> None:
    memory = cuda_memory()
    rng = np.random.default_rng(0)
    array, sent = np.empty((1000, 2000), np.float32), []
    for _ in range(8):  # one after the other through the same buffers
        array[:] = rng.standard_normal(array.shape)
        sent.append((array.copy(), memory.from_host(array)))
        array[:] = np.nan
    assert all(np.array_equal(memory.to_host(there), here) for here, there in sent)


def test_rows_that_do_not_lie_side_by_side() -> None:
    memory = cuda_memory()
    array = np.arange(3 << 20, dtype=np.int32).reshape(1024, -1)[:, ::2]
    assert np.array_equal(memory.to_host(memory.from_host(array)), array)
