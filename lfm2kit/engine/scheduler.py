"""Decides which tokens of which sequences are computed in a step.

Sequences that wait for one token alone come first, then chunks of prompts, the oldest first, then
sequences that have not begun.  A sequence that begins gets the pages for all tokens that it has.
Where no page is left for a sequence to go on, the youngest one that runs is put back: its pages are
free again, and it waits.  The oldest one can thus always go on.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterable, Iterator
from collections.abc import Sequence as List
from operator import attrgetter
from typing import NamedTuple

from lfm2kit.engine.pages import Pages
from lfm2kit.engine.sequence import Sequence
from lfm2kit.state import Room

_AGE = attrgetter("age")


class Chunk(NamedTuple):
    """The next tokens of a sequence that a step computes, and guesses of those after them."""

    sequence: Sequence
    tokens: int
    guesses: tuple[int, ...] = ()

    @property
    def is_last(self) -> bool:
        """Return whether a token can be drawn after it."""
        return self.tokens == self.sequence.left

    @property
    def to_score(self) -> range:
        """Return the positions whose logits score tokens of the prompt."""
        return self.sequence.to_score(self.tokens)

    def without_last(self) -> Chunk:
        """Return the same tokens but for the last one, which will be computed again."""
        return self._replace(tokens=self.tokens - 1)

    def with_guessed(self, tokens: int) -> Chunk:
        """Return the tokens that are computed for good, if the sequence got this many new ones.

        The row of the newest one is still to be computed; guesses before it were right.
        """
        return self._replace(tokens=self.tokens + max(0, tokens - 1), guesses=())


class Scheduler:
    """The sequences that wait, those that run, and the pages of the latter."""

    def __init__(self, room: Room, budget: int) -> None:
        self.pages = Pages(room)
        self._room = room
        self._budget = budget  # tokens of a step
        self._waiting: list[Sequence] = []  # the oldest first, as those that run
        self._running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait, behind those that are older."""
        insort(self._waiting, sequence, key=_AGE)

    def drop(self, sequence: Sequence) -> None:
        """End a sequence, and free its pages."""
        if sequence in self._running:
            self._stop(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Let a sequence that runs wait again; it will go on with the same tokens."""
        self._stop(sequence)
        self.add(sequence)

    def plan(self, held: Collection[Sequence] = ()) -> list[Chunk]:
        """Return the chunks of the next step, whose sequences have the pages for them.

        Those that are held get no rows from which a token would be drawn.
        """
        chunks, left = [], self._budget
        for sequence in self._in_order(held):
            chunks.append(Chunk(sequence, min(sequence.left, left)))
            left -= chunks[-1].tokens
            if not left:
                return chunks
        return list(self._with_guesses(chunks, left))

    def plan_after(self, chunks: List[Chunk]) -> list[Chunk]:
        """Return the chunks of the step after one whose tokens nobody has read yet.

        There are none unless that step's sequences are all that can go on, and none of them is
        known to end: then the next one's plan needs the tokens.
        """
        sequences = [chunk.sequence for chunk in chunks]
        if len(sequences) < len(self._running) or any(
            one.ends_next or not one.pages for one in sequences
        ):
            return []
        full = [one for one in sequences if len(one.pages) * self._room.page_tokens <= len(one.ids)]
        if len(full) > self.pages.free:
            return []
        for one in full:
            one.pages.append(self.pages.take())
        return [] if self._can_begin() else [Chunk(one, 1) for one in sequences]

    def _can_begin(self) -> bool:
        """Return whether the oldest sequence that waits finds the pages that it needs."""
        if not self._waiting:
            return False
        return self.pages.has_room(self._waiting[0].ids, self._waiting[0].shareable)

    def advance(self, chunks: Iterable[Chunk]) -> None:
        """Note that the chunks of a step are computed."""
        for sequence, tokens, _ in chunks:
            before = sequence.computed
            sequence.computed += tokens
            self.pages.know(sequence.pages, sequence.ids[: sequence.computed], before)

    def _with_guesses(self, chunks: Iterable[Chunk], left: int) -> Iterator[Chunk]:
        """Add guesses where the budget and the pages of a sequence leave room for them."""
        for chunk in chunks:
            sequence = chunk.sequence
            if chunk.tokens == sequence.left == 1 and not chunk.to_score:
                room = len(sequence.pages) * self._room.page_tokens - sequence.computed - 1
                chunk = chunk._replace(guesses=sequence.guess(min(room, left)))
                left -= len(chunk.guesses)
            yield chunk

    def _in_order(self, held: Collection[Sequence]) -> Iterator[Sequence]:
        """Yield the sequences that can go on, each with the pages for what it has left."""
        for sequence in [one for one in self._running if one.left == 1 and one not in held]:
            if self._has_pages(sequence):
                yield sequence
        yield from [one for one in self._running if one.left > 1]
        while (begun := self._begin()) is not None:
            yield begun

    def _has_pages(self, sequence: Sequence) -> bool:
        """Return whether a sequence runs and has the pages for its next token.

        If none is free, the youngest one is put back, perhaps itself.  The step has only older ones
        so far.
        """
        while 0 < len(sequence.pages) * self._room.page_tokens <= sequence.computed:
            if self.pages.free:
                sequence.pages.append(self.pages.take())
            else:
                self.put_back(self._running[-1])
        return bool(sequence.pages)

    def _begin(self) -> Sequence | None:
        """Return the oldest sequence that waits, with its pages; None if too few are free."""
        if not self._waiting:
            return None
        sequence = self._waiting[0]
        beginning = self.pages.begin(sequence.ids, sequence.shareable)
        if beginning is None:
            return None
        del self._waiting[0]
        sequence.pages, sequence.computed = beginning
        insort(self._running, sequence, key=_AGE)
        return sequence

    def _stop(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self.pages.give_back(sequence.pages)
        sequence.pages, sequence.computed = [], 0
