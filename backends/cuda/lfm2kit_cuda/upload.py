"""From the host's memory, usually a checkpoint's memory map, to the device through pinned buffers.

The device reads pinned memory at the link's speed.  Threads fill several buffers at once: a
single one does not copy as fast as the link takes it.  To wake one takes as long as to copy some
hundred kilobytes, so that what fits in the buffers is shared out among few, this one included.
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
PARTS = 4  # of what fits in the buffers


class Uploader:
    """Copies arrays piece by piece, each piece through one of the pinned buffers in turn."""

    def __init__(self) -> None:
        self._room = cupyx.empty_pinned(BUFFERS * BUFFER_BYTES, np.uint8)
        self._buffers = self._room.reshape(BUFFERS, BUFFER_BYTES)
        self._sent = [cupy.cuda.Event(disable_timing=True) for _ in range(BUFFERS)]
        self._threads = ThreadPoolExecutor(BUFFERS)
        self._turn = 0

    def upload(self, array: npt.NDArray[Any]) -> cupy.ndarray:
        """A copy of `array` on the device, whose bytes stay as they are."""
        device = cupy.empty(array.shape, array.dtype)
        source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        target = device.reshape(-1).view(cupy.uint8)
        if len(source) <= BUFFER_BYTES:
            self._send(self._fill(self._next(), source), target)
        elif len(source) <= len(self._room):
            self._upload_in_parts(source, target)
        else:
            self._upload_piece_by_piece(source, target)
        return device

    def _upload_piece_by_piece(self, source: npt.NDArray[np.uint8], target: cupy.ndarray) -> None:
        pieces = _slices(len(source), BUFFER_BYTES)
        filled: list[Future[int]] = []
        for i, piece in enumerate(pieces):
            for ahead in pieces[len(filled) : i + BUFFERS]:
                filled.append(self._threads.submit(self._fill, self._next(), source[ahead]))
            self._send(filled[i].result(), target[piece])

    def _upload_in_parts(self, source: npt.NDArray[np.uint8], target: cupy.ndarray) -> None:
        """Through all buffers as one."""
        for sent in self._sent:
            sent.synchronize()
        first, *rest = _slices(len(source), -(-len(source) // PARTS))
        filled = [self._threads.submit(np.copyto, self._room[p], source[p]) for p in rest]
        np.copyto(self._room[first], source[first])
        self._send_part(first, target)
        for part, others in zip(rest, filled, strict=True):
            others.result()
            self._send_part(part, target)
        for sent in self._sent:
            sent.record()

    def _send_part(self, part: slice, target: cupy.ndarray) -> None:
        to = target[part]
        to.data.copy_from_host_async(self._room[part].ctypes.data, to.nbytes)

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


def _slices(size: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


@cache
def _uploader() -> Uploader:
    return Uploader()


def upload(array: npt.NDArray[Any]) -> cupy.ndarray:
    """A copy of a host array on the current device."""
    return _uploader().upload(array)
