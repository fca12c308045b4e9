"""What a memory promises that picks rows: they travel alone, and come back to their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from lfm2kit.backend import ArrayForm, Call, Captures, PicksRows
from lfm2kit.batch import Batch
from lfm2kit.testing.checks.channels import FORWARDS, LONG, signalling
from lfm2kit.testing.checks.registry import check
from lfm2kit.testing.compare import assert_same
from lfm2kit.testing.simple_server import SimpleServer
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import Skipped

IDS = 12  # of experts; -1 and IDS are nobody's
SIZES = ((40, 5, 3), (0, 4, 2), (1, 8, 4), (700, 64, 4))  # rows, columns, ids of a row
WANTED: tuple[tuple[int, ...], ...] = ((2, 7), (), tuple(range(IDS)), (11,))

Values = tuple[Any, Any]  # x, float32 [rows, columns], and ids, int32 [rows, k]


@check
def picked_rows_travel_alone(trial: Trial) -> None:
    """Rows with a wanted id are sent, in their order; what comes back is put where they were.

    All other rows are +0.  Trips are replayed, with other ids, if the backend captures.
    """
    for memory in _picking(trial):
        server = SimpleServer(memory.channel(1, LONG))
        for rows, columns, k in SIZES:
            call = _doubling(server, rows, columns, k)
            for wanted in WANTED:
                values = partial(_values, trial, rows, columns, k)
                _judge(trial, memory, server, _trips(memory, call, wanted), values, wanted)
        server.channel.close()


def _judge(
    trial: Trial,
    memory: Any,
    server: SimpleServer,
    trip: Callable[[Sequence[Any]], Any],
    values: Callable[[], Values],
    wanted: Sequence[int],
) -> None:
    with memory.stream():
        for _ in range(FORWARDS):
            one = values()
            with server.serving():
                found = memory.to_host(trip(list(map(memory.from_host, one))))
            assert_same(found, _doubled(one, wanted), f"{len(one[0])} rows, of which {wanted}")
        if isinstance(trial.backend, Captures):
            _judge_replays(trial.backend, memory, server, trip, values(), wanted)


def _judge_replays(
    backend: Captures,
    memory: Any,
    server: SimpleServer,
    trip: Callable[[Sequence[Any]], Any],
    values: Values,
    wanted: Sequence[int],
) -> None:
    """Record two trips, of which the second takes the first one's result."""
    x, ids = map(memory.from_host, values)

    def step(batch: Batch) -> Any:
        return trip([trip([x, ids]), ids])

    batch = Batch.of_sequences([[1]])
    with server.serving():
        memory.to_host(step(batch.on(memory)))
    replay = backend.capture(step, batch)
    for _ in range(FORWARDS):
        with server.serving():
            found = memory.to_host(replay(batch))
        twice = _doubled((_doubled(values, wanted), values[1]), wanted)
        assert_same(found, twice, f"{len(values[0])} rows, of which {wanted}, replayed")
    replay.close()


def _trips(memory: PicksRows, call: Call, wanted: Sequence[int]) -> Callable[[Sequence[Any]], Any]:
    picker = memory.picker(wanted)

    def trip(arrays: Sequence[Any]) -> Any:
        picked = picker(arrays, arrays[1])
        call.send(*picked.arrays, count=picked.count)
        (result,) = call.receive(picked.count)
        return picked.put_back(result)

    return trip


def _picking(trial: Trial) -> list[Any]:
    found = [memory for memory in signalling(trial) if isinstance(memory, PicksRows)]
    if not found:
        raise Skipped("its memory picks no rows")
    return found


def _doubling(server: SimpleServer, rows: int, columns: int, k: int) -> Call:
    """Return a call that doubles the rows that came, and fills the others with NaN."""
    x = ArrayForm((rows, columns), np.dtype(np.float32))
    ids = ArrayForm((rows, k), np.dtype(np.int32))

    def answer(call: Call, worker: int) -> None:
        count = int(server.channel.sent[2])
        call.results[0][:count] = 2 * call.inputs[0][:count]
        call.results[0][count:] = np.nan

    return server.call(f"doubling {rows} rows", answer, [x, ids], [x])


def _values(trial: Trial, rows: int, columns: int, k: int) -> Values:
    ids = trial.rng.integers(-1, IDS + 1, (rows, k)).astype(np.int32)
    return trial.rng.standard_normal((rows, columns), dtype=np.float32), ids


def _doubled(values: Values, wanted: Sequence[int]) -> Any:
    x, ids = values
    return np.where(np.isin(ids, wanted).any(axis=1, keepdims=True), 2 * x, np.float32(0))
