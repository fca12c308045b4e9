"""Checks whether a model fits into its memories, before any of it is allocated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lfm2kit.backend import Backend, BuildsOperators, MemoryFigures, PinsMemory, Room, Weights
from lfm2kit.building.answers import Answers, exchange_bytes_of, free_bytes_of
from lfm2kit.building.byte_counts import size
from lfm2kit.building.placement import Placed
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.memory import HOST, Bounded, Memory
from lfm2kit.process.machine import tightest_limit


class Shortage(NamedTuple):
    """A memory that is too small, and the bytes that are needed there at the least."""

    memory: str
    what: str  # needs them
    needed: int
    free: int
    rule: str = ""  # why no more is free; in the host's memory else what limits it

    def __str__(self) -> str:
        needed, free, missing = map(size, (self.needed, self.free, self.needed - self.free))
        why = self.rule or (tightest_limit().name if self.memory == HOST.name else "")
        by_whom = f" ({why})" if why else ""
        return (
            f"memory '{self.memory}' is too small: {self.what} needs {needed} there, "
            f"{free} are free{by_whom}, {missing} are missing"
        )


class Needed(NamedTuple):
    """The bytes of one memory, at the least: blocks whose backend gives no figures count as 0."""

    kept: int  # of weights, as long as the model lives
    scratch: int  # by the block of a forward that needs most, while it runs
    exchange: int  # of the exchange with other ranks, which all layers share
    state: int  # as long as the state lives


PINNED = 1 / 2  # of the host's free memory, at most
NO_ROOM = Room(0)
FEWER_SEQUENCES = "try fewer sequences at once, or shorter ones"


class Sizes(NamedTuple):
    """The bytes that blocks need, to be compared with what their memories have."""

    create: Callable[[str], Backend]
    weights: Weights  # of the whole model
    ranks: int = 1  # ranks that share the host's memory
    limit: int | None = None  # bytes that may be taken of each device's memory, if not all

    def kept(self, leaf: Placed) -> int | None:
        """Return the bytes that a block will keep of its weights; None if its backend is silent."""
        asked = self._ask(leaf)
        if not isinstance(asked.backend, MemoryFigures):
            return None
        return asked.kept_bytes(leaf.spec, self.weights.scope(leaf.scope))

    def scratch(self, leaf: Placed, tokens: int) -> int | None:
        """Return the bytes that a call of a block with `tokens` rows will need while it runs."""
        asked = self._ask(leaf)
        if not isinstance(asked.backend, MemoryFigures):
            return None
        return asked.scratch_bytes(leaf.spec, tokens)

    def pinned(self, leaf: Placed) -> int:
        """Return the bytes of the host's memory that a block will pin."""
        asked = self._ask(leaf)
        if not isinstance(asked.backend, PinsMemory):
            return 0
        return asked.pinned_bytes(leaf.spec, self.weights.scope(leaf.scope))

    def state(self, leaf: Placed, room: Room) -> int:
        """Return the bytes that a block's state with this room will take; 0 if it has none."""
        return state_bytes(self.create, leaf, room)

    def unknown(self, leaves: Sequence[Placed]) -> int:
        """Return how many of these blocks have a backend that gives no figures."""
        return sum(not isinstance(self._ask(leaf).backend, MemoryFigures) for leaf in leaves)

    def _ask(self, leaf: Placed) -> Answers:
        return answers_of(self.create, leaf)

    def free(self, placed: Placed) -> dict[str, int]:
        """Return the bytes that may be taken by memory, for memories that know them."""
        free = free_bytes(placed, self.ranks)
        if self.limit is None:
            return free
        devices = {leaf.memory.name for leaf in placed.leaves()} - {HOST.name}
        return free | {name: min(free.get(name, self.limit), self.limit) for name in devices}

    def shortage(self, placed: Placed, tokens: int = 0, room: Room = NO_ROOM) -> Shortage | None:
        """Return the first memory too small for its blocks, a state and `tokens` tokens."""
        pinned = sum(map(self.pinned, placed.leaves()))
        if pinned and (most := int(PINNED * HOST.free_bytes(self.ranks))) < pinned:
            rule = "no more than half of it may be pinned"
            return Shortage(HOST.name, "what is streamed", pinned, most, rule)
        for name, free in self.free(placed).items():
            needed = self.needed(placed, name)
            if name == HOST.name:
                free -= pinned
            if needed.kept > free:
                return Shortage(name, "the model", needed.kept, free)
            needed = self.needed(placed, name, tokens, room)
            if (state := needed.kept + needed.state) > free:
                return Shortage(name, f"the model with a state of {room.pages} pages", state, free)
            if (total := sum(needed)) > free:
                return Shortage(name, f"the model with {tokens} tokens at once", total, free)
        return None

    def needed(self, placed: Placed, memory: str, tokens: int = 0, room: Room = NO_ROOM) -> Needed:
        """Return what the blocks in one memory need together, at the least.

        Blocks run one after the other, so only the largest scratch memory and exchange count.
        """
        here = [one for one in placed.tree() if one.memory.name == memory]
        leaves = [one for one in here if one.backend is not None]
        return Needed(
            kept=sum(self.kept(leaf) or 0 for leaf in leaves),
            scratch=max((self.scratch(leaf, tokens) or 0 for leaf in leaves), default=0),
            exchange=max((exchange_bytes_of(one, tokens) for one in here), default=0),
            state=sum(self.state(leaf, room) for leaf in leaves),
        )


def answers_of(create: Callable[[str], Backend], leaf: Placed) -> Answers:
    """Return what the backend of a leaf answers about it."""
    assert leaf.backend is not None  # a leaf's always is
    return Answers(create(leaf.backend), leaf.backend, leaf.name or "the model")


def state_bytes(create: Callable[[str], Backend], leaf: Placed, room: Room) -> int:
    """Return the bytes that a block's state with this room will take; 0 if it has none.

    Raise `Lfm2kitError` if its backend lacks `state_bytes`.
    """
    if not leaf.spec.has_state:
        return 0
    asked = answers_of(create, leaf)
    if not isinstance(asked.backend, BuildsOperators):
        raise Lfm2kitError(
            f"{leaf.name}: backend '{leaf.backend}' builds {type(leaf.spec).__name__} blocks, "
            "but has no method state_bytes(spec, room), which says what their states take"
        )
    return asked.state_bytes(leaf.spec, room)


def memories(placed: Placed) -> dict[str, Memory]:
    """Return the memories in which a model's blocks, or their exchange, take any bytes."""
    return {one.memory.name: one.memory for one in placed.tree()}


def free_bytes(placed: Placed, ranks: int = 1) -> dict[str, int]:
    """Return the free bytes by memory, for memories that know them."""
    return {
        name: HOST.free_bytes(ranks) if name == HOST.name else free_bytes_of(memory)
        for name, memory in memories(placed).items()
        if isinstance(memory, Bounded)
    }


def check_state(create: Callable[[str], Backend], placed: Placed, ranks: int, room: Room) -> None:
    """Raise `Lfm2kitError` if a memory has too little left for a state of a built model."""
    for name, free in free_bytes(placed, ranks).items():
        leaves = [leaf for leaf in placed.leaves() if leaf.memory.name == name]
        needed = sum(state_bytes(create, leaf, room) for leaf in leaves)
        if needed > free:
            short = Shortage(name, f"a state of {room.pages} pages", needed, free)
            raise Lfm2kitError(f"{short}; {FEWER_SEQUENCES}")


def check_room(what_takes: str, nbytes: int, *advice: str | Option) -> None:
    """Raise `Lfm2kitError` if the host has less than `nbytes` bytes of memory left."""
    if nbytes > (free := HOST.free_bytes()):
        raise Lfm2kitError(
            f"{what_takes} {size(nbytes)} of memory, {size(free)} are free "
            f"({tightest_limit().name}); ",
            *advice,
        )
