"""How many bytes of NumPy arrays a piece of code allocates on the host."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

from numpy.lib import tracemalloc_domain

ARRAYS = tracemalloc.DomainFilter(inclusive=True, domain=tracemalloc_domain)


@contextmanager
def tracing() -> Iterator[None]:
    """Trace allocations; whoever traces already goes on."""
    if tracemalloc.is_tracing():
        yield
        return
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def traced_array_bytes() -> int:
    """Return the bytes of the arrays that were made under `tracing` and are still there."""
    snapshot = tracemalloc.take_snapshot().filter_traces([ARRAYS])
    return sum(trace.size for trace in snapshot.traces)
