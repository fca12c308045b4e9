"""A device that is a thread: a memory whose work runs later, in order, and with random delays.

Its arrays cannot be read by NumPy, and have no values before the work that makes them has run.  It
stands in for a GPU in checks of crossings: work enqueued here can call threads of the host, and can
be recorded and replayed.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.memory import Arriving, Mark
from lfm2kit.testing.device_channel import DeviceChannel
from lfm2kit.testing.device_picking import DevicePicker

Work = Callable[[], object]


class DeviceArray:
    """An array of a device; its values come with the work that makes it."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self._values: npt.NDArray[Any] | None = None

    @property
    def values(self) -> npt.NDArray[Any]:
        return self._read()

    @values.setter
    def values(self, values: npt.NDArray[Any]) -> None:
        if values.shape != self.shape:
            raise RuntimeError(f"values {values.shape} for an array {self.shape}")
        self._values = values

    def take(self, values: npt.NDArray[Any]) -> None:
        """Take these values: work that a device can do."""
        self.values = values

    def _read(self) -> npt.NDArray[Any]:
        if self._values is None:
            raise RuntimeError("an array is read before it is made")
        return self._values

    def __getitem__(self, rows: slice) -> DeviceArray:
        return _View(self, lambda values: values[rows])

    def reshape(self, shape: Sequence[int]) -> DeviceArray:
        return _View(self, lambda values: values.reshape(shape))


class _View(DeviceArray):
    """What `look` sees of another array, whenever it is read."""

    def __init__(self, base: DeviceArray, look: Callable[[Any], npt.NDArray[Any]]) -> None:
        super().__init__(look(np.broadcast_to(0, base.shape)).shape)
        self._base = base
        self._look = look

    def _read(self) -> npt.NDArray[Any]:
        return self._look(self._base.values)


class _Stream:
    """A thread that does work in order."""

    def __init__(self, pause: Work) -> None:
        self._pause = pause
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="lfm2kit-device", daemon=True).start()

    def add(self, work: Work) -> None:
        self._queue.put(work)

    def close(self) -> None:
        self._queue.put(None)

    def give_back(self, idle: list[_Stream]) -> None:
        """Join the idle streams once all work is done, without what it has raised."""

        def rest() -> None:
            self._error = None
            idle.append(self)

        self.add(rest)

    def take_error(self) -> BaseException | None:
        """Return what work has raised first since this was last called, from this thread."""
        error, self._error = self._error, None
        return error

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                self._pause()
                work()
            except BaseException as error:  # raised where the host waits
                self._error = self._error or error
            del work  # it may keep the memory alive


class _Event:
    """A place in a stream: the mark, and a copy's arrival."""

    def __init__(self, stream: _Stream) -> None:
        self.stream = stream
        self._seconds = 0.0
        self._is_reached = threading.Event()

    def reach(self) -> None:
        self._seconds = time.perf_counter()
        self._is_reached.set()

    def wait(self) -> None:
        self._is_reached.wait()

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _Event), "a mark of another memory"
        earlier.wait()
        self.wait()
        return self._seconds - earlier._seconds


class _Copy:
    def __init__(self, array: DeviceArray, arrived: _Event) -> None:
        self._array = array
        self._arrived = arrived
        self._host: npt.NDArray[Any] | None = None
        self._error: BaseException | None = None

    def copy(self) -> None:
        try:
            self._host = self._array.values.copy()
        except BaseException as error:  # what has failed before says more
            self._error = self._arrived.stream.take_error() or error

    def wait(self) -> npt.NDArray[Any]:
        self._arrived.wait()
        if self._error is not None:
            raise self._error
        assert self._host is not None, "it has arrived"
        return self._host


class _Local(threading.local):
    """What is current in a thread."""

    def __init__(self) -> None:
        self.streams: list[_Stream] = []
        self.recording: list[Work] | None = None


class DeviceMemory:
    """Memory of a device that is a thread for each stream.

    Before each piece of work it waits for up to `delay` seconds, at random.  It waits for threads
    of the host for `longest_wait` seconds, even if asked for more.
    """

    _numbers = count()

    def __init__(self, delay: float = 0.0, longest_wait: float = 20.0, seed: int = 0) -> None:
        self.name = f"lfm2kit_testing:{next(self._numbers)}"
        self.delay = delay
        self.longest_wait = longest_wait
        self._rng = np.random.default_rng(seed)
        self._local = _Local()
        self._streams: list[_Stream] = []  # all there are
        self._idle: list[_Stream] = []
        weakref.finalize(self, _close, self._streams)

    def from_host(self, array: npt.NDArray[Any]) -> DeviceArray:
        copy = np.array(array)

        def make(target: DeviceArray) -> None:
            target.values = copy.copy()

        return self.made(copy.shape, make)

    def to_host(self, array: DeviceArray) -> npt.NDArray[Any]:
        return self.start_to_host(array).wait()

    def start_to_host(self, array: DeviceArray) -> Arriving:
        if self._local.recording is not None:
            raise RuntimeError("a copy to the host cannot be recorded")
        arrived = _Event(self._stream())
        copy = _Copy(array, arrived)
        self.enqueue(copy.copy)
        self.enqueue(arrived.reach)
        return copy

    def add(self, left: DeviceArray, right: DeviceArray) -> DeviceArray:
        def make(total: DeviceArray) -> None:
            total.values = left.values + right.values

        return self.made(left.shape, make)

    @contextmanager
    def stream(self) -> Iterator[None]:
        self._local.streams.append(self._idle_stream())
        try:
            yield
        finally:
            self._local.streams.pop().give_back(self._idle)

    def mark(self) -> Mark:
        event = _Event(self._stream())
        self.enqueue(event.reach)
        return event

    timed_mark = mark  # what is recorded marks its place in each replay

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, _Event), "a mark of another memory"
        if mark.stream is not self._stream():
            self.enqueue(mark.wait)

    def picker(self, wanted: Collection[int]) -> DevicePicker:
        return DevicePicker(self, wanted)

    def channel(self, workers: int, deadline: float) -> DeviceChannel:
        return DeviceChannel(self, workers, deadline)

    def enqueue(self, work: Work) -> None:
        """Do `work` after everything that is enqueued in the current stream, or record it."""
        if self._local.recording is not None:
            self._local.recording.append(work)
        else:
            self._stream().add(work)

    def made(self, shape: Sequence[int], make: Callable[[DeviceArray], None]) -> DeviceArray:
        """Return a new array, to which `make` gives values, in the order of the current stream."""
        array = DeviceArray(shape)
        self.enqueue(lambda: make(array))
        return array

    def recorded(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """Return a function that enqueues what `step` enqueues, and returns the same arrays."""
        work: list[Work] = []
        self._local.recording = work
        try:
            results = step()
        finally:
            self._local.recording = None

        def replay() -> Any:
            for one in work:
                self.enqueue(one)
            return results

        return replay

    def pause(self) -> None:
        """Wait at random, as work on a device takes time."""
        if self.delay and self._rng.random() < 0.5:
            time.sleep(self.delay * self._rng.random())

    def _stream(self) -> _Stream:
        if not self._local.streams:
            self._local.streams.append(self._new_stream())
        return self._local.streams[-1]

    def _idle_stream(self) -> _Stream:
        try:
            return self._idle.pop()  # in one step: another thread may want the last one
        except IndexError:
            return self._new_stream()

    def _new_stream(self) -> _Stream:
        stream = _Stream(_weak(self))
        self._streams.append(stream)
        return stream


def _weak(memory: DeviceMemory) -> Work:
    """Return `memory.pause` for a thread that does not keep the memory alive."""
    reference = weakref.ref(memory)

    def pause() -> None:
        if (there := reference()) is not None:
            there.pause()

    return pause


def _close(streams: Sequence[_Stream]) -> None:
    for stream in streams:
        stream.close()
