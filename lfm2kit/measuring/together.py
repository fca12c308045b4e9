"""Times calls on all ranks of a job at once: what shares a machine is slower than what is alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lfm2kit.building.records import LEAST
from lfm2kit.measuring.timing import Timing, timed
from lfm2kit.memory import Memory, is_ordered
from lfm2kit.progress import step
from lfm2kit.ranks.joining import Alone
from lfm2kit.transport import Transport, everyones

REPETITIONS, CALL_SECONDS = 7, 0.5  # of each call: how often, unless these seconds are over
# Calls that a memory with streams is given at once: the host enqueues the next ones meanwhile.
ENQUEUED = 4


def largest(transport: Transport, value: float) -> float:
    """Return the largest of all ranks' values, on every rank, when all of them are here."""
    return float(everyones(transport, value).max())


@dataclass(slots=True)
class Stopwatch:
    """Times calls that work in a memory, on all ranks of a job at the same time.

    `waited` is the share of a call on the host, by the median, for which a thread waited for a
    core: the largest of all.
    """

    memory: Memory
    transport: Transport = field(default_factory=Alone)
    waited: float = 0.0

    def seconds(self, call: Callable[[], object]) -> float:
        """Return the median seconds of some calls, without the first one, on the slowest rank."""
        step("measuring")
        call()
        self.largest(0.0)
        begin, taken = time.perf_counter(), [self._once(call)]
        while len(taken) < REPETITIONS and time.perf_counter() - begin < CALL_SECONDS:
            taken.append(self._once(call))
        median = max(LEAST, statistics.median(timing.seconds for timing in taken))
        waited = statistics.median(timing.waited or 0.0 for timing in taken)
        self.waited = max(self.waited, waited / median)
        return self.largest(median)

    def largest(self, seconds: float) -> float:
        """Return the largest seconds of all ranks, when all of them are here."""
        return largest(self.transport, seconds)

    def _once(self, call: Callable[[], object]) -> Timing:
        if not is_ordered(self.memory):
            return timed(call)
        start = self.memory.mark()
        for _ in range(ENQUEUED):
            call()
        return Timing(self.memory.mark().seconds_since(start) / ENQUEUED, None)
