"""Keeps captured forwards by the shape of their batches, within bounds."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from lfm2kit.backend import Replay
from lfm2kit.memory import Bounded, Memory

MOST = 64  # a graph of a thousand kernels takes some ten megabytes of the driver's memory
SHARE = 0.5  # of the memory that would be free without them
FREE_IF_UNKNOWN = 4 << 30  # bytes, if the memory does not know what is free


class Replays:
    """The replays used last: at most `most`, and at most their share of the memory.

    The newest is always kept.  A replay that is dropped is closed.
    """

    def __init__(self, memory: Memory, most: int = MOST) -> None:
        self._memory = memory
        self._most = most
        self._kept: dict[Hashable, Replay] = {}  # the least recently used first

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return sum(replay.nbytes for replay in self._kept.values())

    def get(self, shape: Hashable, capture: Callable[[], Replay]) -> Replay:
        """Returns the replay of this shape; captures it if there is none."""
        replay = self._kept.pop(shape, None) or self._captured(capture)
        self._kept[shape] = replay
        return replay

    def close(self) -> None:
        """Drops all of them."""
        while self._kept:
            self._drop()

    def _captured(self, capture: Callable[[], Replay]) -> Replay:
        while len(self._kept) >= self._most:
            self._drop()
        replay = self._captured_once_there_is_room(capture)
        most_bytes = self._most_bytes(replay)
        while self._kept and self.nbytes + replay.nbytes > most_bytes:
            self._drop()
        return replay

    def _captured_once_there_is_room(self, capture: Callable[[], Replay]) -> Replay:
        try:
            return capture()
        except MemoryError:
            if not self._kept:
                raise
        self.close()  # outside the handler: the error's frames hold arrays
        return capture()

    def _most_bytes(self, newest: Replay) -> float:
        memory = self._memory
        free = memory.free_bytes() if isinstance(memory, Bounded) else FREE_IF_UNKNOWN
        return SHARE * (free + self.nbytes + newest.nbytes)

    def _drop(self) -> None:
        self._kept.pop(next(iter(self._kept))).close()
