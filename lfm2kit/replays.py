"""Keeps captured forwards by the form of their batches, within bounds, for all models."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple
from weakref import WeakValueDictionary

from lfm2kit.backend import Replay
from lfm2kit.memory import Bounded, Memory

MOST = 64  # a graph of a thousand kernels takes some ten megabytes of the driver's memory
SHARE = 0.5  # of the memory that would be free without them
FREE_IF_UNKNOWN = 4 << 30  # bytes, if the memory does not know what is free
MOST_NOTED = 4096


class Key(NamedTuple):
    """The key of a replay: a model without a state, or one of its states; and forms of batches."""

    owner: Hashable
    forms: Hashable


@dataclass(slots=True)
class _Kept:
    replay: Replay
    users: int = 0  # threads that call it: it is not closed meanwhile


class Replays:
    """The replays used last: at most `most`, and at most their share of the memory.

    A forward is captured when its form comes for the second time, because capturing takes longer
    than one forward.  The newest replay is always kept.  A replay that is dropped is closed.

    The garbage collector calls `drop` at any moment, also in the middle of the other methods: what
    it drops is then closed when they have ended.
    """

    def __init__(self, memory: Memory, most: int = MOST) -> None:
        self._memory = memory
        self._most = most
        self._kept: dict[Key, _Kept] = {}  # the least recently used first
        self._noted: dict[Key, None] = {}  # forms that have come, the oldest first
        self._gone: deque[Hashable] = deque()  # owners whose replays are to be closed
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return sum(kept.replay.nbytes for kept in list(self._kept.values()))

    def note(self, key: Key) -> None:
        """Remember that a forward of this key has run, without a replay."""
        with self._locked():
            self._noted[key] = None
            if len(self._noted) > MOST_NOTED:
                del self._noted[next(iter(self._noted))]

    def is_due(self, key: Key) -> bool:
        """Return whether a forward of this key is worth a replay: another one has run."""
        return key in self._kept or key in self._noted

    def get(self, key: Key) -> Replay | None:
        """Return the replay of this key, if it is kept."""
        kept = self._kept.get(key)
        return None if kept is None else kept.replay

    @contextmanager
    def using(self, key: Key, capture: Callable[[], Replay]) -> Iterator[Replay]:
        """Give the replay of this key, captured if there is none; it is not closed meanwhile."""
        with self._locked():
            kept = self._kept.pop(key, None) or _Kept(self._captured(capture))
            self._kept[key] = kept
            kept.users += 1
        try:
            yield kept.replay
        finally:
            with self._locked():
                kept.users -= 1
                if self._kept.get(key) is not kept and not kept.users:
                    kept.replay.close()  # dropped meanwhile

    def drop(self, owner: Hashable) -> None:
        """Drop all replays of a model or state that is gone."""
        self._gone.append(owner)
        self._drop_gone()

    def close(self) -> None:
        """Drop all of them."""
        with self._locked():
            self._drop_all()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            yield
        self._drop_gone()

    def _drop_gone(self) -> None:
        """Drop what owners have left, unless somebody is at work here, who will do it then."""
        while self._gone and self._lock.acquire(blocking=False):
            try:
                owner = self._gone.popleft()
                for key in [key for key in list(self._kept) if key.owner == owner]:
                    self._drop(key)
                for key in [key for key in list(self._noted) if key.owner == owner]:
                    del self._noted[key]
            finally:
                self._lock.release()

    def _captured(self, capture: Callable[[], Replay]) -> Replay:
        while len(self._kept) >= self._most:
            self._drop(next(iter(self._kept)))
        replay = self._captured_once_there_is_room(capture)
        most_bytes = self._most_bytes(replay)
        while self._kept and self.nbytes + replay.nbytes > most_bytes:
            self._drop(next(iter(self._kept)))
        return replay

    def _captured_once_there_is_room(self, capture: Callable[[], Replay]) -> Replay:
        try:
            return capture()
        except MemoryError:
            if not self._kept:
                raise
        self._drop_all()  # outside the handler: the error's frames hold arrays
        return capture()

    def _most_bytes(self, newest: Replay) -> float:
        memory = self._memory
        free = memory.free_bytes() if isinstance(memory, Bounded) else FREE_IF_UNKNOWN
        return SHARE * (free + self.nbytes + newest.nbytes)

    def _drop_all(self) -> None:
        for key in list(self._kept):
            self._drop(key)

    def _drop(self, key: Key) -> None:
        kept = self._kept.pop(key)
        if not kept.users:  # else the last of them closes it
            kept.replay.close()


# Weak: models and states keep them, and a memory goes with the last of these.
_of_memories: WeakValueDictionary[str, Replays] = WeakValueDictionary()
_lock = Lock()


def replays_in(memory: Memory) -> Replays:
    """Return the replays of all models whose logits lie in `memory`: they share its bounds."""
    with _lock:
        return _of_memories.setdefault(memory.name, Replays(memory))
