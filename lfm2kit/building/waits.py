"""Where a model may wait in a forward: around blocks in other memories, and for other ranks."""

from __future__ import annotations

from typing import NamedTuple

from lfm2kit.memory import Memory
from lfm2kit.seam import Seam
from lfm2kit.transport import Exchanging

RANKS = "ranks"


class Waits(NamedTuple):
    """A place where one memory's work may wait."""

    name: str  # of the block there: "layers.3.feed_forward"
    memory: Memory  # whose work waits
    at: Seam | Exchanging

    @property
    def awaited(self) -> str:
        """Return what is waited for: other ranks, or a memory by its name."""
        return self.at.memory.name if isinstance(self.at, Seam) else RANKS
