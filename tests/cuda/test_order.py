"""Copies, streams, replays and devices from several threads, on a CuPy that works late."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from lfm2kit.backend import Batch
from tests.cuda import late_cupy
from tests.cuda.late_cupy import THREAD, Array, Stream, current_stream, empty

SIZES = (0, 1, 5, 1 << 20, (1 << 20) + 1, 3 << 20, (16 << 20) + 5)


@pytest.fixture(autouse=True)
def hasty_threads() -> Iterator[None]:
    """Let threads interrupt each other all the time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def memories() -> Iterator[list[Any]]:
    with late_cupy.loaded("memory") as (memory,):
        yield [memory.memory_of(device) for device in range(late_cupy.DEVICES)]


@pytest.fixture
def replay_of() -> Iterator[Any]:
    """Yield a replay, on device 1, of what multiplies the ids of a batch by ten."""

    def forward(batch: Any) -> Array:
        logits = empty(batch.token_ids.shape, np.int32)
        batch.token_ids.enqueue(lambda: np.multiply(batch.token_ids.values, 10, logits.values))
        return logits

    with late_cupy.loaded("capture", "memory") as (capture, memory):
        yield lambda batch: capture.Replay(forward, batch, memory.memory_of(1))


def test_threads_copy_arrays_of_any_size_on_two_devices(memories: list[Any]) -> None:
    def copies(seed: int) -> None:
        memory, rng = memories[seed % 2], np.random.default_rng(seed)
        with memory.stream():
            arrays = [rng.integers(0, 256, size, np.uint8) for size in SIZES]
            arriving = [memory.start_to_host(memory.from_host(array)) for array in arrays]
            assert all(np.array_equal(c.wait(), a) for c, a in zip(arriving, arrays, strict=True))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(copies, range(4)))


def test_a_device_has_one_set_of_pinned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one, made by another thread at the same time, would be freed while it is read."""
    with late_cupy.loaded("upload") as (upload,):
        made = []

        def slow(shape: int, dtype: Any) -> Any:
            made.append(shape)
            time.sleep(1e-3)
            return np.empty(shape, dtype)

        monkeypatch.setattr(upload.cupyx, "empty_pinned", slow)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(upload.upload, [np.arange(5)] * 4))
        assert len(made) == upload.BUFFERS


def test_many_small_copies_do_not_overtake_each_other(memories: list[Any]) -> None:
    arrays = [np.full(100, i) for i in range(50)]
    there = [memories[0].from_host(array) for array in arrays]
    assert all(map(np.array_equal, map(memories[0].to_host, there), arrays))


def test_a_copy_that_nobody_waits_for_is_complete_before_its_memory_is_free(
    memories: list[Any],
) -> None:
    memory = memories[0]
    with memory.stream():
        memory.start_to_host(memory.from_host(np.arange(5)))
        stream = current_stream()
        assert stream.done >= len(stream.work) - 1


def test_only_a_wait_orders_two_streams(memories: list[Any]) -> None:
    memory, array = memories[1], np.arange(7)
    with memory.stream():
        there, made = memory.from_host(array), memory.mark()
        with memory.stream():
            assert not np.array_equal(memory.to_host(there), array)
            memory.wait(made)
            assert np.array_equal(memory.to_host(there), array)


def test_a_stream_that_waits_for_itself_enqueues_nothing(memories: list[Any]) -> None:
    """A captured one could not: see `Batch.on` in a forward that is captured."""
    with memories[0].stream():
        made = memories[0].mark()
        current_stream().recorded = []
        memories[0].wait(made)
        assert current_stream().recorded == []


def test_streams_are_used_again_by_one_thread_at_a_time(memories: list[Any]) -> None:
    busy, seen = set(), []

    def use(turn: int) -> None:
        with memories[0].stream():
            stream = current_stream()
            seen.append(stream)
            assert stream not in busy
            busy.add(stream)
            time.sleep(1e-4)
            busy.remove(stream)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(use, range(60)))
    assert len(set(seen)) <= 3


def test_the_callers_stream_and_device_are_current_again(memories: list[Any]) -> None:
    chosen = Stream()
    chosen.use()
    for memory in memories:
        with memory.stream():
            assert THREAD.device == memory.device
            assert current_stream() is not chosen
        memory.to_host(memory.from_host(np.arange(3)))
        memory.wait(memory.mark())
        assert THREAD.device == 0
        assert current_stream() is chosen
    late_cupy.LEGACY[0].use()


def test_threads_replay_one_graph_in_streams_of_their_own(replay_of: Any) -> None:
    replay = replay_of(Batch.of_sequences([[0, 0, 3], [4]]))
    launch = replay._graph.launch
    replay._graph.launch = lambda stream: (time.sleep(5e-4), launch(stream))

    def replays(number: int) -> None:
        for turn in range(50):
            with replay._memory.stream():
                logits = replay(Batch.of_sequences([[number, turn, 3], [4]]))
                time.sleep(1e-3 * (number == 1))  # the other thread is through before it
                got = replay._memory.to_host(logits)
            assert got.tolist() == [10 * number, 10 * turn, 30, 40]

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(replays, (1, 2)))


def test_replays_that_have_not_begun_keep_their_ids_and_results_apart(replay_of: Any) -> None:
    """Each in a stream of its own, and the last is waited for first."""
    batches = [Batch.of_sequences([[i, i], [i]]) for i in range(5)]
    replay = replay_of(batches[0])
    with ExitStack() as streams:
        arriving = []
        for batch in batches:
            streams.enter_context(replay._memory.stream())
            arriving.append(replay._memory.start_to_host(replay(batch)))
    got = [copy.wait().tolist() for copy in reversed(arriving)]
    assert got == [[10 * i] * 3 for i in reversed(range(5))]
    replay.close()


def test_replays_take_ids_that_the_host_never_sees(replay_of: Any) -> None:
    """Each takes what the last one has left, in a stream of its own, before any has begun."""
    batch = Batch.of_sequences([[2], [3]])
    replay = replay_of(batch)
    memory, runs = replay._memory, [replay]
    with ExitStack() as streams:
        for _ in range(4):
            streams.enter_context(memory.stream())
            runs.append(runs[-1](batch) if runs[-1] is replay else replay.with_ids(batch, runs[-1]))
            made = memory.mark()
            streams.enter_context(memory.stream())
            memory.wait(made)
        arriving = [memory.start_to_host(run) for run in runs[1:]]
    assert [copy.wait().tolist() for copy in arriving] == [
        [2 * 10**turn, 3 * 10**turn] for turn in range(1, 5)
    ]
    with pytest.raises(ValueError, match=r"\(1,\) ids for a batch of 2 tokens"):
        replay.with_ids(batch, runs[1][:1])
    replay.close()


def test_a_block_runs_on_its_device_from_any_thread() -> None:
    with late_cupy.loaded("blocks.on_device") as (module,):
        block = module.OnDevice(lambda *inputs: (THREAD.device, *inputs), 1)
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(block, 5, None).result() == (1, 5, None)
        assert block(5, None) == (1, 5, None)
    assert THREAD.device == 0
    assert not hasattr(block, "new_state")


def test_each_device_has_its_own_kernels_and_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel is loaded once, whichever thread asks first."""
    with late_cupy.loaded("kernels", "device") as (kernels, device):
        compiled = []

        def slow(stem: str, architecture: str, constants: object) -> bytes:
            compiled.append(architecture)
            time.sleep(1e-3)
            return b""

        def load(number: int) -> tuple[int, int]:
            with device.on_device(number % 2):
                kernel = kernels.load_kernel("gemm", "linear_simt", TILE_K=16)
                return kernel._function.ptr, device.sm_count()

        monkeypatch.setattr(kernels, "compile_source", slow)
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(load, range(4))) == [(0, 132), (1, 108)] * 2
        assert sorted(compiled) == ["sm_80", "sm_90a"]
