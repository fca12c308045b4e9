"""Measures how long ranks take to exchange messages, and to copy rows, with all of them at work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np

from lfm2kit.building.curves import Curve
from lfm2kit.building.rank_rates import ExchangeKey, ExchangeRates
from lfm2kit.building.records import LEAST
from lfm2kit.measuring.together import Stopwatch, largest
from lfm2kit.memory import HOST
from lfm2kit.progress import step
from lfm2kit.ranks.groups import AUTO, Grouping, groupings
from lfm2kit.transport import Transport

MESSAGES = (4, 2**10, 2**14, 2**17, 2**20, 2**22, 2**24)  # bytes, to each other rank
MOST_BYTES = 64 * 2**20  # that a rank sends at once
EXCHANGE_SECONDS = 10.0  # for one group: what would take longer is not measured
LEAST_TIMES, MOST_TIMES, SIZE_SECONDS = 3, 15, 1.0  # that a size is exchanged, and for how long
COPY_BYTES = 32 * 2**20


def exchange_rates(
    transport: Transport, done: Callable[[], None] = lambda: None
) -> Iterator[ExchangeRates]:
    """Measure the exchange among the ranks of each machine, and then among all of them.

    Every rank of the job calls this.  Call `done` after each.
    """
    for among in groups_of(transport, done):
        key = ExchangeKey(among.world.size, len(set(among.world.nodes)))
        yield ExchangeRates(key, _exchange(among))


def groups_of(transport: Transport, done: Callable[[], None] = lambda: None) -> Iterator[Transport]:
    """Yield the measured groups that this rank is in; call `done` after each measured group."""
    for grouping in measured_groups(transport):
        _, among = grouping.place(transport.world, transport)
        if among is not None:
            yield among
        done()


def measured_groups(transport: Transport) -> list[Grouping]:
    """Return the groups whose exchanges `exchange_rates` measures, one after the other."""
    if transport.world.size == 1:
        return []
    found = groupings(AUTO, None, transport.world, transport)
    return [one for one in found if max(map(len, one.groups)) > 1]


def copied_per_second(transport: Transport, hidden_size: int) -> float:
    """Return the bytes per second of rows that a rank copies into another order."""
    rows = COPY_BYTES // (4 * hidden_size) + 1
    x = np.ones((rows, hidden_size), np.float32)
    into, order = np.empty_like(x), np.random.default_rng(0).permutation(rows)
    watch = Stopwatch(HOST, transport)
    seconds = watch.seconds(lambda: np.take(x, order, axis=0, out=into, mode="clip"))
    return x.nbytes / seconds


def _exchange(transport: Transport) -> Curve:
    """Return the seconds by the bytes of a message, up to as many as there is time for."""
    begin, sizes, seconds = time.perf_counter(), list[int](), list[float]()
    for nbytes in MESSAGES:
        ahead = (1 + LEAST_TIMES) * seconds[-1] * nbytes / sizes[-1] if sizes else 0.0
        over = largest(transport, time.perf_counter() - begin + ahead) > EXCHANGE_SECONDS
        if over or nbytes * transport.world.size > MOST_BYTES:
            break
        seconds.append(_seconds(transport, nbytes))
        sizes.append(nbytes)
    return Curve(tuple(sizes), tuple(seconds))


def _seconds(transport: Transport, nbytes: int) -> float:
    """Return the median seconds until all ranks have the others' messages."""
    rank, size = transport.world.rank, transport.world.size
    rows, into = (np.zeros((size - 1, nbytes), np.uint8) for _ in range(2))
    counts = [int(other != rank) for other in range(size)]

    def once() -> float:
        step("measuring an exchange")
        largest(transport, 0.0)  # so that all begin now
        start = time.perf_counter()
        transport.all_to_all(rows, counts, counts, into)
        return largest(transport, time.perf_counter() - start)

    first = once()
    times = max(LEAST_TIMES, min(MOST_TIMES, int(SIZE_SECONDS / max(first, LEAST))))
    return max(LEAST, statistics.median(once() for _ in range(times)))
