"""Trips from a real GPU to threads of this process and back, captured or not, late on both sides.

    python -m pytest -m gpu tests/cuda/test_channel_on_gpu.py

Threads answer with bytes that depend on every byte that was sent, and on the call.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cuda.requirements import why_unavailable

from lfm2kit.crossing import ArrayForm
from tests.cuda.test_streams_on_gpu import SIZE, late_copy, memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

WORKERS = 3
DEADLINE = 30.0  # of trips that are answered
SOON = 0.05  # of those that are not
TRIPS, REPLAYS = 22, 100
LAST = 2**32 - 1

Arrays = Sequence[npt.NDArray[Any]]
Answer = Callable[
    [int, Arrays, Arrays], None
]  # the call's number, its inputs, results to be filled


class Asked(NamedTuple):
    call: Any
    workers: int


class Server:
    """Threads that answer a channel's calls, each with a share of the bytes of every result."""

    def __init__(self, channel: Any, answer: Answer) -> None:
        self.channel, self.answer = channel, answer
        self.calls: list[Asked] = []
        self.late = 0.0  # most seconds by which each answer comes late
        self.is_hasty = False  # whether it says that an answer is there before it is
        self._stopped = False
        self._seen = [int(channel.sent[0])] * WORKERS  # trips that are done with
        self._threads = [threading.Thread(target=self._work, args=(i,)) for i in range(WORKERS)]

    def call(self, takes: Sequence[ArrayForm], returns: Sequence[ArrayForm], workers: int) -> Any:
        call = self.channel.call(takes, returns, workers)
        self.calls.append(Asked(call, workers))
        return call

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def settle(self) -> None:
        """Wait until the threads are done with the newest trip."""
        while set(self._seen) != {int(self.channel.sent[0])}:
            time.sleep(1e-3)

    def stop(self) -> None:
        self._stopped = True
        for thread in self._threads:
            thread.join()

    def _work(self, worker: int) -> None:
        rng = np.random.default_rng(worker)
        while not self._stopped:
            trip = int(self.channel.sent[0])
            if trip == self._seen[worker]:
                time.sleep(0)
                continue
            asked = self.calls[int(self.channel.sent[1])]
            if worker < asked.workers:
                self._answer(worker, trip, asked, rng)
            self._seen[worker] = trip

    def _answer(self, worker: int, trip: int, asked: Asked, rng: np.random.Generator) -> None:
        call = asked.call
        shares = [np.empty_like(array) for array in call.results]
        if self.is_hasty:
            self.channel.answered[worker, 0] = trip
        try:
            self.answer(call.number, call.inputs, shares)
        except ZeroDivisionError:
            self.channel.failed[0] = 1
        time.sleep(self.late * rng.random())
        for result, share in zip(call.results, shares, strict=True):
            to, of = result.reshape(-1).view(np.uint8), share.reshape(-1).view(np.uint8)
            first, last = (len(of) * i // asked.workers for i in (worker, worker + 1))
            to[first:last] = of[first:last]
        self.channel.answered[worker, 0] = trip


def mixed(number: int, inputs: Arrays, results: Arrays) -> None:
    """Fill the results with bytes that depend on the call and on all inputs."""
    seed = zlib.crc32(b"".join(array.tobytes() for array in inputs), number)
    rng = np.random.default_rng(seed)
    for array in results:
        array.reshape(-1).view(np.uint8)[...] = rng.integers(0, 255, array.nbytes, np.uint8)


def tripled(number: int, inputs: Arrays, results: Arrays) -> None:
    np.multiply(inputs[0], np.int32(3), results[0])
    results[0][...] += np.int32(number + 1)


def failing(number: int, inputs: Arrays, results: Arrays) -> None:
    raise ZeroDivisionError


@contextmanager
def serving(answer: Answer, deadline: float = DEADLINE) -> Iterator[Server]:
    """Give a server at work, with a channel of its own, in a stream of its own."""
    import cupy

    with memory().stream():
        server = Server(memory().channel(WORKERS, deadline), answer)
        server.start()
        try:
            yield server
        finally:
            cupy.cuda.get_current_stream().synchronize()
            server.stop()
            server.channel.close()


def form(*shape: int, dtype: Any = np.int32) -> ArrayForm:
    return ArrayForm(shape, np.dtype(dtype))


def random_forms(rng: np.random.Generator) -> list[ArrayForm]:
    """Up to four arrays, empty ones and odd sizes among them, now and then a large one."""
    most = rng.choice([3, 40, 400], p=[0.4, 0.4, 0.2])
    return [
        form(
            *rng.integers(0, most, rng.integers(1, 3)),
            dtype=(np.uint8, np.float32)[rng.integers(2)],
        )
        for _ in range(rng.integers(0, 5))
    ]


def random_arrays(rng: np.random.Generator, forms: Sequence[ArrayForm]) -> list[Any]:
    return [
        rng.integers(0, 255, int(np.prod(f.shape)) * f.dtype.itemsize, np.uint8)
        .view(f.dtype)
        .reshape(f.shape)
        for f in forms
    ]


def expected(number: int, given: Arrays, forms: Sequence[ArrayForm]) -> list[Any]:
    results = [np.empty(f.shape, f.dtype) for f in forms]
    mixed(number, given, results)
    return results


def assert_bits(some: Arrays, others: Arrays) -> None:
    assert [array.shape for array in some] == [array.shape for array in others]
    assert [array.tobytes() for array in some] == [array.tobytes() for array in others]


def on_host(arrays: Sequence[Any]) -> list[Any]:
    arriving = [memory().start_to_host(array) for array in arrays]
    return [copy.wait() for copy in arriving]


def is_filled(array: npt.NDArray[Any]) -> bool:
    return array.tobytes() == b"\xff" * array.nbytes


class Chain:
    """A graph of trips by three calls in turn, each of which sends what the one before has brought.

    It runs in the stream that was current when it was made.
    """

    def __init__(self, server: Server, rows: int, trips: int = TRIPS) -> None:
        import cupy
        from lfm2kit_cuda.capture import recorded

        forms = [form(rows, 5)]
        self._calls = [server.call(forms, forms, 1 + i % WORKERS) for i in range(3)]
        self._trips, self.shape = trips, forms[0].shape
        self._stream = cupy.cuda.get_current_stream()
        self._start = cupy.zeros(self.shape, np.int32)
        self._pool = cupy.cuda.MemoryPool()  # has what lies between trips
        with cupy.cuda.using_allocator(self._pool.malloc):
            self._graph, self._result = recorded(self._step, None)

    def _step(self, batch: Any) -> Any:
        x = self._start
        for i in range(self._trips):
            call = self._calls[i % 3]
            call.send(x)
            (x,) = call.receive()
        return x

    def __call__(self, x: npt.NDArray[np.int32]) -> Any:
        """Enqueue a replay, and return its result on its way to the host."""
        with self._stream:
            self._start[...] = memory().from_host(x)
            self._graph.launch(self._stream)
            return memory().start_to_host(self._result)

    def expected(self, x: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        x = x.copy()
        for i in range(self._trips):
            tripled(self._calls[i % 3].number, [x], [x])
        return x

    def check(self, x: npt.NDArray[np.int32]) -> None:
        assert_bits([self(x).wait()], [self.expected(x)])

    def full(self, value: int) -> npt.NDArray[np.int32]:
        return np.full(self.shape, value, np.int32)


@pytest.mark.parametrize("seed", range(40))
def test_arrays_of_any_form_go_there_and_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    with serving(mixed) as server:
        for _ in range(5):
            takes, returns = random_forms(rng), random_forms(rng)
            call = server.call(takes, returns, int(rng.integers(1, WORKERS + 1)))
            server.late = rng.choice([0, 2e-3])
            for _ in range(3):
                given = random_arrays(rng, takes)
                call.send(*map(memory().from_host, given))
                got = on_host(call.receive())
                assert_bits(got, expected(call.number, given, returns))
        assert not server.channel.failed.any()


def test_large_arrays_go_there_and_back() -> None:
    rng, takes, returns = np.random.default_rng(0), [form(2048, 2048)], [form(2048, 2049)]
    with serving(mixed) as server:
        call = server.call(takes, returns, WORKERS)
        given = random_arrays(rng, takes)
        call.send(*map(memory().from_host, given))
        assert_bits(on_host(call.receive()), expected(call.number, given, returns))


def test_views_are_sent_as_they_look() -> None:
    import cupy

    whole = cupy.arange(60, dtype=np.int32).reshape(6, 10)
    cupy.cuda.Device().synchronize()
    with serving(mixed) as server:
        for view in (whole[1:], whole.reshape(-1)[1:], whole[:, 1:4], whole.T, whole[::2, ::-1]):
            call = server.call([form(*view.shape)], [form(9)], 1)
            call.send(view)
            given = [np.ascontiguousarray(cupy.asnumpy(view))]
            assert_bits(on_host(call.receive()), expected(call.number, given, [form(9)]))


def test_work_between_sending_and_receiving_takes_place() -> None:
    import cupy

    with serving(tripled) as server:
        call = server.call([form(8)], [form(8)], 1)
        x = cupy.arange(8, dtype=np.int32)
        call.send(x)
        x += 100  # has no influence on what was sent
        (y,) = call.receive()
        got_x, got_y = on_host([x, y])
    assert_bits([got_x, got_y], [np.arange(8, dtype=np.int32) + 100, 3 * got_x - 300 + 1])


@pytest.mark.parametrize("rows", [1, 16, 2048])
def test_replayed_trips_bring_each_replays_own_results(rows: int) -> None:
    rng = np.random.default_rng(rows)
    with serving(tripled) as server:
        chain = Chain(server, rows)
        for turn in range(REPLAYS):
            server.late = 1e-3 if turn % 10 == 0 else 0.0
            chain.check(rng.integers(-1000, 1000, chain.shape, np.int32))
        assert not server.channel.failed.any()


def test_replays_that_are_enqueued_at_once_follow_one_another() -> None:
    with serving(tripled) as server:
        chain = Chain(server, 16)
        arriving = [chain(chain.full(turn)) for turn in range(20)]
        want = [chain.expected(chain.full(turn)) for turn in range(20)]
        assert_bits([copy.wait() for copy in arriving], want)


def test_a_late_device_and_late_threads() -> None:
    import cupy

    source, target = cupy.zeros(SIZE, cupy.float32), cupy.zeros(SIZE, cupy.float32)
    cupy.cuda.Device().synchronize()
    with serving(tripled) as server:
        chain, server.late = Chain(server, 16), 5e-3
        for turn in range(3):
            late_copy()(source, target, 20_000)
            arriving = chain(chain.full(turn))
            late_copy()(source, target, 20_000)
            assert_bits([arriving.wait()], [chain.expected(chain.full(turn))])


def test_an_answer_that_comes_before_its_results_is_seen() -> None:
    """So the tests above would see a wait that is left out."""
    with serving(tripled) as server:
        chain, server.late, server.is_hasty = Chain(server, 16, trips=3), 0.1, True
        got = chain(chain.full(5)).wait()
        server.settle()
    assert not np.array_equal(got, chain.expected(chain.full(5)))


def test_a_call_that_needs_more_memory_leaves_a_graph_what_it_has() -> None:
    rng = np.random.default_rng(1)
    with serving(tripled) as server:
        chain = Chain(server, 16)
        for rows in (1, 1000, 10_000, 100_000):
            call = server.call([form(rows, 5)], [form(rows, 5)], WORKERS)
            x = rng.integers(-1000, 1000, (rows, 5), np.int32)
            call.send(memory().from_host(x))
            assert_bits(on_host(call.receive()), [3 * x + np.int32(call.number + 1)])
            chain.check(x[:1].repeat(16, axis=0))


def test_numbers_of_trips_begin_again_at_0() -> None:
    with serving(tripled) as server:
        chain = Chain(server, 16)
        server.channel.counters.set(np.array([LAST - 10, 0], np.uint32))
        for turn in range(3):
            chain.check(chain.full(turn))
        assert server.channel.sent[0] == 3 * TRIPS - 11


def test_two_channels_in_two_streams() -> None:
    with serving(tripled) as one:
        chains = [Chain(one, 16)]
        with serving(tripled) as other:
            chains.append(Chain(other, 16))
            one.late = other.late = 2e-4
            for turn in range(20):
                values = [chain.full(10 * turn + i) for i, chain in enumerate(chains)]
                arriving = [chain(x) for chain, x in zip(chains, values, strict=True)]
                want = [chain.expected(x) for chain, x in zip(chains, values, strict=True)]
                assert_bits([copy.wait() for copy in arriving], want)


@pytest.mark.parametrize("workers", [1, WORKERS])
def test_a_call_that_fails_leaves_no_results_and_the_next_forward_works(workers: int) -> None:
    rng, returns = np.random.default_rng(2), [form(50, 4), form(3, dtype=np.float32)]
    with serving(failing) as server:
        call = server.call([form(16)], returns, workers)
        x = rng.integers(0, 100, 16, np.int32)
        for _ in range(3):
            call.send(memory().from_host(x))
            assert all(map(is_filled, on_host(call.receive())))
            assert server.channel.failed.tolist() == [1, 0]
        server.settle()
        server.channel.failed[...], server.answer = 0, mixed
        call.send(memory().from_host(x))
        assert_bits(on_host(call.receive()), expected(0, [x], returns))


def test_after_a_deadline_nothing_waits_until_the_marks_are_gone() -> None:
    import cupy

    with memory().stream():
        channel = memory().channel(WORKERS, SOON)
        calls = [channel.call([form(16)], [form(2000), form(0)], n) for n in (1, WORKERS)]
        x = cupy.zeros(16, np.int32)
        for first in (1, 0):
            calls[first].send(x)
            results = on_host(calls[first].receive())
            assert channel.failed.tolist() == [0, first + 1]
            for call in calls:
                call.send(x)
                results += on_host(call.receive())
            assert all(map(is_filled, results))
            assert channel.failed.tolist() == [0, first + 1]
            channel.failed[...] = 0
        channel.close()


def test_a_captured_trip_that_is_never_answered_ends_and_the_next_one_works() -> None:
    with serving(tripled, deadline=1.0) as server:
        chain, calls = Chain(server, 16), server.calls
        server.calls = [Asked(asked.call, 0) for asked in calls]
        assert is_filled(chain(chain.full(7)).wait())
        assert server.channel.failed.tolist() == [0, 1]
        server.settle()
        server.calls, server.channel.failed[...] = calls, 0
        chain.check(chain.full(7))


def test_a_mark_of_the_host_ends_a_wait_without_a_deadline() -> None:
    import cupy

    with memory().stream():
        channel = memory().channel(1, float("inf"))
        call = channel.call([form(16)], [form(2000)], 1)
        call.send(cupy.zeros(16, np.int32))
        (result,) = call.receive()
        time.sleep(0.1)
        channel.failed[0] = 1
        assert is_filled(on_host([result])[0])
        channel.close()


@pytest.mark.parametrize("other", [form(15), form(16, dtype=np.float32), form(4, 4)])
def test_other_arrays_than_those_of_the_call_are_refused(other: ArrayForm) -> None:
    import cupy

    with memory().stream():
        channel = memory().channel(1, SOON)
        call = channel.call([form(16)], [], 1)
        with pytest.raises(ValueError, match="call 0 takes"):
            call.send(cupy.zeros(other.shape, other.dtype))
        with pytest.raises(ValueError, match="call 0 takes"):
            call.send()
        assert not channel.sent.any()
