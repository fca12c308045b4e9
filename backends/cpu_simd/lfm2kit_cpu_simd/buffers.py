"""Arrays for intermediate results, which all kernels and blocks of a thread use again.

A new large array would consist of new memory pages, and the system clears these when they are first
touched: that takes some percent of a forward of many rows.
"""

from __future__ import annotations

import math
import threading

import numpy as np
import numpy.typing as npt


class Buffers(threading.local):
    """The memory for each role, one growing piece per role and per thread that calls blocks."""

    def __init__(self) -> None:
        self._memory: dict[str, npt.NDArray[np.float32]] = {}

    def array(self, role: str, *shape: int) -> npt.NDArray[np.float32]:
        """Return a float32 array of any values, valid until its role is asked for again.

        A block must not return it.
        """
        size = math.prod(shape)
        if role not in self._memory or self._memory[role].size < size:
            self._memory[role] = np.empty(size, np.float32)
        return self._memory[role][:size].reshape(shape)


BUFFERS = Buffers()
