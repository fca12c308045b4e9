"""The threads that call blocks for a device: results, faults, and what they do between forwards."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numba
import numpy as np
import pytest
from lfm2kit_cpu_simd.backend import CpuSimdBackend
from lfm2kit_cpu_simd.crew import CREW
from lfm2kit_hybrid import cores, polling, workers
from lfm2kit_hybrid import server as server_module
from lfm2kit_hybrid.backend import HybridBackend
from lfm2kit_hybrid.board import (
    ASLEEP,
    CLOSED,
    LINE,
    NOTED,
    READ_END,
    SEEN,
    SERVING,
    SHARED_BY,
    TABLE,
    TURN,
    TURNS_CALL,
    WANTED,
    WRITE_END,
)
from lfm2kit_hybrid.server import HostCrossing, Server

from lfm2kit import progress
from lfm2kit.backend import Backend, Context, Fills, NativeCall
from lfm2kit.batch import Batch
from lfm2kit.errors import Lfm2kitError
from lfm2kit.memory import own_stream
from lfm2kit.progress import telling
from lfm2kit.testing.device import DeviceMemory
from lfm2kit.testing.runner import judged
from tests.conformance.crossing import DeviceBackend
from tests.core.small import build, small_spec
from tests.core.test_model import SEQUENCES
from tests.hybrid.test_polling import as_many_as_fit

NATIVE = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3)
Fault = Callable[[], object]


def nothing() -> None:
    pass


class Doubling:
    """Doubles [rows, 3] numbers; `fault` is called before, from the second call on."""

    def __init__(self, fault: Fault = nothing) -> None:
        self.fault = fault
        self.is_first = True

    def __call__(self, x: Any) -> Any:
        if not self.is_first:
            self.fault()
        self.is_first = False
        return 2 * x


class NativeDoubling(Doubling):
    """The same as machine code: each share takes its time."""

    def __init__(self, share: Callable[[int], object] = lambda part: None) -> None:
        super().__init__()
        self.share = share

    def native(self) -> NativeCall:
        function = NATIVE(self._part)
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None
        return NativeCall(address, 77, function)

    def _part(
        self, argument: int, inputs: int, results: int, rows: int, part: int, of: int
    ) -> None:
        assert argument == 77
        self.share(part)
        x, out = (
            np.ctypeslib.as_array(
                ctypes.cast(
                    ctypes.cast(side, ctypes.POINTER(ctypes.c_void_p))[0] or 0,
                    ctypes.POINTER(ctypes.c_float),
                ),
                (rows, 3),
            )
            for side in (inputs, results)
        )
        share = slice(rows * part // of, rows * (part + 1) // of)
        out[share] = 2 * x[share]


@contextmanager
def forward(device: DeviceMemory, server: Server) -> Iterator[None]:
    """Surround a forward as `LFM2.running` does."""
    with own_stream(device), server.serving():
        yield


def call(device: DeviceMemory, crossing: HostCrossing, rows: int = 5) -> None:
    """Call a crossing in a forward of its own, and look at the result."""
    x = np.random.default_rng(rows).standard_normal((rows, 3), dtype=np.float32)
    with forward(device, crossing.server):
        result = device.to_host(crossing(device.from_host(x)))
    np.testing.assert_array_equal(result, 2 * x)


def failure(device: DeviceMemory, crossing: HostCrossing) -> str:
    with pytest.raises(Exception, match=crossing._name) as caught:
        call(device, crossing)
    return f"{caught.type.__name__}: {caught.value}"


def end_by_itself(device: DeviceMemory, crossing: HostCrossing) -> None:
    """Raise an error in a forward, as the core may for what a failed block has left."""
    with forward(device, crossing.server):
        device.to_host(crossing(device.from_host(np.ones((5, 3), np.float32))))
        raise ZeroDivisionError


def raising(error: BaseException) -> Fault:
    def fault() -> None:
        raise error

    return fault


def raising_for_all(error: BaseException) -> Callable[..., object]:
    return lambda *arguments: raising(error)()


def until(is_true: Callable[[], object]) -> None:
    """Wait until something is so, much longer than it takes."""
    end = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < end
        time.sleep(1e-4)


def asleep(server: Server) -> list[int]:
    """Return the numbers of the workers that sleep."""
    board, started = server._workers._board, len(server._workers._threads)
    return [worker for worker in range(started) if board[board.of(worker, ASLEEP)]]


@pytest.fixture
def device() -> DeviceMemory:
    return DeviceMemory(1e-4)


@pytest.fixture
def server(device: DeviceMemory) -> Server:
    return Server(device, [None, None, None])


def hybrid(gpu: Backend) -> HybridBackend:
    backends = {"cuda": gpu, "cpu_simd": CpuSimdBackend(Context())}
    return HybridBackend(Context(create_backend=backends.__getitem__))


def test_a_model_with_its_choices_on_the_host_is_captured_and_has_the_references_bits() -> None:
    gpu = DeviceBackend(DeviceMemory(1e-4))
    backend = hybrid(gpu)
    wrap = telling(lambda name, spec, block: block, {"layers.2.feed_forward.router.choice"})
    model = build(small_spec(), "hybrid", {"hybrid": backend}, wrap=wrap)
    reference = build(small_spec())
    rng = np.random.default_rng(0)
    for _ in range(5):
        for lengths in ([5, 1, 8], [3], [600]):
            batch = Batch.of_sequences([rng.integers(50, size=n) for n in lengths])
            np.testing.assert_array_equal(model.logits(batch), reference.logits(batch))
    assert len(gpu.replays) == 3
    (server,) = backend._servers.values()
    assert all(called.native is not None for called in server._workers._calls._calls.values())
    assert {part.crosser for part in model.placed.tree() if part.is_copied} == {"hybrid"}


@pytest.mark.parametrize("name", ["captured-forward", "captured-steps", "whole-model"])
def test_it_is_judged_on_a_device(name: str) -> None:
    result = judged(name, hybrid(DeviceBackend(DeviceMemory(1e-4))))
    assert result.verdict == "passed", result.detail


def test_all_experts_of_a_layer_on_the_host_are_crossed_too() -> None:
    gpu = DeviceBackend(DeviceMemory(1e-4))
    plan = "hybrid,2.experts=reference"
    model = build(small_spec(), plan, {"hybrid": hybrid(gpu)})
    want = build(small_spec()).logits(Batch.of_sequences(SEQUENCES))
    for _ in range(4):
        np.testing.assert_array_equal(model.logits(Batch.of_sequences(SEQUENCES)), want)
    assert len(gpu.replays) == 1


class Filling:
    """A block of the host's memory that writes where it is told to."""

    def __init__(self) -> None:
        self.filled: list[int] = []  # addresses

    def __call__(self, x: Any) -> Any:
        return 2 * x

    def fill(self, results: Any, x: Any) -> None:
        (result,) = results
        np.multiply(x, 2, out=result)
        self.filled.append(result.ctypes.data)


def test_a_block_that_fills_writes_where_the_device_reads(
    device: DeviceMemory, server: Server
) -> None:
    block = Filling()
    crossing = server.crossing("layers.2", block)
    for _ in range(3):
        call(device, crossing, 100)
    ((made, _),) = crossing._calls.values()
    assert block.filled == 2 * [made.results[0].ctypes.data]


def test_what_is_told_of_a_block_does_not_hide_that_it_fills(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(progress.THIS_PROCESS, "step", told.append)
    wrap = telling(lambda name, spec, block: block, {"layers.2"})
    block = wrap("layers.2", small_spec(), Filling())
    assert isinstance(block, Fills)
    block.fill([np.empty(3)], np.ones(3))
    assert told == ["layers.2"]


def test_shares_may_end_in_any_order(device: DeviceMemory, server: Server) -> None:
    rng = np.random.default_rng(0)
    parts: list[int] = []

    def share(part: int) -> None:
        time.sleep(1e-3 * rng.random())
        parts.append(part)

    crossing = server.crossing("layers.2", NativeDoubling(share))
    for rows in (127, 128, 192, 5000, 1, 128, 192, 5000, 0, 192, 128):
        call(device, crossing, rows)
    assert sorted(set(parts)) == [0, 1, 2]
    table = server._workers._calls._table
    assert list(table[:6, polling.PARTS]) == [1, 2, 3, 3, 1, 1]


@pytest.mark.parametrize("core", [None, max(cores.MASK, default=0)])
def test_only_a_worker_without_a_core_of_its_own_offers_it_before_it_sleeps(
    core: int | None, device: DeviceMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[int] = []

    def looked(*arguments: int) -> Any:
        pauses.append(arguments[5])
        return polling.poll(*arguments)

    monkeypatch.setattr(workers, "poll", looked)
    call(device, crossing := Server(device, [core]).crossing("layers.2", NativeDoubling()))
    call(device, crossing)
    assert pauses == [polling.PAUSES if core is None else polling.PATIENCE]


def test_more_calls_than_the_first_table_has(device: DeviceMemory, server: Server) -> None:
    crossing = server.crossing("layers.2", Doubling())
    for rows in (*range(1, 150), 1, 149, 64, 65):
        call(device, crossing, rows)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no"), "RuntimeError: layers.3.choice raised ValueError: no"),
        (Lfm2kitError("too few"), "Lfm2kitError: layers.3.choice: too few"),
        (MemoryError("7 bytes"), "MemoryError: layers.3.choice: 7 bytes"),
        (SystemExit(3), "RuntimeError: layers.3.choice raised SystemExit: 3"),
    ],
)
def test_what_a_block_raises_ends_its_forward_with_its_name(
    error: BaseException, said: str, device: DeviceMemory, server: Server
) -> None:
    good = server.crossing("layers.2.choice", NativeDoubling())
    bad = server.crossing("layers.3.choice", Doubling(raising(error)))
    call(device, good)
    call(device, bad)
    for _ in range(2):
        assert failure(device, bad) == said
        call(device, good)


def test_nothing_of_a_failed_call_is_kept_once_it_is_reported(
    device: DeviceMemory, server: Server
) -> None:
    left: list[weakref.ref[Any]] = []

    def fault() -> None:
        array = np.zeros(3)
        left.append(weakref.ref(array))
        raise ValueError(str(array))

    crossing = server.crossing("layers.3.choice", Doubling(fault))
    call(device, crossing)
    failure(device, crossing)
    gc.collect()
    assert [array() for array in left] == [None]


def test_a_call_that_nobody_knows_is_answered_by_a_failure(
    device: DeviceMemory, server: Server
) -> None:
    crossing = server.crossing("call 0", Doubling())
    call(device, crossing)
    known = server._workers._calls._calls.pop(0)
    assert failure(device, crossing) == "RuntimeError: call 0 raised KeyError: 0"
    server._workers._calls._calls[0] = known
    call(device, crossing)


def test_another_result_than_the_first_is_a_failure(device: DeviceMemory, server: Server) -> None:
    block = Doubling()
    crossing = server.crossing("layers.3.mlp", block)
    call(device, crossing)
    block.__class__ = type("Wide", (Doubling,), {"__call__": lambda self, x: np.float64(2) * x})
    assert "it returned float64 (5, 3), and float32 (5, 3) before" in failure(device, crossing)


def test_a_deadline_that_passes_names_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block is called by the first worker, which the next forward waits for."""
    monkeypatch.setattr(progress.THIS_PROCESS, "deadline", 0.1)
    device = DeviceMemory()
    server = Server(device, [None])
    go_on = threading.Event()
    crossing = server.crossing("layers.3.choice", Doubling(lambda: go_on.wait(60)))
    call(device, crossing)
    said = failure(device, crossing)
    assert said == (
        "Lfm2kitError: layers.3.choice: no answer within 0.1 s; if it is only slow, give a longer "
        "deadline"
    )
    assert failure(device, crossing) == (
        "Lfm2kitError: layers.3.choice: it was called in a forward that has failed, and has not "
        "returned after 0.1 s more"
    )
    go_on.set()
    call(device, crossing)


def test_a_forward_has_the_deadline_that_is_set_when_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever it was when the server was made; the longest of its blocks' counts."""
    process, device = progress.Progress(), DeviceMemory()
    for module in (progress, server_module):
        monkeypatch.setattr(module, "THIS_PROCESS", process)
    crossing = Server(device, [None]).crossing("layers.3", Doubling(lambda: time.sleep(0.4)))
    call(device, crossing)
    progress.set_deadline(0.1)
    assert "layers.3: no answer within 0.1 s" in failure(device, crossing)
    progress.allow({"layers.3": 20})
    call(device, crossing)
    progress.allow({"layers.3": 0.2, "another": 20})
    assert "layers.3: no answer within 0.2 s" in failure(device, crossing)
    progress.set_deadline(20)
    call(device, crossing)


@pytest.mark.parametrize("block", [Doubling, NativeDoubling])
def test_ctrl_c_ends_a_forward_whose_block_is_slow(
    block: type[Doubling], device: DeviceMemory, server: Server
) -> None:
    crossing = server.crossing("layers.2.choice", block())
    call(device, crossing)
    go_on = threading.Event()

    def interrupt(part: int = 0) -> None:
        if not go_on.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            go_on.wait(60)

    crossing._block.fault = crossing._block.share = interrupt  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        call(device, crossing)
    go_on.set()
    call(device, crossing)


def test_workers_that_sleep_hold_nobody_up_after_a_failure(
    device: DeviceMemory, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = server.crossing("layers.2.choice", NativeDoubling())
    bad = server.crossing("layers.3.choice", Doubling(raising(ValueError("no"))))
    for crossing, rows in ((shared, 900), (shared, 900), (bad, 5)):
        call(device, crossing, rows)
    until(lambda: asleep(server) == [0, 1, 2])
    failure(device, bad)
    until(lambda: asleep(server)[-2:] == [1, 2])  # one that looked up meanwhile sleeps again
    monkeypatch.setattr(progress.THIS_PROCESS, "deadline", 1.0)
    call(device, shared, 900)


def test_trips_of_a_forward_that_has_failed_are_never_made(
    device: DeviceMemory, server: Server
) -> None:
    """The worker is still in the first trip's call when the device sends the second."""
    parts: list[int] = []
    is_called, go_on = threading.Event(), threading.Event()

    def wait(part: int) -> None:
        is_called.set()
        go_on.wait(60)

    blocks = [NativeDoubling(), NativeDoubling(parts.append)]
    slow, next_one = (server.crossing(f"layers.{i}", block) for i, block in enumerate(blocks))
    x = np.ones((5, 3), np.float32)

    def fail() -> None:
        with forward(device, server):
            there = device.from_host(x)
            slow(there)
            next_one(there)
            assert is_called.wait(60)
            raise ZeroDivisionError

    for crossing in (slow, next_one):
        call(device, crossing)
    blocks[0].share = wait
    with pytest.raises(ZeroDivisionError):
        fail()
    until(lambda: server._channel.sent[1] == 1)
    go_on.set()
    with forward(device, server):
        time.sleep(0.01)
    assert not parts
    call(device, next_one)


def test_a_block_is_not_called_once_its_forward_has_failed(
    device: DeviceMemory, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker has seen the trip, but gets Python's lock when other arguments lie there."""
    has_seen, go_on = threading.Event(), threading.Event()

    def held_up(*arguments: int) -> Any:
        reason = polling.poll(*arguments)
        has_seen.set()
        go_on.wait(60)
        return reason

    monkeypatch.setattr(workers, "poll", held_up)
    called: list[None] = []
    crossing = server.crossing("layers.2.experts", Doubling(lambda: called.append(None)))

    def fail() -> None:
        with forward(device, server):
            crossing(device.from_host(np.ones((5, 3), np.float32)))
            assert has_seen.wait(60)
            raise ZeroDivisionError

    call(device, crossing)
    with pytest.raises(ZeroDivisionError):
        fail()
    go_on.set()
    call(device, crossing)
    assert len(called) == 1


def test_trips_that_are_begun_together_are_made_one_after_the_other(
    device: DeviceMemory, server: Server
) -> None:
    """They share the bytes of their arguments and results."""
    crossings = [server.crossing(f"layers.{i}", Doubling()) for i in range(3)]
    for crossing in crossings:
        call(device, crossing)
    x = np.arange(15, dtype=np.float32).reshape(5, 3)
    with forward(device, server):
        trips = [crossing.begin(device.from_host(i + x)) for i, crossing in enumerate(crossings)]
        results = {i: device.to_host(trips[i].end()) for i in (2, 0, 1)}
    for i, result in results.items():
        np.testing.assert_array_equal(result, 2 * (i + x))


def test_nothing_waits_for_a_trip_of_a_recording_that_has_failed(
    device: DeviceMemory, server: Server
) -> None:
    """It was never made, and the newest trip has been answered by one worker alone."""
    one, many = (server.crossing(f"layers.{i}", NativeDoubling()) for i in range(2))
    for crossing, rows in ((many, 900), (one, 5), (one, 5)):
        call(device, crossing, rows)

    def fail() -> None:
        trip = many.begin(device.from_host(np.ones((900, 3), np.float32)))
        raise MemoryError(str(trip))

    with forward(device, server), pytest.raises(MemoryError):
        device.recorded(fail)
    with forward(device, server):
        there = device.from_host(np.ones((5, 3), np.float32))
        replay = device.recorded(lambda: one(there))
        np.testing.assert_array_equal(device.to_host(replay()), np.full((5, 3), 2))


def test_a_forward_that_ends_by_itself_keeps_its_error(
    device: DeviceMemory, server: Server
) -> None:
    crossing = server.crossing("layers.2.choice", Doubling(lambda: time.sleep(0.01)))
    call(device, crossing)
    with pytest.raises(ZeroDivisionError):
        end_by_itself(device, crossing)
    call(device, crossing)


def test_a_block_that_fails_is_the_cause_of_what_follows(
    device: DeviceMemory, server: Server
) -> None:
    block = Doubling(raising(ValueError("first")))
    crossing = server.crossing("layers.2.choice", block)
    call(device, crossing)
    with pytest.raises(RuntimeError, match="ValueError: first"):
        end_by_itself(device, crossing)
    block.fault = nothing
    call(device, crossing)


def test_a_forward_that_does_not_come_lets_the_workers_sleep(
    device: DeviceMemory, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "PATIENCE", 100)
    crossing = server.crossing("layers.2.choice", NativeDoubling())
    for rows in (900, 900, 5):
        call(device, crossing, rows)
    x = np.ones((900, 3), np.float32)
    with forward(device, server):
        until(lambda: asleep(server) == [0, 1, 2])
        result = device.to_host(crossing(device.from_host(x)))
    np.testing.assert_array_equal(result, 2 * x)


@pytest.mark.parametrize("wanted", [(5,), (900,), (900, 5)])
def test_between_forwards_all_workers_sleep_and_take_no_time(
    wanted: tuple[int, ...], device: DeviceMemory, server: Server
) -> None:
    crossing = server.crossing("layers.2.choice", NativeDoubling())
    for rows in wanted:
        call(device, crossing, rows)
        call(device, crossing, rows)
    everybody = list(range(len(server._workers._threads)))
    assert len(everybody) == (3 if 900 in wanted else 1)
    until(lambda: asleep(server) == everybody)
    start = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - start < 0.01 * 0.2


def test_calls_of_one_share_wake_the_first_worker_alone(
    device: DeviceMemory, server: Server
) -> None:
    crossing = server.crossing("layers.2.choice", NativeDoubling())
    for rows in (900, 900, 5, 5):
        call(device, crossing, rows)
    until(lambda: asleep(server) == [0, 1, 2])
    for _ in range(5):
        call(device, crossing, 5)
        assert asleep(server)[-2:] == [1, 2]


def test_a_forward_wakes_all_whom_the_one_before_needed(
    device: DeviceMemory, server: Server
) -> None:
    crossing = server.crossing("layers.2.choice", NativeDoubling())
    for _ in range(2):
        call(device, crossing, 900)
    until(lambda: asleep(server) == [0, 1, 2])
    with forward(device, server):
        until(lambda: asleep(server) == [])
    with forward(device, server):
        until(lambda: asleep(server) == [1, 2])


def test_the_other_workers_sleep_while_a_block_that_needs_python_computes(
    device: DeviceMemory, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a block computes on all cores.  They are there again as soon as it has returned."""
    monkeypatch.setattr(workers, "PATIENCE", 1 << 60)
    monkeypatch.setattr(workers, "LINGER", 1 << 60)
    shared = server.crossing("layers.2.choice", NativeDoubling())
    experts = server.crossing(
        "layers.2.experts", Doubling(lambda: until(lambda: asleep(server) == [1, 2]))
    )
    for crossing in (shared, shared, experts):
        call(device, crossing, 900)
    x = np.ones((900, 3), np.float32)
    with forward(device, server):
        for _ in range(3):
            for crossing in (shared, experts):
                np.testing.assert_array_equal(device.to_host(crossing(device.from_host(x))), 2 * x)
            until(lambda: asleep(server) == [])


def test_nobody_sleeps_through_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that sleep as soon as they may are woken at every step."""
    monkeypatch.setattr(workers, "LINGER", 1)
    monkeypatch.setattr(workers, "PATIENCE", 1)
    device = DeviceMemory(1e-5)
    server = Server(device, [None, None, None])
    crossing = server.crossing("layers.2.choice", NativeDoubling())
    for rows in np.random.default_rng(0).choice([5, 128, 900], 200):
        call(device, crossing, int(rows))


def test_nobody_sleeps_through_the_beginning_of_a_forward(
    device: DeviceMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins whenever the worker is just about to sleep, some 20 looks after the last one."""
    monkeypatch.setattr(workers, "LINGER", 20)
    server = Server(device, [max(cores.MASK, default=None)])
    call(device, server.crossing("layers.2.choice", NativeDoubling()))
    board = server._workers._board
    noted = board.of(0, NOTED)
    for i in as_many_as_fit(50_000):
        server._workers.begin()
        end = time.monotonic() + 60
        while board[noted] != board[SERVING]:
            assert time.monotonic() < end
        server._workers.end()
        for _ in range(i % 50):
            pass


def test_an_interrupt_just_before_a_forward_lets_the_workers_sleep(
    device: DeviceMemory, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin() -> None:
        monkeypatch.undo()
        server._workers.begin()
        raise KeyboardInterrupt

    crossing = server.crossing("layers.2", NativeDoubling())
    for _ in range(2):
        call(device, crossing)
    monkeypatch.setattr(server._workers, "begin", begin)
    with pytest.raises(KeyboardInterrupt):
        call(device, crossing)
    assert server._workers._board[SERVING] & 1 == 0
    call(device, crossing)


def test_a_second_interrupt_leaves_no_mark_of_failure_to_the_next_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It comes before the memory is told not to wait, which then does until its deadline."""
    device = DeviceMemory(longest_wait=0.2)
    server = Server(device, [None])
    go_on = threading.Event()
    crossing = server.crossing("layers.2", Doubling(lambda: go_on.wait(60)))
    call(device, crossing)

    def fail() -> None:
        with forward(device, server):
            crossing(device.from_host(np.ones((5, 3), np.float32)))
            raise KeyboardInterrupt

    monkeypatch.setattr(server._workers, "give_up", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        fail()
    monkeypatch.undo()
    go_on.set()
    call(device, crossing)


class NoThread(threading.Thread):
    def start(self) -> None:
        raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    ("where", "name", "fails"),
    [(workers, "Thread", NoThread), (os, "pipe", raising(OSError(24, "Too many open files")))],
)
def test_a_worker_that_cannot_start_is_started_by_the_next_forward(
    where: Any,
    name: str,
    fails: Any,
    device: DeviceMemory,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crossing = server.crossing("layers.2", NativeDoubling())
    said = r"layers\.2: thread 1 of the 1 that share it cannot start \(.*\); see ulimit"
    with monkeypatch.context() as patched:
        patched.setattr(where, name, fails)
        with pytest.raises(Lfm2kitError, match=said):
            call(device, crossing)
    monkeypatch.setattr(progress.THIS_PROCESS, "deadline", 1.0)
    for _ in range(3):
        call(device, crossing)


def test_arrays_that_are_too_large_for_a_trip_are_one_line(
    device: DeviceMemory, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    crossing = server.crossing("layers.2.experts", Doubling())
    with monkeypatch.context() as patched:
        patched.setattr(server._channel, "call", raising_for_all(ValueError("at most 16 bytes")))
        with pytest.raises(Lfm2kitError) as caught:
            call(device, crossing)
    assert str(caught.value) == (
        "layers.2.experts: at most 16 bytes; try a smaller batch, or shorter samples"
    )
    for _ in range(2):
        call(device, crossing)


def test_an_interrupt_while_a_call_is_made_leaves_the_channel_whole(
    device: DeviceMemory, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(called: Any, parts: int) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    crossing = server.crossing("layers.2", NativeDoubling())
    monkeypatch.setattr(server._workers, "add", add)
    with pytest.raises(KeyboardInterrupt):
        call(device, crossing)
    for _ in range(3):
        call(device, crossing)


def test_threads_end_with_their_server(device: DeviceMemory) -> None:
    server = Server(device, [None])
    crossing = server.crossing("layers.2.choice", NativeDoubling())
    call(device, crossing)
    threads = list(server._workers._threads)
    assert all(thread.is_alive() for thread in threads)
    del server, crossing
    gc.collect()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_a_server_that_is_collected_waits_for_no_call(device: DeviceMemory) -> None:
    """While it waited, an interrupt would be lost.  The last thread tidies up."""
    is_called, go_on, closed = (threading.Event() for _ in range(3))
    server = Server(device, [None])
    crossing = server.crossing("layers.2", Doubling(lambda: (is_called.set(), go_on.wait(60))))
    call(device, crossing)
    workers = server._workers
    workers._channel.close = closed.set  # type: ignore[method-assign]
    with suppress(ZeroDivisionError), forward(device, server):
        crossing(device.from_host(np.ones((5, 3), np.float32)))
        is_called.wait(60)
        raise ZeroDivisionError
    del server, crossing
    gc.collect()
    assert workers._board[CLOSED] == 1
    assert workers._threads[0].is_alive()
    assert not closed.is_set()
    go_on.set()
    assert closed.wait(60)


def test_words_of_different_writers_lie_on_different_cache_lines(server: Server) -> None:
    board = server._workers._board
    assert board.address % LINE == 0
    lines = [{SERVING, CLOSED}, {TURN, TURNS_CALL}, {TABLE, TABLE + 4}]
    for worker in range(3):
        lines.append({board.of(worker, word) for word in (SEEN, NOTED, SHARED_BY)})
        lines.append({board.of(worker, word) for word in (ASLEEP, WANTED, READ_END, WRITE_END)})
    assert sum(map(len, lines)) == len(set.union(*lines))
    assert [{word // LINE for word in line} for line in lines] == [{i} for i in range(9)]


def test_two_forwards_at_once_take_turns(device: DeviceMemory, server: Server) -> None:
    crossings = [server.crossing(f"layers.{i}", NativeDoubling()) for i in range(2)]
    errors: list[BaseException] = []

    def forwards(crossing: HostCrossing) -> None:
        try:
            for _ in range(20):
                call(device, crossing)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=forwards, args=[crossing]) for crossing in crossings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_forward_inside_a_forward_is_refused(device: DeviceMemory, server: Server) -> None:
    """It would wait for itself."""
    errors: list[BaseException] = []
    crossing = server.crossing("layers.2", NativeDoubling())

    def nested() -> None:
        with forward(device, server):
            try:
                call(device, crossing)
            except Lfm2kitError as error:
                errors.append(error)

    thread = threading.Thread(target=nested, daemon=True)
    thread.start()
    thread.join(10)
    assert [str(error).partition(";")[0] for error in errors] == [
        "a forward of this model runs in this thread already"
    ]
    call(device, crossing)


ENDS = """
import os, sys
import numpy as np
from lfm2kit.testing.device import DeviceMemory
from lfm2kit.testing.runner import judged
from lfm2kit_hybrid.server import Server
device = DeviceMemory()
server = Server(device, [None, None])
crossing = server.crossing("choice", lambda x: 2 * x)
for _ in range(2):
    with server.serving():
        print(device.to_host(crossing(device.from_host(np.ones(3)))))
if (child := os.fork()) == 0:
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
with server.serving():
    sys.exit(5)
"""


def test_a_process_ends_in_the_midst_of_a_forward_and_after_a_fork() -> None:
    command = [sys.executable, "-W", "ignore", "-c", ENDS]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (5, "")
    assert ended.stdout.split("\n") == ["[2. 2. 2.]", "[2. 2. 2.]", "7", ""]


@pytest.mark.parametrize(
    ("there", "rank", "ranks", "near", "expected"),
    [
        (16, 0, 1, (), [15, 14, 13, 12, 11, 10, 9, 8]),
        (16, 0, 1, range(4), [3, 2, 1]),
        (16, 0, 1, range(16, 32), [15, 14, 13, 12, 11, 10, 9, 8]),
        (16, 1, 4, range(8), [7, 6, 5]),
        (4, 0, 1, (), [3, 2, 1]),
        (2, 0, 1, (), [1]),
        (2, 1, 2, (), [None]),
        (1, 0, 1, (0,), [None]),
        (2, 2, 3, (), [None]),
    ],
)
def test_each_worker_has_a_core_of_its_rank_and_the_main_thread_keeps_one(
    there: int,
    rank: int,
    ranks: int,
    near: Collection[int],
    expected: list[int | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cores, "MASK", frozenset(range(there)))
    monkeypatch.setattr(cores, "CORES", there)
    assert cores.workers_cores(rank, ranks, near) == expected
    assert bool(cores.core_notes(ranks)) == (expected == [None])


@pytest.mark.parametrize(
    ("there", "ranks", "expected"), [(16, 1, 15), (16, 4, 3), (2, 1, 1), (1, 1, 1), (2, 3, 1)]
)
def test_a_blocks_threads_leave_a_core_to_the_one_that_waits(
    there: int, ranks: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "CORES", there)
    assert cores.block_threads(ranks) == expected


@pytest.mark.parametrize("threads", [1, None, 1000])
def test_a_block_called_by_a_worker_has_as_many_threads_as_it_may(
    threads: int | None, device: DeviceMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = min(2, numba.config.NUMBA_NUM_THREADS)
    monkeypatch.setattr(type(CREW), "asked", most)
    sizes: list[tuple[int, int]] = []

    def look() -> None:
        sizes.append((CREW._most, numba.get_num_threads()))

    crossing = Server(device, [None], threads).crossing("layers.2.experts", Doubling(look))
    for _ in range(2):
        call(device, crossing)
    assert sizes == [(min(threads or most, most),) * 2]


@pytest.mark.skipif(not cores.MASK, reason="this system does not bind threads")
def test_a_worker_stays_on_its_core_except_while_python_calls_a_block() -> None:
    core = max(cores.MASK)
    device = DeviceMemory()
    server = Server(device, [core])
    seen: list[set[int]] = []
    look = lambda part=0: seen.append(os.sched_getaffinity(0))  # noqa: E731
    for block in (NativeDoubling(look), Doubling(look), NativeDoubling(look)):
        crossing = server.crossing("layers.2", block)
        for _ in range(2):
            call(device, crossing)
    assert seen == [{core}, set(cores.MASK), {core}]
