"""From the checkpoint's memory map to the device, through pinned buffers.

The device reads pinned memory at the link's speed.  Threads fill several buffers at once: a
single one does not copy as fast as the link takes it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
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

    def upload(self, array: npt.NDArray[Any]) -> cupy.ndarray:
        """A copy of `array` on the device, whose bytes stay as they are."""
        device = cupy.empty(array.shape, array.dtype)
        source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        target = device.reshape(-1).view(cupy.uint8)
        starts = range(0, len(source), BUFFER_BYTES)
        filled = [
            self._threads.submit(self._fill, i, source[start : start + BUFFER_BYTES])
            for i, start in enumerate(starts[:BUFFERS])
        ]
        for i, start in enumerate(starts):
            piece = source[start : start + BUFFER_BYTES]
            filled[i].result()
            self._send(i % BUFFERS, target[start : start + BUFFER_BYTES])
            if i + BUFFERS < len(starts):
                start = starts[i + BUFFERS]
                piece = source[start : start + BUFFER_BYTES]
                filled.append(self._threads.submit(self._fill, i, piece))
        return device

    def _fill(self, i: int, piece: npt.NDArray[np.uint8]) -> None:
        self._sent[i % BUFFERS].synchronize()
        np.copyto(self._buffers[i % BUFFERS][: len(piece)], piece)

    def _send(self, i: int, target: cupy.ndarray) -> None:
        target.data.copy_from_host_async(self._buffers[i].ctypes.data, target.nbytes)
        self._sent[i].record()


@cache
def _uploader() -> Uploader:
    return Uploader()


def upload(array: npt.NDArray[Any]) -> cupy.ndarray:
    """A copy of a host array on the current device."""
    return _uploader().upload(array)
