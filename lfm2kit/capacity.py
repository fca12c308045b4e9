"""Whether what blocks keep in their memories fits there, before any of it is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lfm2kit.backend import Backend, NeedsWorkspace, Weights
from lfm2kit.errors import Lfm2kitError
from lfm2kit.machine import tightest_limit
from lfm2kit.memory import HOST, Bounded
from lfm2kit.placement import Placed


class Shortage(NamedTuple):
    """A memory that is too small, and the bytes that are needed there at least."""

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
    """What blocks say that they need, and what their memories say that they have."""

    create: Callable[[str], Backend]
    weights: Weights  # of the whole model
    ranks: int = 1  # processes alike that share the host's memory

    def of(self, leaf: Placed, tokens: int) -> int | None:
        """Bytes of a block that is not built yet; None where its backend does not say."""
        assert leaf.backend is not None  # a leaf's always is
        backend = self.create(leaf.backend)
        if not isinstance(backend, NeedsWorkspace):
            return None
        return backend.workspace_bytes(leaf.spec, self.weights.scope(leaf.scope), tokens)

    def free(self, placed: Placed) -> dict[str, int]:
        """Bytes by memory, of those that know."""
        memories = {leaf.memory.name: leaf.memory for leaf in placed.leaves()}
        return {
            name: HOST.free_bytes(self.ranks) if name == HOST.name else memory.free_bytes()
            for name, memory in memories.items()
            if isinstance(memory, Bounded)
        }

    def shortage(self, placed: Placed, tokens: int = 0) -> Shortage | None:
        """The first memory that cannot hold its blocks and a forward of `tokens` tokens, if any."""
        for name, free in self.free(placed).items():
            leaves = [leaf for leaf in placed.leaves() if leaf.memory.name == name]
            if (kept := self.needed(leaves, 0)) > free:
                return Shortage(name, "the model", kept, free)
            if (needed := self.needed(leaves, tokens)) > free:
                return Shortage(name, f"the model with {tokens} tokens at once", needed, free)
        return None

    def needed(self, leaves: Sequence[Placed], tokens: int) -> int:
        """Bytes that blocks in one memory need at least, together.

        What they need in calls they may share: the largest need is counted.
        """
        kept = [self.of(leaf, 0) or 0 for leaf in leaves]
        in_calls = [self.of(leaf, tokens) or 0 for leaf in leaves]
        return sum(kept) + max((a - b for a, b in zip(in_calls, kept, strict=True)), default=0)


def check_room(what_takes: str, nbytes: int, advice: str) -> None:
    """`Lfm2kitError` where the host's memory has less than `nbytes` bytes left."""
    if nbytes > (free := HOST.free_bytes()):
        raise Lfm2kitError(
            f"{what_takes} {size(nbytes)} of memory, {size(free)} are free "
            f"({tightest_limit().name}); {advice}"
        )


def size(count: float) -> str:
    """A number of bytes for people: "512 MB", "46.9 GB"."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
