"""The one place where arrays move between memories: around a block that lives in another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy.typing as npt

from lfm2kit.backend import (
    Block,
    Crossing,
    Operator,
    Over,
    Pending,
    Room,
    State,
    TellsWaits,
)
from lfm2kit.batch import Batch
from lfm2kit.memory import Memory, is_ordered


class Seam:
    """A block that works in `memory`, callable with arrays of the memory `outer`.

    Also carries the state methods of `state_of`, the block itself, past a plugin's wrapper.  With a
    `crossing`, that is called instead: only its first call with new shapes may wait.
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
        self._told: Callable[[bool], None] | None = None  # of waits

    def tell_waits(self, told: Callable[[bool], None] | None) -> None:
        """Tell as the crossing does; without one, all that `end` does is a wait for copies."""
        if self.crossing is None:
            self._told = told
        elif isinstance(self.crossing, TellsWaits):
            self.crossing.tell_waits(told)

    def __call__(self, *inputs: Any) -> Any:
        return self.begin(*inputs).end()

    def begin(self, *inputs: Any) -> Pending:
        """Begin to copy the inputs: what `outer` has to do before `end` runs beside the block."""
        if self.crossing is not None:
            return begun(self.crossing, *inputs)
        if self.memory.name == self.outer.name:
            return begun(self.block, *inputs)
        # An operator's last argument is its own state: never moved.
        count = len(inputs) - (self.operator is not None)
        started = [_started(value, self.outer) for value in inputs[:count]]
        return _Begun(self, started, inputs[count:])

    def finish(self, started: Sequence[Any], state: Sequence[State]) -> Any:
        """Call the block once its inputs have arrived; return its results in `outer`."""
        if self._told is not None:
            self._told(False)
        result = self.block(*(_arrived(value, self.memory) for value in started), *state)
        moved = self._moved_out(result if isinstance(result, tuple) else [result])
        if self._told is not None:
            self._told(True)
        return tuple(moved) if isinstance(result, tuple) else moved[0]

    def new_state(self, room: Room) -> State:
        assert self.operator is not None, "only operators have a state"
        return self.operator.new_state(room)

    def _moved_out(self, values: Sequence[Any]) -> list[Any]:
        """Return results in `outer`; all copies are begun before one is awaited."""
        started = [_started(value, self.memory) for value in values]
        return [_arrived(value, self.outer) for value in started]


@dataclass(frozen=True, slots=True)
class _Begun:
    """A call whose inputs are on their way to the block."""

    seam: Seam
    started: Sequence[Any]
    state: Sequence[State]

    def end(self) -> Any:
        return self.seam.finish(self.started, self.state)


def begun(block: Block, *inputs: Any) -> Pending:
    """Return a block's call with `inputs`, begun if the block can, or else made and over."""
    begin = getattr(block, "begin", None)  # isinstance would take 15 us for a protocol
    return Over(block(*inputs)) if begin is None else begin(*inputs)


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
