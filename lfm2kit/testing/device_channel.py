"""The channel of a device that is a thread: the contract of `lfm2kit.crossing`, in NumPy.

It is harder to please than it need be.  Results are overwritten before a trip and arguments after
it, so whoever answers too early, too late or with a share left out is seen every time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lfm2kit.crossing import ArrayForm
from lfm2kit.testing.device_picking import NOBODYS, poisoned

if TYPE_CHECKING:
    from lfm2kit.testing.device import DeviceArray, DeviceMemory

ALIGNMENT = 64  # bytes, of each array
LOST = 0xFF  # the bytes of all results of a forward that has failed
LOOK = 2e-5  # seconds between two looks at the workers' answers

Bytes = npt.NDArray[np.uint8]


class DeviceChannel:
    """Flags and buffers in the host's memory, which work in the streams of `memory` uses."""

    def __init__(self, memory: DeviceMemory, workers: int, deadline: float) -> None:
        self.memory = memory
        self.workers = workers
        self.deadline = np.array([deadline], np.float32)
        self.made_call: type[DeviceCall] = DeviceCall
        self.sent = np.zeros(3, np.uint32)
        self.answered = np.zeros((workers, 16), np.uint32)
        self.failed = np.zeros(2, np.uint32)
        self.trips = 2**32 - 4  # counted by the device; soon begins again at 0
        self._answered_first()
        self._calls = 0
        self._buffers = [np.zeros(1024, np.uint8)]  # recorded calls keep using the older ones

    def call(
        self, inputs: Sequence[ArrayForm], results: Sequence[ArrayForm], workers: int
    ) -> DeviceCall:
        assert 1 <= workers <= self.workers, "there are not that many workers"
        sizes = [_padded(form) for form in (*inputs, *results)]
        while len(self._buffers[-1]) < sum(sizes) + ALIGNMENT:
            self._buffers.append(np.zeros(2 * len(self._buffers[-1]), np.uint8))
        start = -self._buffers[-1].ctypes.data % ALIGNMENT
        ends = start + np.cumsum([0, *sizes])
        parts = [self._buffers[-1][a:b] for a, b in pairwise(ends)]
        arrays = list(map(_array, parts, (*inputs, *results)))
        call = self.made_call(
            self, self._calls, arrays[: len(inputs)], arrays[len(inputs) :], workers
        )
        self._calls += 1
        return call

    def close(self) -> None:
        self._buffers.clear()

    def _answered_first(self) -> None:
        self.sent[0] = self.trips
        self.answered[:, 0] = self.trips


class DeviceCall:
    """Trips with arrays of the same shapes."""

    def __init__(
        self,
        channel: DeviceChannel,
        number: int,
        inputs: Sequence[npt.NDArray[Any]],
        results: Sequence[npt.NDArray[Any]],
        workers: int,
    ) -> None:
        self.channel = channel
        self.number = number
        self.inputs = inputs
        self.results = results
        self.workers = workers

    def send(self, *arrays: DeviceArray, count: DeviceArray | None = None) -> None:
        self.channel.memory.enqueue(lambda: self._send(arrays, count))

    def receive(self, count: DeviceArray | None = None) -> tuple[DeviceArray, ...]:
        memory = self.channel.memory
        memory.enqueue(self._wait)
        made = tuple(memory.made(host.shape, self._take(host, count)) for host in self.results)
        memory.enqueue(lambda: _overwrite((*self.inputs, *self.results), NOBODYS))
        return made

    def _send(self, arrays: Sequence[DeviceArray], count: DeviceArray | None) -> None:
        channel = self.channel
        _overwrite((*self.inputs, *self.results), NOBODYS)
        rows = _rows(count)
        for host, array in zip(self.inputs, arrays, strict=True):
            host[rows] = array.values[rows]
            channel.memory.pause()
        channel.sent[2] = self._all_rows() if count is None else count.values[0]
        channel.trips = (channel.trips + 1) % 2**32
        channel.sent[1] = self.number
        channel.sent[0] = channel.trips

    def _wait(self) -> None:
        """Wait for all workers that share the call, or for a failure."""
        channel = self.channel
        begin = time.monotonic()
        while not self._is_answered() and not channel.failed.any():
            if time.monotonic() - begin > self._deadline():
                channel.failed[1] = self.number + 1
            time.sleep(LOOK)

    def _deadline(self) -> float:
        return min(float(self.channel.deadline[0]), self.channel.memory.longest_wait)

    def _is_answered(self) -> bool:
        return bool((self.channel.answered[: self.workers, 0] == self.channel.trips).all())

    def _take(self, host: npt.NDArray[Any], count: DeviceArray | None) -> Any:
        def take(target: DeviceArray) -> None:
            values, rows = poisoned(host), _rows(count)
            values[rows] = host[rows]
            if self.channel.failed.any():
                _overwrite([values], LOST)
            target.values = values

        return take

    def _all_rows(self) -> int:
        return self.inputs[0].shape[0] if self.inputs and self.inputs[0].shape else 1


def _rows(count: DeviceArray | None) -> Any:
    """Return the index of the rows that are copied: all of them without a count."""
    return ... if count is None else slice(int(count.values[0]))


def _padded(form: ArrayForm) -> int:
    """Return the bytes that an array takes, with a gap that nobody should touch."""
    size = int(np.prod(form.shape)) * form.dtype.itemsize
    return -(-(size + 1) // ALIGNMENT) * ALIGNMENT


def _array(part: Bytes, form: ArrayForm) -> npt.NDArray[Any]:
    size = int(np.prod(form.shape)) * form.dtype.itemsize
    return part[:size].view(form.dtype).reshape(form.shape)


def _overwrite(arrays: Sequence[npt.NDArray[Any]], byte: int) -> None:
    for array in arrays:
        array.reshape(-1).view(np.uint8)[...] = byte
