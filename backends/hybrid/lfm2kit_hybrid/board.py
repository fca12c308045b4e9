"""The words through which the main thread and the workers of a channel tell each other what to do.

They lie on cache lines by who writes them and how often, so that nobody waits for a line that
another's writes have taken away.
"""

from __future__ import annotations

import os

import numpy as np

LINE = 64  # bytes
# Places in bytes.  On a line each: what the main thread writes, what the first worker writes for
# the others, and the address of the table of calls.
SERVING = 0  # odd while a forward runs; begins and ends count it up
CLOSED = 4  # 1: workers leave
TURN, TURNS_CALL = LINE, LINE + 4  # the newest trip that other workers have a share in, its call
TABLE = 2 * LINE  # int64
# Then two lines for each worker.  The first is its own.
WORKERS, OF_WORKER = 3 * LINE, 2 * LINE
SEEN = 0  # the newest trip that it has looked at
NOTED = 4  # the newest `SERVING` that it has seen; it is in no call of a forward before that one's
SHARED_BY = 8  # of the first worker: how many have shared a call of this forward, at the most
# The second says how it is woken.
ASLEEP = LINE  # 1: it sleeps, or is about to look for the last time before it does
WANTED = LINE + 4  # the `SERVING` of the newest forward in which it has a share
READ_END, WRITE_END = LINE + 8, LINE + 12  # of its pipe

BEFORE_FIRST = 2  # of `SERVING`: not 0, which `WANTED` is in the beginning


class Board:
    """The words of a channel's workers; `newest` is its newest trip."""

    def __init__(self, workers: int, newest: int) -> None:
        count = WORKERS + workers * OF_WORKER
        memory = np.zeros(count + LINE, np.uint8)
        start = -memory.ctypes.data % LINE
        self._words = memory[start : start + count].view(np.uint32)
        self._workers = workers
        self._pipes: list[int] = []
        self.address: int = self._words.ctypes.data
        self[SERVING] = BEFORE_FIRST
        self[TURN] = newest
        self.have_seen(newest)

    def __getitem__(self, place: int) -> int:
        return int(self._words[place // 4])

    def __setitem__(self, place: int, word: int) -> None:
        self._words[place // 4] = word

    def of(self, worker: int, place: int) -> int:
        """Return the place of a worker's word on the board."""
        return WORKERS + worker * OF_WORKER + place

    def have_seen(self, newest: int) -> None:
        """Let the workers take none of the trips so far for a new one."""
        for worker in range(self._workers):
            self[self.of(worker, SEEN)] = newest if worker == 0 else self[TURN]

    def set_table(self, address: int) -> None:
        self._words[TABLE // 4 :][:2].view(np.int64)[0] = address

    def open(self, worker: int) -> None:
        """Give a worker the pipe at which it sleeps."""
        ends = os.pipe()
        for place, end in zip((READ_END, WRITE_END), ends, strict=True):
            os.set_blocking(end, False)
            self[self.of(worker, place)] = end
        self._pipes += ends

    def close(self) -> None:
        """Close the pipes.  Nobody may look at the board afterwards."""
        while self._pipes:
            os.close(self._pipes.pop())
