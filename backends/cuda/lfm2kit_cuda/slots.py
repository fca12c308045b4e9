"""Device memory that weights pass through, and the order in which they come and go.

Weights lie in pinned host memory, in portions of a few experts.  A second stream copies them into
a few slots, one portion after the other in the order of the forward, each as soon as its slot has
been read.  So the link carries them while the device computes the layers before.  All of it is
ordered by events, in plain calls and in captures alike.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import cupy
import numpy as np
import numpy.typing as npt
from cupy.cuda import runtime

from lfm2kit_cuda.device import current_device, on_device
from lfm2kit_cuda.recording import Recording, current_recording

Bytes = npt.NDArray[np.uint8]


class Slots:
    """The slots of one model: portion n passes through slot n % count, in every forward."""

    def __init__(self, count: int, nbytes: int) -> None:
        self._link = _Link([cupy.empty(nbytes, cupy.uint8) for _ in range(count)])
        self._plain = _Passage(self._link)  # of calls outside captures
        self._lock = RLock()
        # After a forward that failed, a copy may be under way that nobody waits for.
        drained = weakref.finalize(self, _drain, self._link.stream, current_device())
        drained.atexit = False

    def __len__(self) -> int:
        return len(self._link.slots)

    @property
    def form(self) -> tuple[int, int]:
        """Return the number of slots, and the bytes of each."""
        return len(self), int(self._link.slots[0].nbytes)

    def add(self, portion: Bytes) -> int:
        """Return the number of a new portion, in pinned memory, which comes after all others."""
        self._link.portions.append(portion)
        return len(self._link.portions) - 1

    def slot_of(self, number: int) -> cupy.ndarray:
        """Return where a portion is while it is held: uint8, as large as a slot."""
        return self._link.slots[number % len(self)]

    @contextmanager
    def holding(self, number: int) -> Iterator[None]:
        """Enqueue inside, in the current stream, what reads a portion in its slot.

        It begins when the portion has arrived.  The next ones are sent for before.
        """
        stream = cupy.cuda.get_current_stream()
        with self._lock:
            passage = self._passage()
            for one in range(number, min(number + len(self), len(self._link.portions))):
                passage.fetch(one)
            passage.await_arrival(number, stream)
            try:
                yield
            finally:
                passage.release(number, stream)

    def _passage(self) -> _Passage:
        """Return the passage of what is being captured in this thread, or that of plain calls."""
        recording = current_recording()
        if recording is None:
            return self._plain
        return recording.part_of(self, lambda: self._captured(recording)).passage

    def _captured(self, recording: Recording) -> _Captured:
        recording.branch(self._link.stream)
        return _Captured(_Passage(self._link), self._plain, self._lock)


def _drain(stream: cupy.cuda.Stream, device: int) -> None:
    """Wait for all copies, before the memory that they read and write gets other uses."""
    with on_device(device):
        stream.synchronize()


@dataclass(frozen=True, slots=True)
class _Link:
    """What is copied, where to, and the stream that copies."""

    slots: list[cupy.ndarray]
    portions: list[Bytes] = field(default_factory=list)
    stream: cupy.cuda.Stream = field(default_factory=lambda: cupy.cuda.Stream(non_blocking=True))


class _Passage:
    """Which portion each slot holds, in plain calls or in one capture.

    A portion is held from the beginning of its copy until it has been read once.
    """

    def __init__(self, link: _Link) -> None:
        self._link = link
        count = len(link.slots)
        self._held: list[int | None] = [None] * count
        self._arrived = [cupy.cuda.Event(disable_timing=True) for _ in range(count)]
        self._read: list[Any] = [None] * count  # an event after the last reading

    def fetch(self, number: int) -> None:
        """Enqueue a portion's copy after the last reading of its slot, unless it is held."""
        slot, stream = number % len(self._held), self._link.stream
        if self._held[slot] == number:
            return
        if self._read[slot] is not None:
            stream.wait_event(self._read[slot])
        portion, target = self._link.portions[number], self._link.slots[slot].data
        # Not by an array's own method, which refuses to copy from the host in a capture.
        runtime.memcpyAsync(
            target.ptr, portion.ctypes.data, portion.nbytes, runtime.memcpyHostToDevice, stream.ptr
        )
        self._arrived[slot].record(stream)
        self._held[slot] = number

    def await_arrival(self, number: int, stream: cupy.cuda.Stream) -> None:
        stream.wait_event(self._arrived[number % len(self._held)])

    def release(self, number: int, stream: cupy.cuda.Stream) -> None:
        """Let the slot's next portion be copied after what is enqueued in `stream`."""
        slot = number % len(self._held)
        self._held[slot] = None
        if self._read[slot] is None:
            self._read[slot] = cupy.cuda.Event(disable_timing=True)
        self._read[slot].record(stream)

    def await_all(self, stream: cupy.cuda.Stream) -> None:
        """Let `stream` wait until nothing is copied to the slots or read there any more."""
        for slot, number in enumerate(self._held):
            if number is not None:
                stream.wait_event(self._arrived[slot])
            if self._read[slot] is not None:
                stream.wait_event(self._read[slot])

    def release_all(self, stream: cupy.cuda.Stream) -> None:
        """Forget what the slots hold: a graph that is enqueued in `stream` fills them anew."""
        for slot in range(len(self._held)):
            self.release(slot, stream)


@dataclass(frozen=True, slots=True)
class _Captured:
    """The passage of one capture, whose graph has the slots to itself while it runs."""

    passage: _Passage
    plain: _Passage
    lock: Any

    def join(self, stream: cupy.cuda.Stream) -> None:
        self.passage.await_all(stream)

    @contextmanager
    def launching(self, stream: cupy.cuda.Stream) -> Iterator[None]:
        with self.lock:
            self.plain.await_all(stream)
            try:
                yield
            finally:
                self.plain.release_all(stream)
