"""Notes when each block of a forward begins and ends, by the clock of its memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from lfm2kit.backend import Begins, Block, Pending, TellsParts
from lfm2kit.building.results import Checked, Ending
from lfm2kit.memory import Mark, Memory, Timed, is_ordered


class HostMark(NamedTuple):
    """A moment on the host's monotonic clock."""

    seconds: float

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, HostMark)
        return self.seconds - earlier.seconds


class Noted(NamedTuple):
    """A moment in a forward: a block, or a part of it, begins or has ended."""

    block: str
    part: str  # "" for the block itself
    is_end: bool
    mark: Mark


class Span(NamedTuple):
    """A block, or a part of one, in one forward."""

    block: str
    part: str
    memory: str
    begin: float  # seconds since the first mark of its memory
    seconds: float

    @property
    def name(self) -> str:
        """Return the block's name in the model, or the part's."""
        return f"{self.block}.{self.part}" if self.part else self.block


def finest(spans: Iterable[Span]) -> list[Span]:
    """Return the parts of blocks that tell them, and the other blocks."""
    spans = list(spans)
    told = {span.block for span in spans if span.part}
    return [span for span in spans if bool(span.part) == (span.block in told)]


class Marks:
    """The moments of a forward, in each memory in their order.

    A replay calls no blocks, and reaches the marks that were noted when it was captured.
    """

    def __init__(self) -> None:
        self._noted: dict[str, list[Noted]] = {}
        self._coming: dict[str, list[Noted]] = {}

    @contextmanager
    def of_a_forward(self) -> Iterator[None]:
        """Take what is noted until the context is left in place of what was noted before."""
        self._coming = {}
        yield
        self._noted |= self._coming

    def note(self, memory: Memory, block: str, part: str, *, is_end: bool) -> None:
        mark = _mark_of(memory)
        self._coming.setdefault(memory.name, []).append(Noted(block, part, is_end, mark))

    def spans(self) -> Iterator[Span]:
        """Yield the spans of the newest forward, which has ended.

        A part lasts from the mark before it, of its block or of the part before, to its own.
        """
        for memory, noted in self._noted.items():
            first = noted[0].mark
            begun: dict[str, Mark] = {}
            last = first
            for block, part, is_end, mark in noted:
                if not is_end:
                    begun[block] = mark
                else:
                    begin = last if part else begun.pop(block)
                    yield Span(
                        block, part, memory, begin.seconds_since(first), mark.seconds_since(begin)
                    )
                last = mark


def _mark_of(memory: Memory) -> Mark:
    if not is_ordered(memory):
        return HostMark(time.perf_counter())
    return memory.timed_mark() if isinstance(memory, Timed) else memory.mark()


@contextmanager
def marked(blocks: Sequence[Checked], marks: Marks) -> Iterator[None]:
    """Note the calls of these blocks, and of their parts that they tell, in `marks`."""
    with ExitStack() as stack:
        for block in blocks:
            placed = block.placed
            stack.enter_context(block.called_through(partial(_Marked, marks)))
            if isinstance(block, TellsParts):
                block.tell_parts(partial(_part_passed, marks, placed.memory, placed.name))
                stack.callback(block.tell_parts, None)
        yield


def _part_passed(marks: Marks, memory: Memory, block: str, part: str) -> None:
    marks.note(memory, block, part, is_end=True)


class _Marked:
    """A block whose calls are noted."""

    def __init__(self, marks: Marks, checked: Checked, block: Block) -> None:
        placed = checked.placed
        self._block = block
        self._note: Callable[..., None] = partial(marks.note, placed.memory, placed.name, "")
        if isinstance(block, Begins):
            self.begin = self._begin

    def __call__(self, *inputs: Any) -> Any:
        self._note(is_end=False)
        result = self._block(*inputs)
        self._note(is_end=True)
        return result

    def _begin(self, *inputs: Any) -> Pending:
        self._note(is_end=False)
        return Ending(self._block.begin(*inputs), self._ended)  # type: ignore[attr-defined]

    def _ended(self, result: Any) -> Any:
        self._note(is_end=True)
        return result
