"""Moments of a forward, each by the clock of its memory, and the spans between them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from lfm2kit.memory import Mark, Memory, Timed, is_ordered

WAIT = "wait for "  # how the kinds of waits begin


class HostMark(NamedTuple):
    """A moment on the host's monotonic clock."""

    seconds: float

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, HostMark)
        return self.seconds - earlier.seconds


class What(NamedTuple):
    """What a span is of."""

    block: str  # its name in the model
    part: str = ""  # that the block tells: "router"
    kind: str = ""  # of what the core does around blocks: "exchange", "wait for host"

    @property
    def name(self) -> str:
        """Return a name in the model; waits at one place for different things have the same."""
        last = "wait" if self.kind.startswith(WAIT) else self.kind
        return ".".join(filter(None, (self.block, self.part, last)))


class Noted(NamedTuple):
    """A moment in a forward: something begins or has ended."""

    what: What
    is_end: bool
    mark: Mark


class Span(NamedTuple):
    """A block, a part of one, or what the core does around it, in one forward."""

    what: What
    memory: str
    begin: float  # seconds since the forward began
    seconds: float
    own: float  # seconds without the spans that lie within

    @property
    def name(self) -> str:
        return self.what.name


def finest(spans: Iterable[Span]) -> list[Span]:
    """Return the parts of blocks that tell them, and all spans of others."""
    spans = list(spans)
    told = {span.what.block for span in spans if span.what.part}
    return [s for s in spans if s.what.kind or bool(s.what.part) == (s.what.block in told)]


class Marks:
    """The moments of a forward, in each memory in their order.

    A replay calls no blocks, and reaches the marks that were noted when it was captured.
    """

    def __init__(self, memories: Iterable[Memory]) -> None:
        self._memories = list({memory.name: memory for memory in memories}.values())
        self._noted: dict[str, list[Noted]] = {}
        self._coming: dict[str, list[Noted]] = {}
        self._begins: dict[str, Mark] = {}
        self.begin = 0.0  # of the newest forward, on the host's clock

    @contextmanager
    def of_a_forward(self) -> Iterator[None]:
        """Take what is noted until the context is left in place of what was noted before."""
        self._coming = {}
        self._begins = {memory.name: _mark_of(memory) for memory in self._memories}
        self.begin = time.perf_counter()
        yield
        replayed = {m.name: self._noted.get(m.name, []) for m in self._memories if is_ordered(m)}
        self._noted = replayed | self._coming

    def note(self, memory: Memory, what: What, *, is_end: bool) -> None:
        self._coming.setdefault(memory.name, []).append(Noted(what, is_end, _mark_of(memory)))

    def spans(self) -> Iterator[Span]:
        """Yield the spans of the newest forward, which has ended, in the order of their ends."""
        for memory, noted in self._noted.items():
            yield from _spans(memory, self._begins[memory], noted)


def _mark_of(memory: Memory) -> Mark:
    if not is_ordered(memory):
        return HostMark(time.perf_counter())
    return memory.timed_mark() if isinstance(memory, Timed) else memory.mark()


@dataclass(slots=True)
class _Open:
    """A span that has begun."""

    what: What
    begin: Mark
    inside: float = 0.0  # seconds of the spans within
    told: float = 0.0  # of `inside`, those within parts that were told
    last: Mark | None = None  # the end of the part before

    def ended(self, what: What, memory: str, forward: Mark, end: Mark) -> Span:
        """Return the span of the whole, or of the part that is told now."""
        begin = (self.last or self.begin) if what.part else self.begin
        inside = self.inside - self.told if what.part else self.inside
        if what.part:
            self.last, self.told = end, self.inside
        seconds = end.seconds_since(begin)
        return Span(what, memory, begin.seconds_since(forward), seconds, max(seconds - inside, 0.0))


def _spans(memory: str, forward: Mark, noted: Sequence[Noted]) -> Iterator[Span]:
    """Yield the spans of one memory.

    A part lasts from its block's begin, or from the end of the part before, to its own end.
    """
    begun: list[_Open] = []
    for what, is_end, mark in noted:
        if not is_end:
            begun.append(_Open(what, mark))
            continue
        whole = what._replace(part="")
        place = max(i for i, one in enumerate(begun) if one.what == whole)
        span = begun[place].ended(what, memory, forward, mark)
        if not what.part:
            del begun[place]
            if place:
                begun[place - 1].inside += span.seconds
        yield span
