"""A whole forward as one CUDA graph: launched once per batch, without Python in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from threading import Lock

import cupy
import cupyx
import numpy as np

from lfm2kit.backend import Array, Batch
from lfm2kit_cuda.device import on_device
from lfm2kit_cuda.memory import CudaMemory


class Replay:
    """`forward`, recorded for batches of one shape; threads may call it in streams of their own.

    The graph's arrays come from a pool of its own, which nothing else takes memory from as long
    as the graph lives.  A first, unrecorded call compiles what is missing and fills the pool, so
    that the recorded one finds its memory there.
    """

    def __init__(self, forward: Callable[[Batch], Array], batch: Batch, memory: CudaMemory) -> None:
        self._memory = memory
        self._lock = Lock()
        self._pool = cupy.cuda.MemoryPool()
        with memory.stream(), cupy.cuda.using_allocator(self._pool.malloc):
            stream = cupy.cuda.get_current_stream()
            self._batch = replace(batch).on(memory)
            forward(self._batch)
            stream.synchronize()
            # Relaxed: other threads may allocate meanwhile.
            stream.begin_capture(mode=cupy.cuda.runtime.streamCaptureModeRelaxed)
            try:
                self._logits = forward(self._batch)
            finally:
                self._graph = stream.end_capture()
            self._sent, self._done = (cupy.cuda.Event(disable_timing=True) for _ in range(2))
        self._token_ids = cupyx.empty_pinned(batch.tokens, np.int32)

    def __call__(self, batch: Batch) -> Array:
        """Return the logits of a batch, the caller's own, in the order of the current stream.

        The graph has one set of arrays: a replay begins when the one before has ended, in whatever
        stream that was.
        """
        with self._lock, on_device(self._memory.device):
            stream = cupy.cuda.get_current_stream()
            stream.wait_event(self._done)
            self._sent.synchronize()  # the pinned ids have been read
            self._token_ids[:] = batch.token_ids
            self._batch.token_ids.set(self._token_ids, stream=stream)
            self._sent.record(stream)
            self._graph.launch(stream)
            try:
                return self._logits.copy()
            finally:
                self._done.record(stream)

    @property
    def nbytes(self) -> int:
        """The bytes of the graph's arrays, without what the driver keeps of its kernels."""
        with on_device(self._memory.device):
            return int(self._pool.total_bytes())

    def close(self) -> None:
        with self._lock, on_device(self._memory.device):
            self._done.synchronize()
            self._batch.forget_views()
            del self._graph, self._logits, self._batch
            self._pool.free_all_blocks()
