"""From the host's memory, usually a checkpoint's memory map, to the device through pinned buffers.

The device reads pinned memory at the link's speed.  A single thread does not copy as fast as the
link takes it, so several fill buffers at once.  Each device has buffers of its own, and one array
at a time goes through them, whichever thread it is from.  A buffer is filled anew when the stream
that it was sent in has read it.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from threading import Lock
from typing import Any

import cupy
import cupyx
import numpy as np
import numpy.typing as npt

from lfm2kit_cuda.device import current_device

BUFFERS, BUFFER_BYTES = 16, 1 << 20
PARTS, MOST_IN_PARTS = 4, BUFFERS * BUFFER_BYTES

Bytes = npt.NDArray[np.uint8]


class InPieces:
    """An upload that copies arrays of any size piece by piece, through a ring of buffers."""

    def __init__(self, device: int) -> None:
        self.lock = Lock()
        self._buffers = [cupyx.empty_pinned(BUFFER_BYTES, np.uint8) for _ in range(BUFFERS)]
        self._addresses = [buffer.ctypes.data for buffer in self._buffers]
        self._sent = [cupy.cuda.Event(disable_timing=True) for _ in range(BUFFERS)]
        self._threads = _threads(BUFFERS, device)
        self._turn = 0

    def copy(self, source: Bytes, target: cupy.cuda.MemoryPointer) -> None:
        if len(source) <= BUFFER_BYTES:
            self._send(self._fill(self._next(), source), target, len(source))
            return
        pieces = _slices(len(source), BUFFER_BYTES)
        filled: list[Future[int]] = []
        try:
            for i, piece in enumerate(pieces):
                for ahead in pieces[len(filled) : i + BUFFERS]:
                    filled.append(self._threads.submit(self._fill, self._next(), source[ahead]))
                self._send(filled[i].result(), target + piece.start, piece.stop - piece.start)
        finally:
            wait(filled)  # after an interrupt too: the next copy gets these buffers

    def _next(self) -> int:
        self._turn = (self._turn + 1) % BUFFERS
        return self._turn

    def _fill(self, buffer: int, piece: Bytes) -> int:
        self._sent[buffer].synchronize()
        np.copyto(self._buffers[buffer][: len(piece)], piece)
        return buffer

    def _send(self, buffer: int, target: cupy.cuda.MemoryPointer, nbytes: int) -> None:
        target.copy_from_host_async(self._addresses[buffer], nbytes)
        self._sent[buffer].record()


class InParts:
    """An upload that several threads do at once, a part each: for a few megabytes.

    To wake a thread takes as long as to copy some hundred kilobytes, and to hand over a piece not
    much less.
    """

    def __init__(self, device: int) -> None:
        self.lock = Lock()
        self._buffer = cupyx.empty_pinned(MOST_IN_PARTS, np.uint8)
        self._sent = cupy.cuda.Event(disable_timing=True)
        self._threads = _threads(PARTS - 1, device)

    def copy(self, source: Bytes, target: cupy.cuda.MemoryPointer) -> None:
        first, *rest = _slices(len(source), -(-len(source) // PARTS))
        self._sent.synchronize()
        filled = [self._threads.submit(self._fill, part, source) for part in rest]
        try:
            self._fill(first, source)
            self._send(first, target)
            for part, fill in zip(rest, filled, strict=True):
                fill.result()
                self._send(part, target)
        finally:
            wait(filled)
            self._sent.record()

    def _fill(self, part: slice, source: Bytes) -> None:
        np.copyto(self._buffer[part], source[part])

    def _send(self, part: slice, target: cupy.cuda.MemoryPointer) -> None:
        source = self._buffer.ctypes.data + part.start
        (target + part.start).copy_from_host_async(source, part.stop - part.start)


def _threads(count: int, device: int) -> ThreadPoolExecutor:
    """Return threads on a device: else a thread that waits for a copy takes memory of device 0."""
    return ThreadPoolExecutor(count, initializer=cupy.cuda.runtime.setDevice, initargs=(device,))


in_pieces, in_parts = cache(InPieces), cache(InParts)
_making = Lock()  # of a second object for a device, the buffers would be freed while in use


def upload(array: npt.NDArray[Any]) -> cupy.ndarray:
    """Return a copy of a host array on the current device, whose bytes stay as they are.

    The array may be written as soon as this returns.  The copy is complete in the order of the
    current stream.
    """
    copy = cupy.empty(array.shape, array.dtype)
    source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    kind = in_parts if BUFFER_BYTES < len(source) <= MOST_IN_PARTS else in_pieces
    if len(source):
        with _making:
            way = kind(current_device())
        with way.lock:
            way.copy(source, copy.data)
    return copy


def _slices(size: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]
