"""Draws the next tokens on the device that has the logits (sampling.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import cupy
import numpy as np
import numpy.typing as npt

from lfm2kit.engine.asked import asked_by
from lfm2kit.engine.drawing import ALL_EXCLUDED, NOT_FINITE, Drawn, NotANumber, Row
from lfm2kit.engine.logprobs import logprobs
from lfm2kit_cuda.constants import SAMPLING
from lfm2kit_cuda.device import on_device
from lfm2kit_cuda.kernels import load_kernel
from lfm2kit_cuda.memory import CudaMemory
from lfm2kit_cuda.upload import upload

WHY = {-1: NOT_FINITE, -2: ALL_EXCLUDED}  # what the kernel writes instead of an id


class Sampler:
    """Draws from logits in `memory`, in the order of its current stream.

    Only ids come to the host, and the logits of rows that ask for logprobs.
    """

    def __init__(self, memory: CudaMemory) -> None:
        self._memory = memory
        self._scratch: _Scratch | None = None

    def draw(self, logits: cupy.ndarray, rows: Sequence[Row]) -> list[Drawn | NotANumber]:
        with on_device(self._memory.device):
            logits = cupy.ascontiguousarray(logits)
            token_ids = self._memory.to_host(self._drawn(logits, rows)).tolist()
            drawn = zip(logits, token_ids, rows, strict=True)
            return [self._result(own, token_id, row) for own, token_id, row in drawn]

    def _drawn(self, logits: cupy.ndarray, rows: Sequence[Row]) -> cupy.ndarray:
        if len(logits) != len(rows):  # the kernel does not look where the rows end
            raise ValueError(f"{len(rows)} rows for {len(logits)} rows of logits")
        if self._scratch is None or not self._scratch.holds(logits.shape):
            self._scratch = _Scratch(logits.shape)
        token_ids = cupy.empty(len(rows), np.int32)
        if rows:
            load_kernel("sampling", "draw_tokens")(
                (len(rows),), SAMPLING.THREADS, logits, logits.shape[1], *_uploaded(rows),
                self._scratch.changed, self._scratch.counts, token_ids,
            )  # fmt: skip
        return token_ids

    def _result(self, logits: cupy.ndarray, token_id: int, row: Row) -> Drawn | NotANumber:
        if token_id < 0:
            return NotANumber(row.position, WHY[token_id])
        if row.logprobs is None:
            return Drawn(token_id)
        return Drawn(token_id, *logprobs(self._memory.to_host(logits), token_id, row.logprobs))


class _Scratch:
    """The arrays in which the kernel works on rows of a vocabulary."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.changed = cupy.empty(shape, np.float32)
        self.counts = cupy.zeros(shape, np.int32)  # the kernel leaves zeros

    def holds(self, shape: tuple[int, int]) -> bool:
        """Return whether rows of this shape fit; of another length, zeros would lie elsewhere."""
        return len(self.changed) >= shape[0] and self.changed.shape[1] == shape[1]


def _uploaded(rows: Sequence[Row]) -> list[cupy.ndarray]:
    """Return the arrays of `asked_by` on the device, from one copy."""
    arrays = [np.ascontiguousarray(array).view(np.uint8) for array in asked_by(rows)]
    sizes = [_padded(len(array)) for array in arrays]
    together: npt.NDArray[np.uint8] = np.zeros(sum(sizes), np.uint8)
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    for array, start in zip(arrays, starts, strict=True):
        together[start : start + len(array)] = array
    there = upload(together)
    return [there[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _padded(nbytes: int) -> int:
    """Return at least `nbytes`, as a multiple of what every element's address must be."""
    return -(-max(nbytes, 1) // 8) * 8
