"""Times a call, and measures how long this process's threads waited for a core meanwhile.

The system's account of waiting shows this; CPU time does not.  Two threads that share a core use
as much CPU time as one thread that has it alone, and threads that sleep between kernels use less.
"""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

THREADS = Path("/proc/self/task")


class Repeated(ABC):
    """A measurement that was repeated."""

    __slots__ = ()

    @property
    @abstractmethod
    def seconds(self) -> list[float]:
        """Return the time of each repetition."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Return the standard deviation of the seconds; 0 for a single repetition."""
        return statistics.stdev(self.seconds) if len(self.seconds) > 1 else 0.0


class Timing(NamedTuple):
    """The time that a call took.

    `waited` is for how many of these seconds the thread that waited longest was ready to run but
    had no core; None if the system does not say.
    """

    seconds: float
    waited: float | None


def waits(threads: Path = THREADS) -> Mapping[str, float]:
    """Return the seconds that each thread of this process has waited for a core; {} if unknown."""
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
    """Call `call` and return how long it took; tests may replace `clock` and `waits`."""
    before = waits()
    start = clock()
    call()
    seconds = clock() - start
    after = waits()
    if not (before and after):
        return Timing(seconds, None)
    longest = max(total - before.get(thread, 0.0) for thread, total in after.items())
    return Timing(seconds, min(longest, seconds))  # a wait enters the account when it has ended
