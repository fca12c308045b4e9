"""From the host's memory, usually a checkpoint's memory map, to the device through pinned buffers.

The device reads pinned memory at the link's speed.  Threads fill several buffers at once: a
single one does not copy as fast as the link takes it.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import cupy
import cupyx
import numpy as np
import numpy.typing as npt

BUFFERS, BUFFER_BYTES = 16, 1 << 20


class Uploader:
    """Copies arrays piece by piece, each piece through one of the pinned buffers in turn."""

    def __init__(self) -> None:
        self._buffers = [cupyx.empty_pinned(BUFFER_BYTES, np.uint8) for _ in range(BUFFERS)]
        self._sent = [cupy.cuda.Event(disable_timing=True) for _ in range(BUFFERS)]
        self._threads = ThreadPoolExecutor(BUFFERS)
        self._turn = 0

    def upload(self, array: npt.NDArray[Any]) -> cupy.ndarray:
        """A copy of `array` on the device, whose bytes stay as they are."""
        device = cupy.empty(array.shape, array.dtype)
        source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        target = device.reshape(-1).view(cupy.uint8)
        pieces = [slice(i, i + BUFFER_BYTES) for i in range(0, len(source), BUFFER_BYTES)]
        if len(pieces) == 1:
            self._send(self._fill(self._next(), source), target)
            return device
        filled: list[Future[int]] = []
        for i, piece in enumerate(pieces):
            for ahead in pieces[len(filled) : i + BUFFERS]:
                filled.append(self._threads.submit(self._fill, self._next(), source[ahead]))
            self._send(filled[i].result(), target[piece])
        return device

    def _next(self) -> int:
        self._turn = (self._turn + 1) % BUFFERS
        return self._turn

    def _fill(self, buffer: int, piece: npt.NDArray[np.uint8]) -> int:
        self._sent[buffer].synchronize()
        np.copyto(self._buffers[buffer][: len(piece)], piece)
        return buffer

    def _send(self, buffer: int, target: cupy.ndarray) -> None:
        target.data.copy_from_host_async(self._buffers[buffer].ctypes.data, target.nbytes)
        self._sent[buffer].record()


@cache
def _uploader() -> Uploader:
    return Uploader()


def upload(array: npt.NDArray[Any]) -> cupy.ndarray:
    """A copy of a host array on the current device."""
    return _uploader().upload(array)
