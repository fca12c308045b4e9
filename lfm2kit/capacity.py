"""Checks whether a model fits into its memories, before any of it is allocated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lfm2kit.backend import Backend, NeedsWorkspace, Weights
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.machine import tightest_limit
from lfm2kit.memory import HOST, Bounded
from lfm2kit.placement import Placed


class Shortage(NamedTuple):
    """A memory that is too small, and the bytes that are needed there at the least."""

    memory: str
    what: str  # needs them
    needed: int
    free: int

    def __str__(self) -> str:
        needed, free, missing = map(size, (self.needed, self.free, self.needed - self.free))
        by_whom = f" ({tightest_limit().name})" if self.memory == HOST.name else ""
        return (
            f"memory '{self.memory}' is too small: {self.what} needs {needed} there, "
            f"{free} are free{by_whom}, {missing} are missing"
        )


class Sizes(NamedTuple):
    """Compares what blocks need with what their memories have."""

    create: Callable[[str], Backend]
    weights: Weights  # of the whole model
    ranks: int = 1  # ranks that share the host's memory

    def of(self, leaf: Placed, tokens: int) -> int | None:
        """Returns the bytes that a block will need; None if its backend does not say."""
        assert leaf.backend is not None  # a leaf's always is
        backend = self.create(leaf.backend)
        if not isinstance(backend, NeedsWorkspace):
            return None
        return backend.workspace_bytes(leaf.spec, self.weights.scope(leaf.scope), tokens)

    def free(self, placed: Placed) -> dict[str, int]:
        """Returns the free bytes by memory, for memories that know them."""
        memories = {leaf.memory.name: leaf.memory for leaf in placed.leaves()}
        return {
            name: HOST.free_bytes(self.ranks) if name == HOST.name else memory.free_bytes()
            for name, memory in memories.items()
            if isinstance(memory, Bounded)
        }

    def shortage(self, placed: Placed, tokens: int = 0) -> Shortage | None:
        """Returns the first memory too small for its blocks and a forward of `tokens` tokens."""
        for name, free in self.free(placed).items():
            leaves = [leaf for leaf in placed.leaves() if leaf.memory.name == name]
            if (kept := self.needed(leaves, 0)) > free:
                return Shortage(name, "the model", kept, free)
            if (needed := self.needed(leaves, tokens)) > free:
                return Shortage(name, f"the model with {tokens} tokens at once", needed, free)
        return None

    def needed(self, leaves: Sequence[Placed], tokens: int) -> int:
        """Returns the bytes that blocks in one memory need together, at the least.

        Blocks may share their workspace, so only the largest workspace counts.
        """
        kept = [self.of(leaf, 0) or 0 for leaf in leaves]
        in_calls = [self.of(leaf, tokens) or 0 for leaf in leaves]
        return sum(kept) + max((a - b for a, b in zip(in_calls, kept, strict=True)), default=0)


def check_room(what_takes: str, nbytes: int, *advice: str | Option) -> None:
    """Raises `Lfm2kitError` if the host has less than `nbytes` bytes of memory left."""
    if nbytes > (free := HOST.free_bytes()):
        raise Lfm2kitError(
            f"{what_takes} {size(nbytes)} of memory, {size(free)} are free "
            f"({tightest_limit().name}); ",
            *advice,
        )


def size(count: float) -> str:
    """Formats a number of bytes for people: "512 MB", "46.9 GB"."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
