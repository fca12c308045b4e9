"""The loop of a worker, told what to do by a test that plays the first worker."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from itertools import takewhile

import numpy as np
from lfm2kit_hybrid.board import CLOSED, SERVING, Board
from lfm2kit_hybrid.cores import MASK, bind
from lfm2kit_hybrid.polling import ENTRY, FUNCTION, OVER, PARTS, pass_on, poll, publish, wake

FORWARD = 3
LOOKS = 60  # after which the worker sleeps: about when the next trip comes
HARMLESS = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value


def as_many_as_fit(count: int, seconds: float = 2.0) -> Iterator[int]:
    """Yield the numbers from 1 to `count`, or fewer on a machine that is busy."""
    end = time.monotonic() + seconds
    yield from takewhile(lambda _: time.monotonic() < end, range(1, count + 1))


def test_nobody_sleeps_through_a_trip_of_a_forward_that_needs_it() -> None:
    board = Board(2, newest=0)
    board.open(1)
    words = np.zeros(3, np.uint32)  # two of `failed`, one of `answered`
    failed, answered = words.ctypes.data, words[2:].ctypes.data
    table = np.zeros(ENTRY, np.int64)
    table[FUNCTION], table[PARTS] = HARMLESS, 2
    board.set_table(table.ctypes.data)
    publish(board.address + SERVING, FORWARD)
    why: list[int] = []

    def work() -> None:
        bind(max(MASK, default=None))
        why.append(poll(board.address, 0, failed, answered, 1, LOOKS, LOOKS, LOOKS))

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for trip in as_many_as_fit(50_000):
            pass_on(board.address, trip, 0, 2, FORWARD)
            end = time.monotonic() + 60
            while words[2] != trip:
                assert time.monotonic() < end
            for _ in range(trip % 100):
                pass
    finally:
        publish(board.address + CLOSED, 1)
        wake(board.address, 1)
        worker.join()
        board.close()
    assert why == [OVER]
