"""Whether what blocks keep in their memories fits there, before any of it is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lfm2kit.backend import Backend, NeedsWorkspace
from lfm2kit.memory import Bounded
from lfm2kit.placement import Placed


class Shortage(NamedTuple):
    """A memory that is too small, and the bytes that its blocks need there at least."""

    memory: str
    needed: int
    free: int

    def __str__(self) -> str:
        needed, free, missing = (
            1e-9 * n for n in (self.needed, self.free, self.needed - self.free)
        )
        return (
            f"memory '{self.memory}' is too small: the model needs {needed:.1f} GB there, "
            f"{free:.1f} GB are free, {missing:.1f} GB are missing"
        )


def workspace_bytes(leaf: Placed, create: Callable[[str], Backend], tokens: int) -> int | None:
    """Of a block that is not built yet; None where its backend does not say."""
    assert leaf.backend is not None  # a leaf's always is
    backend = create(leaf.backend)
    return (
        backend.workspace_bytes(leaf.spec, tokens) if isinstance(backend, NeedsWorkspace) else None
    )


def free_bytes(placed: Placed) -> dict[str, int]:
    """Bytes by memory, of those that know."""
    memories = {leaf.memory.name: leaf.memory for leaf in placed.leaves()}
    return {name: m.free_bytes() for name, m in memories.items() if isinstance(m, Bounded)}


def shortage(placed: Placed, create: Callable[[str], Backend]) -> Shortage | None:
    """The first memory that cannot hold its blocks, if any; of those that know what is free.

    What they take for activations is left out: blocks may share it.
    """
    for name, free in free_bytes(placed).items():
        here = (leaf for leaf in placed.leaves() if leaf.memory.name == name)
        needed = sum(workspace_bytes(leaf, create, tokens=0) or 0 for leaf in here)
        if needed > free:
            return Shortage(name, needed, free)
    return None
