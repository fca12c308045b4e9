"""Host memory that the device reads at the link's speed, and that the system cannot reclaim."""

from __future__ import annotations

from typing import Any, NamedTuple

import cupy
import numpy as np
import numpy.typing as npt

from lfm2kit.building.byte_counts import size

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation, which CuPy does not export


class _Address(NamedTuple):
    ptr: int


class Mapped(NamedTuple):
    """Pinned host memory as an argument of kernels: its address is the same on the device."""

    data: _Address

    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> Mapped:
        return cls(_Address(array.ctypes.data))


def empty_pinned(nbytes: int) -> npt.NDArray[np.uint8]:
    """Return new bytes that are given back to the system when the array is dropped.

    CuPy's pool would keep them for later.  Raise MemoryError if the system pins no more.
    """
    try:
        memory = cupy.cuda.PinnedMemory(nbytes, cupy.cuda.runtime.hostAllocPortable)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        if error.status != OUT_OF_MEMORY:
            raise
        raise MemoryError(f"the system does not pin {size(nbytes)} more") from None
    return np.frombuffer(cupy.cuda.PinnedMemoryPointer(memory, 0), np.uint8, nbytes)
