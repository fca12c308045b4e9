"""The one place where arrays move between memories: around a block that lives in another one."""

from __future__ import annotations

from typing import Any

from lfm2kit.backend import Array, Block, Operator, Room, State
from lfm2kit.batch import Batch
from lfm2kit.memory import Memory


class Seam:
    """`block`, which works in `memory`, callable with arrays of the memory `outer`.

    Also carries the state methods of `state_of`, the block itself, past a plugin's wrapper.
    """

    def __init__(self, block: Block, memory: Memory, outer: Memory, state_of: Block) -> None:
        self.block = block
        self.memory = memory
        self.outer = outer
        self.operator = state_of if isinstance(state_of, Operator) else None

    def __call__(self, *inputs: Any) -> Any:
        if self.memory.name == self.outer.name:
            return self.block(*inputs)
        if self.operator is not None:  # its last argument is its own state: never moved
            *inputs_before, state = inputs
            return self._back(self.block(*map(self._there, inputs_before), state))
        return self._back(self.block(*map(self._there, inputs)))

    def new_state(self, room: Room) -> State:
        assert self.operator is not None, "only operators have a state"
        return self.operator.new_state(room)

    def _there(self, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, Batch):
            return value.on(self.memory)
        return self.memory.from_host(self.outer.to_host(value))

    def _back(self, result: Any) -> Any:
        if isinstance(result, tuple):
            return tuple(self._back(array) for array in result)
        return self._array_back(result)

    def _array_back(self, array: Array) -> Array:
        return self.outer.from_host(self.memory.to_host(array))
