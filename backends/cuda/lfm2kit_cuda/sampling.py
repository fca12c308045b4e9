"""Draws the next tokens on the device that has the logits (sampling.cu)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import cupy
import numpy as np

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
            tokens, token_ids = _drawn(self._scratch, logits, rows, newest)
            kept = newest, self._scratch
            return Drawing(self._memory, tokens, token_ids, logits, rows, kept)


def _drawn(
    scratch: _Scratch,
    logits: cupy.ndarray,
    rows: Sequence[Row | None],
    newest: cupy.ndarray | None,
) -> tuple[cupy.ndarray, cupy.ndarray]:
    """Return the ids twice: with errors among them, and with ids in place of these."""
    tokens, token_ids = cupy.empty(len(rows), np.int32), cupy.empty(len(rows), np.int32)
    if asking := len(rows) - rows.count(None):
        ctas = SAMPLING.CTAS if compute_capability() >= CLUSTERS else 1
        load_kernel("sampling", "draw_tokens", CTAS=ctas)(
            (asking * ctas,), SAMPLING.THREADS, logits, logits.shape[1], *_uploaded(rows), newest,
            scratch.changed, scratch.counts, tokens, token_ids,
        )  # fmt: skip
    return tokens, token_ids


class Drawing:
    """Tokens on their way to the host.

    What another stream has made, and the kernel uses, is kept until they are there.
    """

    def __init__(
        self,
        memory: CudaMemory,
        tokens: cupy.ndarray,
        token_ids: cupy.ndarray,
        logits: cupy.ndarray,
        rows: Sequence[Row | None],
        kept: object,
    ) -> None:
        self._arriving = memory.start_to_host(tokens)
        self.token_ids = token_ids
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


def _uploaded(rows: Sequence[Row | None]) -> tuple[cupy.ndarray, int, int, int]:
    """Return what rows ask as one array of words, and where their ids, biases and masks begin."""
    arrays = [array.view(np.uint32) for array in asked_by(rows)]
    ids, biases, masks = accumulate(map(len, arrays[:-1]))
    return upload(np.concatenate(arrays)), ids, biases, masks
