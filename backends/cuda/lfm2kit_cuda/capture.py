"""A whole forward as one CUDA graph: launched once per batch, without Python in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import cupy
import cupyx
import numpy as np

from lfm2kit.backend import Array, Batch
from lfm2kit_cuda.memory import CUDA


class Replay:
    """`forward`, recorded for batches of one shape.

    The graph's arrays come from a pool of its own, which nothing else takes memory from as long
    as the graph lives.  A first, unrecorded call compiles what is missing and fills the pool, so
    that the recorded one finds its memory there.
    """

    def __init__(self, forward: Callable[[Batch], Array], batch: Batch) -> None:
        self._pool = cupy.cuda.MemoryPool()
        self._stream = cupy.cuda.Stream()
        with self._stream, cupy.cuda.using_allocator(self._pool.malloc):
            self._batch = replace(batch).on(CUDA)
            forward(self._batch)
            self._stream.synchronize()
            self._stream.begin_capture(mode=cupy.cuda.runtime.streamCaptureModeRelaxed)
            try:
                self._logits = forward(self._batch)
            finally:
                self._graph = self._stream.end_capture()
        self._token_ids = cupyx.empty_pinned(batch.tokens, np.int32)

    def __call__(self, batch: Batch) -> Array:
        self._stream.synchronize()  # the last replay has read its ids
        self._token_ids[:] = batch.token_ids
        self._batch.token_ids.set(self._token_ids, stream=self._stream)
        self._graph.launch(self._stream)
        return self._logits

    @property
    def nbytes(self) -> int:
        """The bytes of the graph's arrays, without what the driver keeps of its kernels."""
        return int(self._pool.total_bytes())

    def close(self) -> None:
        self._stream.synchronize()
        self._batch.forget_views()
        del self._graph, self._logits, self._batch
        self._pool.free_all_blocks()
