"""A channel's kernels on the CPU, where CUDA threads take turns, with host threads that answer."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cuda.constants import CHANNEL
from lfm2kit_cuda.host_layout import VECTOR, Layout, receiving_grid, sending_grid

from tests.cuda.emulated_operators import compiled

MARGIN, MOST_WORKERS, POISON = 8 * VECTOR, 8, 0xA5
LAST = 2**32 - 1  # the number of the trip before the one with number 0

Bytes = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def channel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("channel"), "channel")


@dataclass
class Seen:
    """What a trip leaves."""

    counters: list[int]
    sent: list[int]
    failed: list[int]
    inputs: list[Bytes]
    received: list[Bytes]


def trip(
    channel: Path, takes: list[Bytes], returns: list[Bytes], *, call: int = 3, before: int = 41,
    workers: int = 1, answering: int = 1, failing: int = 0, deadline: float = 100.0,
    count: int = -1, rows: int = 1,
    send: tuple[int, int] = (1, 32), receive: tuple[int, int] = (1, 32),
) -> Seen:  # fmt: skip
    """Make a trip with whole vectors of bytes; those behind each array stay as they were."""
    there, back = (Layout.of([len(array) for array in arrays]) for arrays in (takes, returns))
    answer = np.zeros(back.nbytes, np.uint8)
    for start, array in zip(back.starts, returns, strict=True):
        answer[start : start + len(array)] = array
    numbers = [
        before, call, workers, answering, failing, deadline, count, rows, *send, *receive,
        *there.vectors, *back.vectors,
    ]  # fmt: skip
    done = subprocess.run(
        [str(channel), *map(str, numbers)], input=b"".join([*takes, answer]),
        stdout=subprocess.PIPE, check=True, timeout=300,
    )  # fmt: skip
    words = 2 + CHANNEL.ANSWERED + MOST_WORKERS * CHANNEL.WORKER
    counters, control = np.split(np.frombuffer(done.stdout, np.uint32, words), [2])
    left = np.frombuffer(done.stdout, np.uint8)[4 * words :]
    inputs, left = np.split(left, [there.nbytes + MARGIN])
    assert (inputs[there.nbytes :] == POISON).all()
    received = []
    for count in back.vectors:
        array, margin, left = np.split(left, np.cumsum([count * VECTOR, MARGIN]))
        assert (margin == POISON).all()
        received.append(array)
    return Seen(
        counters.tolist(), control[:3].tolist(),
        control[CHANNEL.FAILED : CHANNEL.FAILED + 2].tolist(),
        [inputs[s : s + len(a)] for s, a in zip(there.starts, takes, strict=True)],
        received[: len(returns)],
    )  # fmt: skip


def random_arrays(rng: np.random.Generator, vectors: Any) -> list[Bytes]:
    return [rng.integers(0, 255, VECTOR * n, np.uint8) for n in vectors]


def assert_bits(some: list[Bytes], others: list[Bytes]) -> None:
    assert all(map(np.array_equal, some, others))


@pytest.mark.parametrize(
    ("takes", "returns"),
    [((), ()), ((1,), (1,)), ((0, 5), (3, 0, 1)), ((4, 8, 1, 2), (7, 4, 4, 9)),
     ((300, 0, 0, 17), (150, 33, 0, 260))],
)  # fmt: skip
@pytest.mark.parametrize("ctas", [1, 3])
def test_arrays_of_any_size_go_there_and_back(
    channel: Path, takes: tuple[int, ...], returns: tuple[int, ...], ctas: int
) -> None:
    rng = np.random.default_rng(len(takes))
    given, answer = random_arrays(rng, takes), random_arrays(rng, returns)
    seen = trip(channel, given, answer, send=(ctas, 32), receive=(ctas, 32))
    assert_bits(seen.inputs, given)
    assert_bits(seen.received, answer)
    assert (seen.counters, seen.sent, seen.failed) == ([42, 0], [42, 3, 1], [0, 0])


@pytest.mark.parametrize("count", [0, 1, 2, 5, 7])
@pytest.mark.parametrize("ctas", [1, 3])
def test_only_the_first_rows_go_there_and_back(channel: Path, count: int, ctas: int) -> None:
    """Rows of 35, 1 and 3 vectors, and of 20 bytes: seven of them fill 8.75 vectors."""
    rng, rows = np.random.default_rng(count), 7
    given = random_arrays(rng, [35 * rows, rows, 9])
    answer = random_arrays(rng, [3 * rows, 9])
    seen = trip(channel, given, answer, count=count, rows=rows, send=(ctas, 32), receive=(ctas, 32))
    for got, whole in zip([*seen.inputs, *seen.received], [*given, *answer], strict=True):
        row_bytes = len(whole) // rows // 4 * 4
        there = row_bytes * count
        np.testing.assert_array_equal(got[:there], whole[:there])
        vectors = -(-len(whole) // VECTOR * count // rows)
        assert (got[vectors * VECTOR :] == POISON).all()
    assert (seen.sent, seen.failed) == ([42, 3, count], [0, 0])


def test_a_trip_with_the_grids_of_its_size_waits_for_all_its_workers(channel: Path) -> None:
    rng = np.random.default_rng(1)
    given, answer = random_arrays(rng, [512]), random_arrays(rng, [64, 64])
    for workers in (1, 3, MOST_WORKERS):
        seen = trip(
            channel, given, answer, workers=workers, answering=workers, send=sending_grid(512),
            receive=receiving_grid(128, workers),
        )  # fmt: skip
        assert_bits(seen.inputs + seen.received, given + answer)


def test_numbers_of_trips_begin_again_at_0(channel: Path) -> None:
    seen = trip(channel, [], random_arrays(np.random.default_rng(2), [9]), before=LAST)
    assert (seen.counters, seen.sent, seen.failed) == ([0, 0], [0, 3, 1], [0, 0])


def test_a_worker_that_has_failed_leaves_no_results(channel: Path) -> None:
    answer = random_arrays(np.random.default_rng(3), [9, 70])
    seen = trip(channel, [], answer, failing=1, receive=(2, 32))
    assert seen.failed == [1, 0]
    assert all((array == 0xFF).all() for array in seen.received)


def test_a_mark_ends_the_wait_for_those_who_never_answer(channel: Path) -> None:
    answer = random_arrays(np.random.default_rng(5), [9])
    seen = trip(channel, [], answer, workers=2, failing=1)
    assert seen.failed == [1, 0]
    assert (seen.received[0] == 0xFF).all()


@pytest.mark.parametrize("answering", [0, 1])
def test_a_deadline_marks_the_call_and_leaves_no_results(channel: Path, answering: int) -> None:
    answer = random_arrays(np.random.default_rng(4), [9, 70])
    seen = trip(channel, [], answer, workers=2, answering=answering, deadline=0.05)
    assert seen.failed == [0, 3 + 1]
    assert all((array == 0xFF).all() for array in seen.received)
