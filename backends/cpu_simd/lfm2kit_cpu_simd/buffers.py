"""Memory that stays between the kernels of a block, and from block to block.

A large array comes from fresh pages of memory, which the system clears when they are first touched:
some percent of a forward of many rows.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt


class Buffers(threading.local):
    """One growing piece of memory for each role; every thread that calls blocks has its own."""

    def __init__(self) -> None:
        self._memory: dict[str, npt.NDArray[np.float32]] = {}

    def array(self, role: str, *shape: int) -> npt.NDArray[np.float32]:
        """float32 of any values, valid until the role is asked for again: never to be returned."""
        size = int(np.prod(shape))
        if role not in self._memory or self._memory[role].size < size:
            self._memory[role] = np.empty(size, np.float32)
        return self._memory[role][:size].reshape(shape)


BUFFERS = Buffers()
