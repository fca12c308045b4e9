"""Times a call, and says how much of it this process's threads had no core for.

The system's account of waiting says so; CPU time does not.  Threads that take turns on one core use
as much of it as one thread that needs no other, and threads that sleep between kernels use less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

THREADS = Path("/proc/self/task")


class Timing(NamedTuple):
    """What a call took: `waited` are the seconds of it that the unluckiest thread was ready to run
    and had no core; None where the system does not say."""

    seconds: float
    waited: float | None


def waits(threads: Path = THREADS) -> Mapping[str, float]:
    """Seconds that each thread of this process has waited for a core; empty where not known."""
    try:
        return {
            thread.name: int((thread / "schedstat").read_bytes().split()[1]) / 1e9
            for thread in threads.iterdir()
        }
    except OSError:  # not Linux, or a thread has just ended
        return {}


def timed(
    call: Callable[[], object],
    clock: Callable[[], float] = time.perf_counter,
    waits: Callable[[], Mapping[str, float]] = waits,
) -> Timing:
    """Calls, by the `clock` and the account of `waits` that a test may give instead."""
    before = waits()
    start = clock()
    call()
    seconds = clock() - start
    after = waits()
    if not (before and after):
        return Timing(seconds, None)
    longest = max(total - before.get(thread, 0.0) for thread, total in after.items())
    return Timing(seconds, min(longest, seconds))  # a wait enters the account when it has ended
