"""The device that is a thread keeps the contract of an ordered memory, from any thread."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from lfm2kit.testing.device import DeviceArray, DeviceMemory


class TakenMeanwhile(list[Any]):
    """Idle streams of which another thread takes the last one before this one does."""

    def pop(self, *index: Any) -> Any:
        super().pop(*index)
        return super().pop(*index)


class AddedMeanwhile(list[Any]):
    """Streams to which another thread adds one just after this one."""

    def append(self, stream: Any) -> None:
        self.extend([stream, None])


def fail(target: DeviceArray) -> None:
    raise ValueError("first")


def wait_until_idle(memory: DeviceMemory) -> None:
    end = time.monotonic() + 20
    while len(memory._idle) < len(memory._streams) and time.monotonic() < end:
        time.sleep(1e-4)


def test_the_last_idle_stream_may_be_taken_by_another_thread() -> None:
    memory = DeviceMemory()
    with memory.stream():
        pass
    wait_until_idle(memory)
    memory._idle = TakenMeanwhile(memory._idle)
    with memory.stream():
        assert memory.to_host(memory.from_host(np.ones(2))).tolist() == [1, 1]


def test_two_new_streams_are_two() -> None:
    memory = DeviceMemory()
    memory._streams = AddedMeanwhile()
    with memory.stream():
        assert memory.to_host(memory.from_host(np.ones(2))).tolist() == [1, 1]


def test_a_stream_is_not_reused_while_it_has_work() -> None:
    memory, may_end = DeviceMemory(), threading.Event()
    with memory.stream():
        memory.enqueue(may_end.wait)
    try:
        with memory.stream():
            is_done = threading.Event()
            memory.enqueue(is_done.set)
            assert is_done.wait(20), "it waits for work that another context has left behind"
    finally:
        may_end.set()


def test_a_reused_stream_knows_nothing_of_failures_before() -> None:
    memory = DeviceMemory()
    with memory.stream():
        memory.made((2,), fail)
    wait_until_idle(memory)
    with memory.stream(), pytest.raises(RuntimeError, match="read before it is made"):
        memory.to_host(DeviceArray((2,)))


def test_a_copy_says_what_failed_before_it_whenever_it_is_asked() -> None:
    memory = DeviceMemory()
    with memory.stream():
        copy = memory.start_to_host(memory.made((2,), fail))
    wait_until_idle(memory)
    for _ in range(2):
        with pytest.raises(ValueError, match="first"):
            copy.wait()
