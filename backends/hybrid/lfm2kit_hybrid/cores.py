"""Which cores the workers run on: each on one of its own, if there are enough."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

from lfm2kit.process.machine import cores

MOST_WORKERS = 8

# Both asked for before anything runs: with OMP_PROC_BIND the first parallel kernel binds the main
# thread, and what it starts, to one core.
MASK = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset[int]()
CORES = cores()


def workers_cores(
    local_rank: int = 0, local_ranks: int = 1, near: Collection[int] = ()
) -> list[int | None]:
    """Return the core of each worker of this rank; None for one that no core is kept for.

    The ranks of a machine share its cores.  One core of each rank's share is left to its main
    thread, and if there is no other, one worker runs wherever the system lets it.  If some cores
    are `near` the memory, no others are taken.
    """
    share = CORES // local_ranks
    mine = sorted(MASK)[local_rank * share : (local_rank + 1) * share]
    free = mine[:0:-1]  # from the last on: libraries that bind threads begin with the first
    are_near = [core for core in free if core in near]
    return [*(are_near or free)[:MOST_WORKERS]] or [None]


def block_threads(local_ranks: int = 1) -> int:
    """Return how many threads a block may compute on that a worker of this rank calls.

    The thread that runs the forward waits for the GPU meanwhile, and CUDA's way to wait is to look
    all the time.  A kernel ends with its slowest thread, so none must share a core with that one.
    """
    return max(1, CORES // local_ranks - 1)


def core_notes(local_ranks: int = 1) -> list[str]:
    """Return what slows the workers down on this machine, a line each."""
    if CORES // local_ranks > 1:
        return []
    return [
        "the thread that chooses experts has no core of its own: it and the one that starts the "
        "GPU's work wait for each other; give each rank two cores"
    ]


def bind(core: int | None) -> None:
    """Keep this thread on a core, if the system allows it."""
    if core is not None:
        with suppress(OSError):
            os.sched_setaffinity(0, {core})


@contextmanager
def unbound(core: int | None) -> Iterator[None]:
    """Let this thread, and the threads that it starts, run on all cores of the process."""
    if core is None:
        yield
        return
    with suppress(OSError):
        os.sched_setaffinity(0, MASK)
    try:
        yield
    finally:
        bind(core)
