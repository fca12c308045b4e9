"""Times calls on all ranks of a job at once: what shares a machine is slower than what is alone.

A captured forward makes its calls without the host, which may take longer for a call than the
device.  So calls are recorded, if their backend can, and timed as a forward replays them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle

from lfm2kit.backend import Array, Captures
from lfm2kit.batch import Batch
from lfm2kit.building.records import LEAST
from lfm2kit.measuring.timing import Timing, timed
from lfm2kit.memory import Memory, is_ordered
from lfm2kit.progress import step
from lfm2kit.ranks.joining import Alone
from lfm2kit.transport import Transport, everyones

Call = Callable[[], object]

REPETITIONS, CALL_SECONDS = 7, 0.5  # of each call: how often, unless these seconds are over
# Calls that a memory with streams is given at once: the host enqueues the next ones meanwhile.
ENQUEUED = 4
RECORDED_SECONDS, MOST_RECORDED = 5e-3, 128  # of the calls that are recorded together


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

    def seconds(self, *calls: Call) -> float:
        """Return the median seconds of a call, without the first ones, on the slowest rank.

        Several calls take turns.  They do the same work with weights of their own, so that caches
        hold no more of these than in a forward.
        """
        step("measuring")
        for call in calls:
            call()
        self.largest(0.0)
        turns = cycle(calls)
        return self._median(lambda: self._once(lambda: next(turns)(), ENQUEUED))

    def seconds_recorded(self, captures: Captures, *calls: Call) -> float:
        """Return what `seconds` does, for calls that are recorded together and replayed."""
        enough = min(MOST_RECORDED, RECORDED_SECONDS / self.seconds(*calls))
        rounds = max(1, math.ceil(enough / len(calls)))
        count = rounds * len(calls)
        with recorded(captures, calls * rounds) as replay:
            return self._median(lambda: self._once(replay, 1)) / count

    def once_together(self, call: Call) -> float:
        """Return the seconds of one call that all ranks begin now, on the slowest rank."""
        self.largest(0.0)
        return self.largest(self._once(call, 1).seconds)

    def _median(self, once: Callable[[], Timing]) -> float:
        begin, taken = time.perf_counter(), [once()]
        while len(taken) < REPETITIONS and time.perf_counter() - begin < CALL_SECONDS:
            taken.append(once())
        median = max(LEAST, statistics.median(timing.seconds for timing in taken))
        waited = statistics.median(timing.waited or 0.0 for timing in taken)
        self.waited = max(self.waited, waited / median)
        return self.largest(median)

    def largest(self, seconds: float) -> float:
        """Return the largest seconds of all ranks, when all of them are here."""
        return largest(self.transport, seconds)

    def _once(self, call: Call, enqueued: int) -> Timing:
        if not is_ordered(self.memory):
            return timed(call)
        start = self.memory.mark()
        for _ in range(enqueued):
            call()
        return Timing(self.memory.mark().seconds_since(start) / enqueued, None)


@contextmanager
def recorded(captures: Captures, calls: Sequence[Call]) -> Iterator[Call]:
    """Give a call that replays all of `calls`, which have been made before."""
    batch = Batch.of_sequences([[0]])

    def all_of_them(there: Batch) -> Array:
        for call in calls:
            call()
        return there.token_ids

    replay = captures.capture(all_of_them, batch)
    try:
        yield lambda: replay(batch)
    finally:
        replay.close()
