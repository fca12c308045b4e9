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
from lfm2kit_cuda.device import compute_capability, on_device
from lfm2kit_cuda.kernels import load_kernel
from lfm2kit_cuda.memory import CudaMemory
from lfm2kit_cuda.upload import upload

Result = Drawn | NotANumber | None

WHY = {-1: NOT_FINITE, -2: ALL_EXCLUDED}  # what the kernel writes instead of an id
CLUSTERS = (9, 0)  # the first chips that have them


class Sampler:
    """Draws from logits in `memory`, in the order of its current stream.

    Only ids come to the host, and the logits of rows that ask for logprobs.
    """

    def __init__(self, memory: CudaMemory) -> None:
        self._memory = memory
        self._scratch: _Scratch | None = None

    def draw(self, logits: cupy.ndarray, rows: Sequence[Row | None]) -> list[Result]:
        return self.begin(logits, rows).end()

    def begin(
        self,
        logits: cupy.ndarray,
        rows: Sequence[Row | None],
        newest: cupy.ndarray | None = None,
    ) -> Drawing:
        with on_device(self._memory.device):
            logits = cupy.ascontiguousarray(logits)
            if len(logits) != len(rows):  # the kernel does not look where the rows end
                raise ValueError(f"{len(rows)} rows for {len(logits)} rows of logits")
            if newest is not None and len(newest) != len(rows):
                raise ValueError(f"{len(rows)} rows for {len(newest)} rows of ids")
            if self._scratch is None or not self._scratch.holds(logits.shape):
                self._scratch = _Scratch(logits.shape)
            drawn = _drawn(self._scratch, logits, rows, newest)
            return Drawing(self._memory, drawn, logits, rows, (newest, self._scratch))


def _drawn(
    scratch: _Scratch,
    logits: cupy.ndarray,
    rows: Sequence[Row | None],
    newest: cupy.ndarray | None,
) -> cupy.ndarray:
    """Return the ids twice: with errors among them, and with ids in place of these."""
    token_ids = cupy.empty((2, len(rows)), np.int32)
    if asking := len(rows) - rows.count(None):
        ctas = SAMPLING.CTAS if compute_capability() >= CLUSTERS else 1
        load_kernel("sampling", "draw_tokens", CTAS=ctas)(
            (asking * ctas,), SAMPLING.THREADS, logits, logits.shape[1], *_uploaded(rows), newest,
            scratch.changed, scratch.counts, token_ids[0], token_ids[1],
        )  # fmt: skip
    return token_ids


class Drawing:
    """Tokens on their way to the host.

    What another stream has made, and the kernel uses, is kept until they are there.
    """

    def __init__(
        self,
        memory: CudaMemory,
        drawn: cupy.ndarray,
        logits: cupy.ndarray,
        rows: Sequence[Row | None],
        kept: object,
    ) -> None:
        self._arriving = memory.start_to_host(drawn[0])
        self.token_ids = drawn[1]
        self._memory = memory
        self._logits = logits
        self._rows = rows
        self._kept = kept

    def end(self) -> list[Result]:
        with on_device(self._memory.device):
            token_ids = self._arriving.wait().tolist()
            drawn = enumerate(zip(token_ids, self._rows, strict=True))
            return [row and self._result(i, token_id, row) for i, (token_id, row) in drawn]

    def _result(self, i: int, token_id: int, row: Row) -> Drawn | NotANumber:
        if token_id < 0:
            return NotANumber(row.position, WHY[token_id])
        if row.logprobs is None:
            return Drawn(token_id)
        logits = self._memory.to_host(self._logits[i])
        return Drawn(token_id, *logprobs(logits, token_id, row.logprobs))


class _Scratch:
    """The arrays in which the kernel works on rows of a vocabulary."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.changed = cupy.empty(shape, np.float32)
        self.counts = cupy.zeros(shape, np.int32)  # the kernel leaves zeros

    def holds(self, shape: tuple[int, int]) -> bool:
        """Return whether rows of this shape fit; of another length, zeros would lie elsewhere."""
        return len(self.changed) >= shape[0] and self.changed.shape[1] == shape[1]


def _uploaded(rows: Sequence[Row | None]) -> list[cupy.ndarray]:
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
