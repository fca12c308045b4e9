"""The device's memory, as the core sees it: where arrays are copied to and from the host."""

from __future__ import annotations

from typing import Any

import cupy
import cupyx
import numpy as np
import numpy.typing as npt

from lfm2kit_cuda.upload import upload


class CudaMemory:
    """Arrays are `cupy.ndarray`s of the current device."""

    name = "cuda"

    def from_host(self, array: npt.NDArray[Any]) -> cupy.ndarray:
        return upload(array)

    def to_host(self, array: cupy.ndarray) -> npt.NDArray[Any]:
        """Into pinned memory, which the device writes at the link's speed; waits for it."""
        if array.size == 0:
            return np.empty(array.shape, array.dtype)
        host: npt.NDArray[Any] = cupyx.empty_pinned(array.shape, array.dtype)
        array.get(out=host)
        return host

    def free_bytes(self) -> int:
        """What the driver has left, and what CuPy's pool holds for later."""
        free, _ = cupy.cuda.runtime.memGetInfo()
        return int(free) + int(cupy.get_default_memory_pool().free_bytes())


CUDA = CudaMemory()
