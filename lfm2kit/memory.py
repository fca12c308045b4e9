"""The kinds of memory that arrays live in, and the way between them: always through the host."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from lfm2kit.machine import free_memory

Array = Any  # numpy.ndarray in the host's memory, whatever a backend says in its own


class Memory(Protocol):
    """A memory space.  Two blocks whose memories have one name hand arrays over without a copy."""

    @property
    def name(self) -> str:
        """The name that `lfm2kit plan` shows: "host", "cuda", ..."""
        ...

    def from_host(self, array: npt.NDArray[Any]) -> Array:
        """A copy of a NumPy array in this memory; dtype and shape stay."""
        ...

    def to_host(self, array: Array) -> npt.NDArray[Any]:
        """A NumPy array with the values of `array`, complete when this returns."""
        ...


@runtime_checkable
class Bounded(Protocol):
    """Capability of a memory that can say how much of it is left.

    A model whose blocks need more of it (see `MemoryFigures`) is refused before it is built.
    """

    @property
    def name(self) -> str: ...

    def free_bytes(self) -> int:
        """Bytes that blocks can still take."""
        ...


class HostMemory:
    """The process's own memory: NumPy arrays, handed over as they are."""

    name = "host"

    def from_host(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array

    def to_host(self, array: Array) -> npt.NDArray[Any]:
        return np.asarray(array)

    def free_bytes(self, ranks: int = 1) -> int:
        """Returns the bytes that blocks can still take if `ranks` ranks share the machine.

        The smallest of what the machine, its control groups and `ulimit` have left.
        """
        return free_memory(ranks)


HOST = HostMemory()
