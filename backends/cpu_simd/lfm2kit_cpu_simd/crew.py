"""Chooses how many threads share a kernel's work: fewer while other processes want their cores."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Mapping

import numba

from lfm2kit.backend import Context
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.measuring.timing import waits
from lfm2kit_cpu_simd.threads import CORES, end_team  # imported first: it sets how threads wait

WINDOW = 0.02  # seconds between two looks: several time slices of the processes on a core
# One of n threads is given up, which costs an nth of the speed, if one waits for a core for this
# part of an nth of a window: the others may have to wait as long.
CROWDED = 0.8
PATIENCE = 0.25, 4.0  # seconds until a thread is added again: at first, and at most


def preemptions() -> int:
    """Return how often the system has taken a core from a thread of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


class Crew(threading.local):
    """The threads that share the work of each kernel: fewer while others want their cores.

    A kernel ends with its slowest thread, so a single thread without a core delays all of them.
    Each thread that calls blocks has its own crew, because Numba sets the number for each.
    """

    asked: int | None = None  # the most that a thread which calls its first block begins with

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        preemptions: Callable[[], int] = preemptions,
        waits: Callable[[], Mapping[str, float]] = waits,
    ) -> None:
        self._clock, self._preemptions, self._waits = clock, preemptions, waits
        self.hire(self.asked or numba.get_num_threads())

    def hire(self, most: int) -> None:
        """Start again with `most` threads, and never take more."""
        self._most, self._patience = most, PATIENCE[0]
        self._preempted, self._waited = self._preemptions(), dict[str, float]()
        self._looked = self._clock()
        self._resize(most)

    def size(self) -> int:
        """Return how many threads the next kernel runs on."""
        if self._clock() - self._looked >= WINDOW:
            self._look()
        return self._size

    def rest(self) -> None:
        """End the threads that share this thread's kernels; its next kernel starts new ones.

        For a thread that leaves kernels to another one from here on.  libgomp counts the threads of
        both, and where they are more than cores, all sleep as soon as a kernel ends: to wake
        them takes longer than many kernels.
        """
        end_team()

    def _look(self) -> None:
        is_crowded = self._share_of_waiting() >= CROWDED / max(2, self._size)
        lasted = self._looked - self._changed >= self._patience
        if is_crowded and self._size > 1:
            self._patience = min(2 * self._patience, PATIENCE[1])
            self._resize(self._size - 1)
        elif not is_crowded and lasted and self._size < self._most:
            self._resize(self._size + 1)
        elif not is_crowded and lasted:  # nobody has come back
            self._patience = PATIENCE[0]

    def _resize(self, size: int) -> None:
        numba.set_num_threads(size)
        self._size, self._changed = size, self._looked

    def _share_of_waiting(self) -> float:
        """Return the largest share of the time since the last look that a thread waited.

        Reading each thread's account takes a while, so it is read only after a core was taken from
        this process, and twice before the share is known.
        """
        before, preempted = self._waited, self._preempted
        since, self._looked = self._looked, self._clock()
        self._preempted = self._preemptions()
        self._waited = dict(self._waits()) if self._preempted != preempted else {}
        if not (before and self._waited):
            return 0.0
        longest = max(total - before.get(t, total) for t, total in self._waited.items())
        return longest / (self._looked - since)


CREW = Crew()


def set_threads(context: Context) -> None:
    """Set the number of threads asked for, or this rank's share of the cores."""
    most = numba.config.NUMBA_NUM_THREADS
    if context.threads is not None and context.threads > most:
        raise Lfm2kitError(
            Option("threads", context.threads),
            f": this process may use {most} (cores of its affinity mask, or NUMBA_NUM_THREADS)",
        )
    Crew.asked = context.threads or max(1, min(most, CORES // context.local_ranks))
    CREW.hire(Crew.asked)
