"""Trips from the midst of a device's work to threads of the host and back, captured or not.

A channel is host memory that the device has mapped: words through which both sides tell each other
what is there (`lfm2kit.crossing.Channel`), and arrays, the same bytes for all calls.  Kernels write
and read it (channel.cu); the host that enqueues them never waits.

The device counts the trips.  So a graph that is replayed makes new ones, and its kernels have
nothing of the host but addresses, which stay valid until the channel is closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import cupyx
import numpy as np
import numpy.typing as npt

from lfm2kit.crossing import ArrayForm
from lfm2kit_cuda.constants import CHANNEL
from lfm2kit_cuda.device import current_device, on_device
from lfm2kit_cuda.host_layout import (
    MOST_ARRAYS,
    VECTOR,
    Layout,
    receiving_grid,
    sending_grid,
)
from lfm2kit_cuda.kernels import Kernel, load_kernel
from lfm2kit_cuda.pinned import Mapped, empty_pinned
from lfm2kit_cuda.upload import upload

FIRST_BYTES = 1 << 16  # of the arrays' memory
COUNTERS = 2  # words: the newest trip, and CTAs that have arrived

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]


class Channel:
    """A channel from the current device to threads of the host.

    A trip that has not been answered after the seconds in `deadline` fails.  Trips follow one
    another: the calls of a channel are enqueued in one stream, or in streams that wait for each
    other.
    """

    def __init__(self, workers: int, deadline: float) -> None:
        if not 1 <= workers <= CHANNEL.MOST_THREADS:
            raise ValueError(f"a channel has 1 to {CHANNEL.MOST_THREADS} workers, not {workers}")
        self.device = current_device()
        words = cupyx.empty_pinned(CHANNEL.ANSWERED + workers * CHANNEL.WORKER, np.uint32)
        words[...] = 0  # pinned memory is used again
        self.sent: Words = words[:3]
        self.failed: Words = words[CHANNEL.FAILED : CHANNEL.DEADLINE]
        self.deadline = words[CHANNEL.DEADLINE :][:1].view(np.float32)
        self.deadline[0] = deadline
        self.answered: Words = words[CHANNEL.ANSWERED :].reshape(workers, CHANNEL.WORKER)
        self.control = Mapped.of(words)
        self.counters = upload(np.zeros(COUNTERS, np.uint32))
        cupy.cuda.get_current_stream().synchronize()  # whatever stream the first trip is made in
        self.send: Kernel = load_kernel("channel", "send")
        self.receive: Kernel = load_kernel("channel", "receive")
        self._arrays: list[Bytes] = []
        self._calls = 0

    def call(self, inputs: Sequence[ArrayForm], results: Sequence[ArrayForm], workers: int) -> Call:
        """Return a new call, which waits for the first `workers` workers.

        Raises ValueError if there are fewer workers, or if its arrays are too many or too large,
        and MemoryError if the system pins no memory for them.
        """
        if not 1 <= workers <= len(self.answered):
            raise ValueError(f"a call waits for 1 to {len(self.answered)} workers, not {workers}")
        call = Call(self, self._calls, inputs, results, workers)
        self._calls += 1
        return call

    def close(self) -> None:
        """Give the memory back, except for what calls that are still there have of it."""
        self._arrays.clear()

    def arrays(self, nbytes: int) -> Bytes:
        """Return the memory for the arrays of a call, shared with the other calls.

        What has become too small is kept, because graphs have its address.
        """
        last = len(self._arrays[-1]) if self._arrays else FIRST_BYTES // 2
        if last < nbytes or not self._arrays:
            self._arrays.append(empty_pinned(max(nbytes, 2 * last)))
        return self._arrays[-1][:nbytes]


class Call:
    """Trips with arrays of the same forms."""

    def __init__(
        self,
        channel: Channel,
        number: int,
        inputs: Sequence[ArrayForm],
        results: Sequence[ArrayForm],
        workers: int,
    ) -> None:
        self.number = number
        self._channel = channel
        self._workers = int(workers)
        self._takes, self._returns = tuple(inputs), tuple(results)
        self._rows = int(inputs[0].shape[0]) if inputs and inputs[0].shape else 1
        there, back = (Layout.of([*map(_nbytes, forms)]) for forms in (inputs, results))
        self._there, self._back = there, back
        with on_device(channel.device):
            memory = channel.arrays(there.nbytes + back.nbytes)
        given, returned = np.split(memory, [there.nbytes])
        self.inputs = _views(given, there, self._takes)
        self.results = _views(returned, back, self._returns)
        self._inputs_start, self._results_start = Mapped.of(given), Mapped.of(returned)

    def send(self, *arrays: cupy.ndarray, count: cupy.ndarray | None = None) -> None:
        """Enqueue the trip in the current stream, of all rows or the first `count`.

        Raises ValueError if the arrays are not those that the call takes.
        """
        forms = tuple((array.shape, array.dtype) for array in arrays)
        if forms != self._takes:
            raise ValueError(f"call {self.number} takes {self._takes}, not {forms}")
        channel = self._channel
        with on_device(channel.device):
            ctas, threads = sending_grid(self._there.places)
            channel.send(
                (ctas,), threads, *_padded([_whole_vectors(array) for array in arrays]),
                *self._there.vectors, self._inputs_start, channel.control, channel.counters,
                self.number, count, self._rows,
            )  # fmt: skip

    def receive(self, count: cupy.ndarray | None = None) -> tuple[cupy.ndarray, ...]:
        """Enqueue the wait in the current stream, and return the results, which are new arrays."""
        channel = self._channel
        with on_device(channel.device):
            results = tuple(_empty(*form) for form in self._returns)
            ctas, threads = receiving_grid(self._back.places, self._workers)
            channel.receive(
                (ctas,), threads, *_padded(results), *self._back.vectors, self._results_start,
                channel.control, channel.counters, self.number, self._workers, count, self._rows,
            )  # fmt: skip
        return results


def _nbytes(form: ArrayForm) -> int:
    return int(np.prod(form.shape, dtype=np.int64)) * form.dtype.itemsize


def _views(
    memory: Bytes, layout: Layout, forms: Sequence[ArrayForm]
) -> tuple[npt.NDArray[Any], ...]:
    return tuple(
        memory[start : start + _nbytes(form)].view(form.dtype).reshape(form.shape)
        for start, form in zip(layout.starts, forms, strict=True)
    )


def _padded(arrays: Sequence[cupy.ndarray]) -> list[cupy.ndarray | None]:
    return [*arrays, *(None,) * (MOST_ARRAYS - len(arrays))]


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> cupy.ndarray:
    """Return an array whose memory is whole vectors."""
    nbytes = _nbytes(ArrayForm(shape, dtype))
    return cupy.ndarray(shape, dtype, cupy.cuda.alloc(-(-nbytes // VECTOR) * VECTOR))


def _whole_vectors(array: cupy.ndarray) -> cupy.ndarray:
    """Return the array, or a copy of it if kernels cannot read it by vectors."""
    if array.flags.c_contiguous and array.nbytes % VECTOR == 0 and array.data.ptr % VECTOR == 0:
        return array
    copy = _empty(array.shape, array.dtype)
    copy[...] = array
    return copy
