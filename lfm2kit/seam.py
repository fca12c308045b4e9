"""The one place where arrays move between memories: around a block that lives in another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy.typing as npt

from lfm2kit.backend import Block, Crossing, Operator, Room, State
from lfm2kit.batch import Batch
from lfm2kit.memory import Memory, is_ordered


class Seam:
    """A block that works in `memory`, callable with arrays of the memory `outer`.

    Also carries the state methods of `state_of`, the block itself, past a plugin's wrapper.  With a
    `crossing`, that is called, and nothing waits here.
    """

    def __init__(
        self,
        block: Block,
        memory: Memory,
        outer: Memory,
        state_of: Block,
        crossing: Crossing | None = None,
    ) -> None:
        self.block = block
        self.memory = memory
        self.outer = outer
        self.crossing = crossing
        self.operator = state_of if isinstance(state_of, Operator) else None

    def __call__(self, *inputs: Any) -> Any:
        if self.crossing is not None:
            return self.crossing(*inputs)
        if self.memory.name == self.outer.name:
            return self.block(*inputs)
        if self.operator is not None:  # its last argument is its own state: never moved
            moved = self._moved(inputs[:-1], self.outer, self.memory)
            result = self.block(*moved, inputs[-1])
        else:
            result = self.block(*self._moved(inputs, self.outer, self.memory))
        if isinstance(result, tuple):
            return tuple(self._moved(result, self.memory, self.outer))
        return self._moved([result], self.memory, self.outer)[0]

    def new_state(self, room: Room) -> State:
        assert self.operator is not None, "only operators have a state"
        return self.operator.new_state(room)

    def _moved(self, values: Sequence[Any], source: Memory, target: Memory) -> list[Any]:
        """Return arrays and batches in `target`; all copies are begun before one is awaited."""
        started = [_started(value, source) for value in values]
        return [_arrived(value, target) for value in started]


def _started(value: Any, source: Memory) -> Any:
    """Begin to copy an array to the host, if its memory goes on meanwhile."""
    if value is None or isinstance(value, Batch):
        return value
    return source.start_to_host(value) if is_ordered(source) else _Here(source.to_host(value))


def _arrived(value: Any, target: Memory) -> Any:
    if value is None:
        return None
    if isinstance(value, Batch):
        return value.on(target)
    return target.from_host(value.wait())


class _Here(NamedTuple):
    """An array that has arrived."""

    array: npt.NDArray[Any]

    def wait(self) -> npt.NDArray[Any]:
        return self.array
