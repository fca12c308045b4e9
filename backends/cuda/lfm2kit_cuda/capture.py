"""A whole step as one CUDA graph: a batch's arrays go to the device in one copy, then it runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from threading import Lock

import cupy
import cupyx
import numpy as np
import numpy.typing as npt

from lfm2kit.backend import Array, Batch
from lfm2kit_cuda.device import on_device
from lfm2kit_cuda.memory import CudaMemory
from lfm2kit_cuda.recording import Part, recording

RELAXED = cupy.cuda.runtime.streamCaptureModeRelaxed  # pools, and other threads, may allocate
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation, which CuPy does not export
BUFFERS = 2  # of pinned memory: one is filled while the device still reads the other


class Replay:
    """A recording of `step` for batches of one form, whatever state it goes on from.

    Threads may call it in streams of their own.

    Recording runs nothing: it would write the state.  It relies on `step` having run with a batch
    of this form before, so that all kernels are compiled and loaded.  The graph's arrays come from
    a pool of its own, which nothing else takes memory from as long as the graph lives.
    """

    def __init__(self, step: Callable[[Batch], Array], batch: Batch, memory: CudaMemory) -> None:
        self._memory = memory
        self._lock = Lock()
        self._pool = cupy.cuda.MemoryPool()
        count = len(batch.packed())
        with memory.stream(), cupy.cuda.using_allocator(self._pool.malloc):
            self._staging = Staging(count)
            self._done = cupy.cuda.Event(disable_timing=True)
            self._arrays = cupy.empty(count, np.int32)
            there = batch.unpacked(memory, self._arrays)
            try:
                self._graph, self._logits, self._parts = recorded(step, there)
            finally:
                there.views.clear()  # of which it is one: the garbage collector would come later

    def __call__(self, batch: Batch) -> Array:
        """Return the logits of a host batch, the caller's own, in the order of the current stream.

        The graph has one set of arrays, so it starts when its last run has ended, in whatever
        stream that was.
        """
        return self._run(batch, None)

    def with_ids(self, batch: Batch, token_ids: cupy.ndarray) -> Array:
        """Return the logits of a host batch whose ids only the device has."""
        if token_ids.shape != (batch.tokens,):  # the copy does not look where they end
            raise ValueError(f"{token_ids.shape} ids for a batch of {batch.tokens} tokens")
        return self._run(batch, token_ids)

    def _run(self, batch: Batch, token_ids: cupy.ndarray | None) -> Array:
        with self._lock, on_device(self._memory.device):
            stream = cupy.cuda.get_current_stream()
            stream.wait_event(self._done)
            self._staging.send(batch.packed(), self._arrays, stream)
            if token_ids is not None:  # they come first in `packed`
                there = self._arrays[: batch.tokens].data
                there.copy_from_device_async(token_ids.data, token_ids.nbytes, stream)
            try:
                with ExitStack() as launching:
                    for part in self._parts:
                        launching.enter_context(part.launching(stream))
                    self._graph.launch(stream)
                return self._logits.copy()
            finally:
                self._done.record(stream)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the graph's arrays, without what the driver keeps of its kernels."""
        with on_device(self._memory.device):
            return int(self._pool.total_bytes())

    def close(self) -> None:
        with self._lock, on_device(self._memory.device):
            self._done.synchronize()
            del self._graph, self._logits, self._arrays, self._parts
            self._pool.free_all_blocks()


class Staging:
    """Pinned memory through which a batch's numbers go to the device.

    The host waits for nothing but the copy that was made from the same buffer before.
    """

    def __init__(self, count: int) -> None:
        self._buffers = [cupyx.empty_pinned(count, np.int32) for _ in range(BUFFERS)]
        self._read = [cupy.cuda.Event(disable_timing=True) for _ in range(BUFFERS)]
        self._turn = 0

    def send(
        self, numbers: npt.NDArray[np.int32], target: cupy.ndarray, stream: cupy.cuda.Stream
    ) -> None:
        self._turn = (self._turn + 1) % BUFFERS
        buffer, read = self._buffers[self._turn], self._read[self._turn]
        read.synchronize()
        buffer[:] = numbers
        target.data.copy_from_host_async(buffer.ctypes.data, target.nbytes, stream)
        read.record(stream)


def recorded(
    step: Callable[[Batch], Array], batch: Batch
) -> tuple[cupy.cuda.Graph, Array, list[Part]]:
    """Return the graph of `step`, what it will leave its result in, and what takes part in it.

    Raise MemoryError if the device has no room for either.
    """
    stream = cupy.cuda.get_current_stream()
    stream.begin_capture(mode=RELAXED)
    try:
        with recording(stream) as made:
            result = step(batch)
    except BaseException:
        with suppress(cupy.cuda.runtime.CUDARuntimeError):  # the first error says why
            stream.end_capture()
        raise
    try:
        graph = stream.end_capture()
        graph.upload(stream)
        stream.synchronize()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        if error.status == OUT_OF_MEMORY:
            raise MemoryError(f"the device has no room for a graph: {error}") from None
        raise
    return graph, result, made.parts
