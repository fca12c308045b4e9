"""What a model remembers of sequences, in pages, and which batches may continue them.

A sequence's tokens lie in pages of `page_tokens` tokens each.  Whoever makes batches owns the page
numbers: `Batch.pages` names the pages of each sequence, in order.  Blocks own what is in the pages.
Sequences with a common beginning may share its whole pages, as long as nobody writes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.batch import Batch

State = Any  # opaque to the core: made by an operator's `new_state`, handed back to it only

PAGE_STEP = 64  # tokens: `page_tokens` is a multiple of it, so that tiles of keys lie within a page
STEP_BACK = 16  # tokens that a sequence may go back, for speculative decoding

Int32 = npt.NDArray[np.int32]
UInt64 = npt.NDArray[np.uint64]

# Mixed into the identity of a page at each place of a table, so that swapped pages are noticed.
_PLACE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Room:
    """How many tokens a state can hold: `pages` pages of `page_tokens` tokens each.

    Raises ValueError if `pages` is not a whole number of 0 or more, or `page_tokens` not a positive
    multiple of 64.
    """

    pages: int
    page_tokens: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "pages", _whole("pages", self.pages))
        object.__setattr__(self, "page_tokens", _whole("page_tokens", self.page_tokens))
        if self.page_tokens == 0 or self.page_tokens % PAGE_STEP:
            raise ValueError(
                f"page_tokens is {self.page_tokens}, but must be a multiple of {PAGE_STEP}"
            )

    def pages_of(self, tokens: int) -> int:
        """Return how many pages a sequence of `tokens` tokens takes."""
        return -(-tokens // self.page_tokens)

    @classmethod
    def of_sequences(cls, sequences: int, tokens: int, page_tokens: int = 128) -> Room:
        """Return room for `sequences` sequences of up to `tokens` tokens each."""
        return cls(sequences * cls(0, page_tokens).pages_of(tokens), page_tokens)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ModelState:
    """What every layer's operator remembers of the tokens in the pages of `room`.

    A model takes the states that its `new_state` returned: a copy with another room would have
    blocks write beyond what the layers hold.

    Each page has a random identity, which it gets when a sequence begins it, and gets anew when
    tokens in it are replaced.  Its trail is the sum of the identities of the sequence's pages up to
    it: so one sum tells whether a table still names the pages that a sequence was written to.
    """

    room: Room
    layers: list[State]
    _filled: Int32 = field(init=False, repr=False)  # tokens that a page holds
    _most: Int32 = field(init=False, repr=False)  # that it has held since it was begun
    _identity: UInt64 = field(init=False, repr=False)
    _trail: UInt64 = field(init=False, repr=False)
    _writer: npt.NDArray[np.int64] = field(init=False, repr=False)  # scratch: -1 between calls
    _random: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        pages = self.room.pages
        arrays = {
            "_filled": np.zeros(pages, np.int32),
            "_most": np.zeros(pages, np.int32),
            "_identity": np.zeros(pages + 1, np.uint64),  # the last is that of "no page", -1
            "_trail": np.zeros(pages, np.uint64),
            "_writer": np.full(pages + 1, -1, np.int64),
            "_random": np.random.default_rng(),
        }
        for name, value in arrays.items():
            object.__setattr__(self, name, value)

    def begin(self, batch: Batch) -> Writing:
        """Return what the host `batch` will write, and mark it as lost should the forward fail.

        Raises ValueError, and changes nothing, if a sequence does not go on from what its pages
        hold, names a page that there is not, or writes a page that another sequence uses.
        """
        writing = Writing.of(batch, self.room)
        self._check_pages(batch, writing)
        self._check_starts(batch, writing)
        self._forget(writing)
        return writing

    def complete(self, batch: Batch, writing: Writing) -> None:
        """Record after a forward what the pages of the host `batch` hold."""
        self._filled[writing.pages] = writing.ends
        if writing.is_plain:
            return
        trails = np.cumsum(self._marks(batch.pages), axis=1, dtype=np.uint64)
        self._trail[writing.pages] = trails[writing.rows, writing.columns]

    def _check_pages(self, batch: Batch, writing: Writing) -> None:
        """Check that all pages are there, and that none is written by two sequences."""
        table, pages = batch.pages, writing.pages
        if table.size and table.max() >= self.room.pages:
            raise ValueError(f"page {table.max()} lies outside the {self.room.pages} there are")
        if len(pages) and pages.min() < 0:
            row = writing.rows[pages < 0][0]
            end = batch.starts[row] + np.diff(batch.cu_seqlens)[row]
            needed, named = self.room.pages_of(int(end)), np.count_nonzero(table[row] >= 0)
            raise ValueError(
                f"sequence {row} ends at {end} tokens and needs {needed} pages of "
                f"{self.room.page_tokens}, but names {named}"
            )
        self._check_writers(table, writing)

    def _check_writers(self, table: Int32, writing: Writing) -> None:
        places = writing.rows * table.shape[1] + writing.columns
        writer, pages = self._writer, writing.pages
        writer[pages] = places
        is_shared = bool((writer[pages] != places).any())
        if not is_shared and not self._is_continued(writing):
            there = writer[table.reshape(-1)]
            is_shared = bool(((there >= 0) & (there != np.arange(table.size))).any())
        writer[pages] = -1
        if is_shared:
            raise ValueError("a page that one sequence writes stands in another place, too")

    def _is_continued(self, writing: Writing) -> bool:
        """Return whether every page is written from where it ends: then no table can hold it.

        Where a page is begun or replaced, others may still name it.
        """
        offsets = writing.offsets
        is_continued = (offsets > 0) & (self._filled[writing.pages] == offsets)
        return writing.is_plain and bool(is_continued.all())

    def _check_starts(self, batch: Batch, writing: Writing) -> None:
        """Check that each sequence goes on from a page that still holds what was before."""
        starts, size = batch.starts, self.room.page_tokens
        goes_on = starts > 0
        if not goes_on.any():
            return
        last = (starts - 1) // size  # the column of the page that holds the token before
        pages = batch.pages[np.arange(batch.sequences), last]
        offsets = starts - last * size
        marks = self._marks(batch.pages)
        marks[np.arange(batch.pages.shape[1]) > last[:, None]] = 0
        is_lost = marks.sum(axis=1, dtype=np.uint64) != self._trail[pages]
        is_ahead = self._filled[pages] < offsets
        is_behind = self._most[pages] - STEP_BACK > offsets
        is_wrong = goes_on & (is_lost | is_ahead | is_behind)
        if is_wrong.any():
            row = int(np.flatnonzero(is_wrong)[0])
            before = int(starts[row] - offsets[row])
            reasons = {
                "its pages are not the ones that it was written to": is_lost[row],
                f"its pages hold {before + self._filled[pages[row]]}": is_ahead[row],
                f"its pages have held {before + self._most[pages[row]]}, and it can go back by at "
                f"most {STEP_BACK}": True,
            }
            reason = next(why for why, holds in reasons.items() if holds)
            raise ValueError(
                f"a sequence goes on after {starts[row]} tokens, but {reason}; start it at 0 again"
            )

    def _forget(self, writing: Writing) -> None:
        """Mark what is about to be written as lost; pages that change get another identity."""
        pages, offsets = writing.pages, writing.offsets
        is_new = self._filled[pages] != offsets
        is_new |= offsets == 0
        if is_new.any():
            changed = pages[is_new]
            self._identity[changed] = self._random.integers(
                0, 2**64, len(changed), np.uint64, endpoint=False
            )
            writing.is_plain = False
        self._filled[pages] = offsets
        self._most[pages] = np.maximum(self._most[pages] * (offsets > 0), writing.ends)

    def _marks(self, table: Int32) -> UInt64:
        """Return the identity of each page of a table, mixed with its place in the sequence."""
        places = np.arange(1, table.shape[1] + 1, dtype=np.uint64) * _PLACE
        return self._identity[table] ^ places


@dataclass(slots=True)
class Writing:
    """The pages that a batch writes: a row and a column of its table for each, and which tokens."""

    rows: npt.NDArray[np.intp]
    columns: npt.NDArray[np.intp]
    pages: Int32
    offsets: Int32  # of the first token written in the page
    ends: Int32  # one past the last
    is_plain: bool  # one page for each sequence, not its first token: trails stay

    @classmethod
    def of(cls, batch: Batch, room: Room) -> Writing:
        """Return what the host `batch` writes; -1 for pages that its table does not have."""
        size, starts, table = room.page_tokens, batch.starts, batch.pages
        ends = starts + np.diff(batch.cu_seqlens)
        first, last = starts // size, (ends - 1) // size
        rows = np.arange(batch.sequences)
        columns = first
        is_plain = bool((first == last).all())
        if not is_plain:
            counts = last - first + 1
            rows = np.repeat(rows, counts)
            columns = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
            columns += first[rows]
        offsets = np.maximum(starts[rows] - columns * size, 0)
        ends = np.minimum(ends[rows] - columns * size, size)
        if table.shape[1] and len(columns) and columns.max() < table.shape[1]:
            pages = table[rows, columns]
        else:
            pages = np.full(len(rows), -1, np.int32)
            is_there = columns < table.shape[1]
            pages[is_there] = table[rows[is_there], columns[is_there]]
        return cls(rows, columns, pages, offsets, ends, is_plain)


def _whole(name: str, value: Any) -> int:
    """Return `value` as an int; ValueError if it is not a whole number of 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise ValueError(f"{name} is {value!r}, but must be a whole number of 0 or more")
    return int(value)
