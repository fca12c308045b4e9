"""Puts marks around the blocks of a model, around exchanges between ranks, and around waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from lfm2kit.backend import Begins, Block, Fills, Pending, TellsParts, TellsWaits
from lfm2kit.building.results import Checked, Ending
from lfm2kit.building.waits import Waits
from lfm2kit.memory import Array, Memory
from lfm2kit.profiling.marks import WAIT, Marks, What
from lfm2kit.transport import Exchange, Exchanging, Rows

EXCHANGE = "exchange"
Watched = Checked | Waits


def name_of(one: Watched) -> str:
    return one.placed.name if isinstance(one, Checked) else one.name


def memory_of(one: Watched) -> Memory:
    return one.placed.memory if isinstance(one, Checked) else one.memory


@contextmanager
def marked(watched: Sequence[Watched], marks: Marks) -> Iterator[None]:
    """Note the calls of these blocks, of parts that they tell, and these waits, in `marks`."""
    with ExitStack() as stack:
        for one in watched:
            if isinstance(one, Checked):
                _mark_block(stack, one, marks)
            else:
                _mark_waits(stack, one, marks)
        yield


def _mark_block(stack: ExitStack, block: Checked, marks: Marks) -> None:
    placed = block.placed
    note = partial(marks.note, placed.memory, What(placed.name))
    stack.enter_context(block.called_through(lambda checked, called: _Marked(note, called)))
    if isinstance(block, TellsParts):
        block.tell_parts(partial(_part_passed, marks, placed.memory, placed.name))
        stack.callback(block.tell_parts, None)


def _part_passed(marks: Marks, memory: Memory, block: str, part: str) -> None:
    marks.note(memory, What(block, part), is_end=True)


def _mark_waits(stack: ExitStack, waits: Waits, marks: Marks) -> None:
    source: object = waits.at
    if isinstance(waits.at, Exchanging):
        source = waits.at.exchange
        note = partial(marks.note, waits.memory, What(waits.name, kind=EXCHANGE))
        stack.callback(setattr, waits.at, "exchange", waits.at.exchange)
        waits.at.exchange = _MarkedExchange(note, waits.at.exchange)
    if isinstance(source, TellsWaits):
        what = What(waits.name, kind=f"{WAIT}{waits.awaited}")
        note = partial(marks.note, waits.memory, what)
        source.tell_waits(lambda is_over: note(is_end=is_over))
        stack.callback(source.tell_waits, None)


class _Marked:
    """A block whose calls are noted."""

    def __init__(self, note: Callable[..., None], block: Block) -> None:
        self._note = note
        self._block = block
        if isinstance(block, Begins):
            self.begin = self._begin
        if isinstance(block, Fills):
            self.fill = self._filled

    def __call__(self, *inputs: Any) -> Any:
        self._note(is_end=False)
        result = self._block(*inputs)
        self._note(is_end=True)
        return result

    def _filled(self, results: Sequence[Any], *inputs: Any) -> None:
        self._note(is_end=False)
        self._block.fill(results, *inputs)  # type: ignore[attr-defined]
        self._note(is_end=True)

    def _begin(self, *inputs: Any) -> Pending:
        self._note(is_end=False)
        return Ending(self._block.begin(*inputs), self._ended)  # type: ignore[attr-defined]

    def _ended(self, result: Any) -> Any:
        self._note(is_end=True)
        return result


class _MarkedExchange:
    """An exchange whose calls are noted; the experts in between are blocks of their own."""

    def __init__(self, note: Callable[..., None], exchange: Exchange) -> None:
        self._note = note
        self._exchange = exchange

    def dispatch(self, *tokens: Array) -> Rows:
        self._note(is_end=False)
        rows = self._exchange.dispatch(*tokens)
        self._note(is_end=True)
        return rows

    def combine(self, products: Array) -> Array:
        self._note(is_end=False)
        delta = self._exchange.combine(products)
        self._note(is_end=True)
        return delta

    def in_pieces(self, experts: Block, *tokens: Array) -> Array:
        self._note(is_end=False)
        delta = self._exchange.in_pieces(experts, *tokens)  # type: ignore[attr-defined]
        self._note(is_end=True)
        return delta
