"""What a memory's channels promise, judged with a simple server that waits at random."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np

from lfm2kit.backend import ArrayForm, Call, Captures, Signals
from lfm2kit.batch import Batch
from lfm2kit.memory import is_ordered
from lfm2kit.testing.checks.registry import check
from lfm2kit.testing.compare import assert_same
from lfm2kit.testing.simple_server import SimpleServer
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import CheckFailed, Skipped

DELAY = 1e-4  # seconds, at most, before a worker answers
SHORT = 0.2  # seconds that a wait takes that ends without an answer
LONG = 20.0
FORWARDS = 6
WORKERS = 3
SIZES = ((5, 1), (64, 3), (0, 2), (1, 3), (3000, 2), (5, 2))  # rows, and workers that share them


@check
def channels_carry_every_trip(trial: Trial) -> None:
    """A call of a memory's channel takes all arguments there and all workers' results back.

    The calls have different sizes, take turns, and are replayed if the backend captures.
    """
    for memory in signalling(trial):
        server = SimpleServer(memory.channel(WORKERS, LONG), WORKERS, _pause(trial))
        calls = [_doubling(server, rows, workers) for rows, workers in SIZES]
        with memory.stream():
            for _ in range(FORWARDS):
                values = [_values(trial, call) for call in calls]
                with server.serving():
                    results = [_trip(memory, *one) for one in zip(calls, values, strict=True)]
                    found = [tuple(map(memory.to_host, result)) for result in results]
                for one, result in zip(values, found, strict=True):
                    assert_same(result, _doubled(one), f"results {len(one[0])} rows")
            if isinstance(trial.backend, Captures):
                _judge_replays(trial, memory, server, calls[1])
        server.channel.close()


@check
def channels_end_a_wait(trial: Trial) -> None:
    """A channel waits for nothing after a failure, or beyond its deadline, and then works again.

    The results of such a forward have all bytes 0xFF, and `failed` tells whose deadline it was.
    """
    for memory in signalling(trial):
        channel = memory.channel(1, SHORT)
        server = SimpleServer(channel)
        calls = [_doubling(server, rows, 1) for rows in (7, 5)]
        for failed in (0, 1):
            values = _values(trial, calls[1])
            with memory.stream():
                channel.failed[0] = failed
                found = tuple(map(memory.to_host, _trip(memory, calls[1], values)))
                later = tuple(
                    map(memory.to_host, _trip(memory, calls[0], _values(trial, calls[0])))
                )
            if not all((a.view(np.uint8) == 0xFF).all() for a in (*found, *later)):
                raise CheckFailed("a result without an answer has bytes other than 0xFF")
            if not failed and channel.failed[1] != calls[1].number + 1:
                raise CheckFailed(f"failed[1] is {channel.failed[1]}, not the call's number + 1")
            with memory.stream(), server.serving():
                found = tuple(map(memory.to_host, _trip(memory, calls[1], values)))
            assert_same(found, _doubled(values), "results after a failure")
        channel.close()


@check
def channels_wait_as_long_as_they_are_told(trial: Trial) -> None:
    """A channel whose deadline is changed keeps to the new one, in what was captured before too."""
    for memory in signalling(trial):
        server = SimpleServer(memory.channel(1, LONG), 1, partial(time.sleep, 2 * SHORT))
        call = _doubling(server, 5, 1)
        values = _values(trial, call)
        with memory.stream(), _captured(trial, memory, server, call, values) as run:
            for deadline in (SHORT, LONG):
                server.channel.deadline[0] = deadline
                with suppress(RuntimeError), server.serving():
                    found = memory.to_host(run())
                is_late = bool(server.channel.failed[1])
                if is_late != (deadline == SHORT):
                    raise CheckFailed(
                        f"an answer after {2 * SHORT} s was {'too late' if is_late else 'in time'} "
                        f"for a deadline of {deadline} s, written after the call was captured"
                    )
            assert_same(found, 2 * values[0], "results of an answer in time")
        server.channel.close()


@contextmanager
def _captured(
    trial: Trial, memory: Any, server: SimpleServer, call: Call, values: tuple[Any, ...]
) -> Iterator[Callable[[], Any]]:
    """Give a function that makes a trip: a replay, if the backend captures."""
    there, batch = tuple(map(memory.from_host, values)), Batch.of_sequences([[1]])
    step = partial(_trips, call, there, 1)
    if not isinstance(trial.backend, Captures):
        yield lambda: step(batch.on(memory))
        return
    with server.serving():
        memory.to_host(step(batch.on(memory)))
    replay = trial.backend.capture(step, batch)
    try:
        yield lambda: replay(batch)
    finally:
        replay.close()


def signalling(trial: Trial) -> list[Any]:
    """Return the memories of a backend whose work can call threads of the host."""
    memories = {m.name: m for m in map(trial.backend.memory, trial.first_of_kinds())}
    found = [m for m in memories.values() if isinstance(m, Signals) and is_ordered(m)]
    if not found:
        raise Skipped("its memory has no signals")
    return found


def _doubling(server: SimpleServer, rows: int, workers: int) -> Call:
    """Return a call with arguments of different sizes, which are doubled and negated."""
    forms = [
        ArrayForm((rows, 3), np.dtype(np.float32)),
        ArrayForm((rows,), np.dtype(np.int8)),
    ]

    def answer(call: Call, worker: int) -> None:
        if worker < workers:
            share = slice(rows * worker // workers, rows * (worker + 1) // workers)
            call.results[0][share] = 2 * call.inputs[0][share]
            call.results[1][share] = -call.inputs[1][share]

    return server.call(f"doubling {rows} rows", answer, forms, forms, workers)


def _values(trial: Trial, call: Call) -> tuple[Any, ...]:
    rows = len(call.inputs[0])
    return (
        trial.rng.standard_normal((rows, 3), dtype=np.float32),
        trial.rng.integers(-100, 100, rows).astype(np.int8),
    )


def _doubled(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return 2 * values[0], -values[1]


def _trip(memory: Any, call: Call, values: tuple[Any, ...]) -> tuple[Any, ...]:
    call.send(*map(memory.from_host, values))
    return call.receive()


def _judge_replays(trial: Trial, memory: Any, server: SimpleServer, call: Call) -> None:
    """Record one trip, and two of which the second takes the first one's results."""
    backend, batch = trial.backend, Batch.of_sequences([[1]])
    assert isinstance(backend, Captures)
    for trips in (1, 2):
        values = _values(trial, call)
        there = tuple(map(memory.from_host, values))
        step = partial(_trips, call, there, trips)
        with server.serving():
            memory.to_host(step(batch.on(memory)))
        replay = backend.capture(step, batch)
        for _ in range(FORWARDS):
            with server.serving():
                found = memory.to_host(replay(batch))
            assert_same(found, 2**trips * values[0], f"results of {trips} replayed trips")
        replay.close()


def _trips(call: Call, arrays: tuple[Any, ...], trips: int, batch: Batch) -> Any:
    for _ in range(trips):
        call.send(*arrays)
        arrays = call.receive()
    return arrays[0]


def _pause(trial: Trial) -> Callable[[], None]:
    return lambda: time.sleep(DELAY * float(trial.rng.random()))
