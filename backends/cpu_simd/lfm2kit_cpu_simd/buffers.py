"""Arrays for intermediate results, which all kernels and blocks of a thread use again.

A new large array would consist of new memory pages, and the system clears these when they are first
touched: that takes some percent of a forward of many rows.
"""

from __future__ import annotations

import math
import threading

import numpy as np
import numpy.typing as npt

# The roles that lie in the same piece of memory, one after the other, because no block has two of
# them: so a thread takes little more than the block that needs most.
PIECES = (
    ("projected", "gathered"),
    ("gated", "heads", "inner"),
    ("keys", "outputs"),
    ("values",),
)
PIECE_OF = {role: piece for piece, roles in enumerate(PIECES) for role in roles}


class Buffers(threading.local):
    """The memory of all roles, in growing pieces of each thread that calls blocks."""

    def __init__(self) -> None:
        self._memory: dict[int, npt.NDArray[np.float32]] = {}

    def array(self, role: str, *shape: int) -> npt.NDArray[np.float32]:
        """Return a float32 array of any values, valid until a role of its piece is asked for.

        A block must not return it.
        """
        size, piece = math.prod(shape), PIECE_OF[role]
        if piece not in self._memory or self._memory[piece].size < size:
            self._memory.pop(piece, None)  # before the larger one is allocated
            self._memory[piece] = np.empty(size, np.float32)
        return self._memory[piece][:size].reshape(shape)


BUFFERS = Buffers()
