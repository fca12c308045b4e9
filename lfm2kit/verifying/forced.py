"""Forwards in which every block gets the arguments that its twin had, so no error is handed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit.backend import Begins, Block, Pending
from lfm2kit.batch import Batch
from lfm2kit.building.results import Checked, Ending
from lfm2kit.memory import HOST, Memory
from lfm2kit.model import LFM2
from lfm2kit.state import Room
from lfm2kit.testing.compare import each
from lfm2kit.verifying.differences import Difference, farthest
from lfm2kit.verifying.twins import whole
from lfm2kit.verifying.twins_of_model import Twins

CALLS = FORWARD, PROMPT, STEP = "forward", "prompt", "step"


class Call(NamedTuple):
    """A forward to compare: of whole sequences, or one that goes on from a state."""

    name: str
    batch: Batch
    state: Sequence[Any] | None
    room: Room


def calls(model: LFM2, ids: npt.NDArray[np.int32], *, has_state: bool = True) -> list[Call]:
    """Return a forward of samples [n, seq_len], and the same as a prompt and a step after it.

    Samples of one token, and models without a state, have the forward alone.
    """
    n, seq_len = ids.shape
    room = Room.of_sequences(n, seq_len)
    whole_samples = Call(FORWARD, Batch.of_sequences(list(ids)), None, room)
    if seq_len < 2 or not has_state:
        return [whole_samples]
    pages = np.arange(room.pages, dtype=np.int32).reshape(n, -1)
    prompt = Batch.of_sequences(list(ids[:, :-1]), pages=pages)
    step = Batch.of_sequences(list(ids[:, -1:]), starts=[seq_len - 1] * n, pages=pages)
    layers = model.new_state(room).layers
    return [whole_samples, Call(PROMPT, prompt, layers, room), Call(STEP, step, layers, room)]


def run_through(
    model: LFM2,
    blocks: Sequence[Checked],
    around: Callable[[Checked, Block], Block],
    call: Call,
) -> Any:
    """Return the logits of a forward, on the host, whose blocks are called through `around`."""
    with ExitStack() as stack, np.errstate(all="ignore"):
        for block in blocks:
            stack.enter_context(block.called_through(around))
        stack.enter_context(model.overlap.put_off())
        stack.enter_context(model.running(call.batch.tokens))
        return model.home.to_host(model.forward(call.batch.on(model.home), call.state))


class First(NamedTuple):
    """The call of the first block that differs, and its arguments on the host."""

    checked: Checked
    call: Call
    inputs: Sequence[Any]


class Forced:
    """What forwards have shown in which every block was compared with its twin.

    Blocks that have none are called as they are; `alone` says why, by their names.
    """

    def __init__(self, model: LFM2, blocks: Sequence[Checked], twins: Twins) -> None:
        self.differences: list[Difference] = []  # of all calls of all blocks, in order
        self.first: First | None = None
        self.wanted: dict[tuple[str, str], Any] = {}  # the last rows, by call and block
        whys = {block: twins.why_none(block.placed) for block in blocks}
        self.alone = {block.placed.name: why for block, why in whys.items() if why is not None}
        self.compared = [block for block, why in whys.items() if why is None]
        self._model, self._twins = model, twins

    def run(self, call: Call) -> Any:
        """Do a forward, and return its logits, which are those of the twins."""
        return run_through(self._model, self.compared, partial(_Beside, self, call), call)

    def compare(self, call: Call, checked: Checked, inputs: Sequence[Any], result: Any) -> Any:
        """Note how far a block's result is from its twin's, and return the twin's."""
        placed = checked.placed
        answer = self._twins.answer(placed, inputs, call.room)
        difference = Difference(
            placed.name,
            whole(placed.spec).kind,
            placed.backend or "",
            call.name,
            allowed=answer.allowed,
            **farthest(result, answer.result, answer.allowed, answer.is_clear),
        )
        self.differences.append(difference)
        if self.first is None and not difference.is_within:
            self.first = First(checked, call, inputs)
        self.wanted[call.name, placed.name] = last_rows(answer.result, call.batch)
        return answer.result


class _Beside:
    """A block that is called as it is, but returns what its twin does."""

    def __init__(self, forced: Forced, call: Call, checked: Checked, block: Block) -> None:
        self._forced, self._call = forced, call
        self._checked, self._block = checked, block
        self._memory: Memory = checked.placed.memory
        if isinstance(block, Begins):
            self.begin = self._begin

    def __call__(self, *inputs: Any) -> Any:
        host = self._on_host(inputs)  # before the call: a norm adds in place
        return self._replaced(self._block(*inputs), host)

    def _begin(self, *inputs: Any) -> Pending:
        host = self._on_host(inputs)
        pending = self._block.begin(*inputs)  # type: ignore[attr-defined]
        return Ending(pending, partial(self._replaced, host=host))

    def _replaced(self, result: Any, host: Sequence[Any]) -> Any:
        got = tuple(np.array(self._memory.to_host(array)) for array in each(result))
        want = self._forced.compare(self._call, self._checked, host, got)
        moved = tuple(self._memory.from_host(np.array(array, order="C")) for array in each(want))
        return moved if isinstance(want, tuple) else moved[0]

    def _on_host(self, inputs: Sequence[Any]) -> list[Any]:
        count = len(inputs) - self._checked.placed.spec.has_state
        return [*map(self._moved, inputs[:count]), *inputs[count:]]

    def _moved(self, value: Any) -> Any:
        if value is None:
            return None
        return value.on(HOST) if isinstance(value, Batch) else np.array(self._memory.to_host(value))


def last_rows(result: Any, batch: Batch) -> tuple[npt.NDArray[Any], ...]:
    """Return copies of the rows of a block's result whose logits are wanted."""
    return tuple(
        np.array(array[batch.logits_rows] if len(array) == batch.tokens else array)
        for array in each(result)
    )


def drift(
    model: LFM2, blocks: Sequence[Checked], call: Call, wanted: Mapping[tuple[str, str], Any]
) -> dict[str, float]:
    """Return how far each block's last rows are from `wanted` in a forward that runs by itself.

    The distance is relative to the largest value of a result, and infinite for other ids.
    """
    found: dict[str, float] = {}

    def around(checked: Checked, block: Block) -> Block:
        return _Seen(checked.placed.memory, block, partial(note, checked.placed.name))

    def note(name: str, arrays: Sequence[npt.NDArray[Any]]) -> None:
        got, want = last_rows(tuple(arrays), call.batch), wanted[call.name, name]
        found[name] = farthest(got, want)["error"]

    run_through(model, blocks, around, call)
    return found


class _Seen:
    """A block whose results are seen."""

    def __init__(self, memory: Memory, block: Block, note: Callable[[Any], None]) -> None:
        self._memory, self._block, self._note = memory, block, note
        if isinstance(block, Begins):
            self.begin = self._begin

    def __call__(self, *inputs: Any) -> Any:
        return self._seen(self._block(*inputs))

    def _begin(self, *inputs: Any) -> Pending:
        return Ending(self._block.begin(*inputs), self._seen)  # type: ignore[attr-defined]

    def _seen(self, result: Any) -> Any:
        self._note([np.array(self._memory.to_host(array)) for array in each(result)])
        return result
