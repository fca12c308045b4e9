"""The books of a state's pages: which tokens each page holds, and of which sequence.

Every page has a random identity, which it gets when a sequence begins it, and anew when tokens in
it are replaced.  Its trail is the sum of the identities of the sequence's pages up to it, mixed
with their places.  So one sum tells whether a table still names the pages that a sequence was
written to, in order, and whether nobody has taken one of them since.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lfm2kit.batch import Batch

if TYPE_CHECKING:
    from lfm2kit.state import Room

STEP_BACK = 16  # tokens that a sequence may go back, for speculative decoding

Int32 = npt.NDArray[np.int32]
UInt64 = npt.NDArray[np.uint64]

_ODD = np.uint64(0x9E3779B97F4A7C15)  # mixes places into identities
_LOST = -1  # tokens of a page that a failed forward was writing


class Ledger:
    """The books of a room's pages; `begin` and `complete` surround each forward."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._filled = np.zeros(room.pages, np.int32)  # tokens that a page holds
        self._most = np.zeros(room.pages, np.int32)  # that it has held since it was begun
        self._identity = np.zeros(room.pages + 1, np.uint64)  # the last is that of no page, -1
        self._trail = np.zeros(room.pages, np.uint64)
        self._writer = np.full(room.pages + 1, -1, np.int64)  # scratch: -1 between calls
        self._random = np.random.default_rng()
        self._pending: Entry | None = None  # begun and not completed: a forward that failed
        self._run: Run | None = None

    def begin(self, batch: Batch) -> None:
        """Note that a forward of the host `batch` begins; what it writes is lost if it fails.

        Raise ValueError, and change nothing, if a sequence does not go on from what its pages
        hold, names a page that there is not, or writes a page that another sequence uses.
        """
        if self._run is not None and self._pending is None and self._run.goes_on_with(batch):
            self._pending = self._run.entry
            return
        self._settle()
        entry = Entry.of(batch, self._room)
        self._check_pages(batch.pages, entry)
        self._check_starts(batch, entry)
        self._pending = entry

    def complete(self, batch: Batch) -> None:
        """Note that the forward of the batch that was begun has written its pages."""
        entry = self._pending
        assert entry is not None, "no forward has begun"
        if self._run is not None and entry is self._run.entry:
            self._run.advance()
        else:
            self._enter(batch.pages, entry)
            self._run = Run.after(batch, entry, self._room)
        self._pending = None  # last: if an interrupt comes before, the pages count as lost

    def _settle(self) -> None:
        """Enter what a run of decoding steps has written, and what a failed forward has lost."""
        if self._run is not None:
            self._raise_to(self._run.entry.pages, self._run.ends)
            self._run = None
        if self._pending is not None:
            self._filled[self._pending.pages] = _LOST
            self._renew(self._pending.pages)  # pages after them no longer follow
            self._pending = None

    def _enter(self, table: Int32, entry: Entry) -> None:
        """Enter the pages that a forward has written."""
        changed = entry.pages[(entry.offsets == 0) | (self._filled[entry.pages] != entry.offsets)]
        self._most[entry.pages] *= entry.offsets > 0
        self._raise_to(entry.pages, entry.ends)
        if not len(changed):
            return
        self._renew(changed)
        trails = self._trails(table)
        self._trail[entry.pages] = trails[entry.rows, entry.columns]

    def _renew(self, pages: Int32) -> None:
        """Give pages other identities, so that no table that named them is accepted any more."""
        self._identity[pages] = self._random.integers(2**64, size=len(pages), dtype=np.uint64)

    def _raise_to(self, pages: Int32, ends: Int32) -> None:
        self._filled[pages] = ends
        self._most[pages] = np.maximum(self._most[pages], ends)

    def _check_pages(self, table: Int32, entry: Entry) -> None:
        """Check that all pages are there, and that none that is written is used twice."""
        if table.size and table.max() >= self._room.pages:
            row, column = np.argwhere(table >= self._room.pages)[0]
            raise ValueError(
                f"sequence {row} names page {table[row, column]}, "
                f"but the state has {self._room.pages} pages, numbered from 0"
            )
        places = entry.rows * table.shape[1] + entry.columns
        if self._are_shared(table, entry, places):
            raise ValueError(self._why_shared(table, entry))

    def _are_shared(self, table: Int32, entry: Entry, places: npt.NDArray[np.intp]) -> bool:
        """Return whether a page that is written at one place stands at another one, too."""
        writer, pages = self._writer, entry.pages
        try:
            writer[pages] = places
            if (writer[pages] != places).any():
                return True
            if self._are_continued(entry):
                return False
            users = writer[table.reshape(-1)]
            return bool(((users >= 0) & (users != np.arange(table.size))).any())
        finally:
            writer[pages] = -1

    def _why_shared(self, table: Int32, entry: Entry) -> str:
        """Return which page that is written stands at another place, too, and what to do."""
        users = ((np.argwhere(table == page), i) for i, page in enumerate(entry.pages))
        places, nth = next((places, i) for places, i in users if len(places) > 1)
        row, column, page = entry.rows[nth], entry.columns[nth], entry.pages[nth]
        other = next(int(r) for r, c in places if (r, c) != (row, column))
        user = "itself names a second time" if other == row else f"sequence {other} names as well"
        whole = int(column) * self._room.page_tokens
        restart = "give it"
        if whole and entry.offsets[nth]:  # it goes on within the page: a fork, most likely
            restart = f"it can go on from {whole} in"
        return f"sequence {row} writes page {page}, which {user}; {restart} a page of its own"

    def _are_continued(self, entry: Entry) -> bool:
        """Return whether all pages are written from where they end on.

        Then nobody else can name them with success: a page has a follower only if it is full.
        """
        is_continued = (entry.offsets > 0) & (self._filled[entry.pages] == entry.offsets)
        return bool(is_continued.all())

    def _check_starts(self, batch: Batch, entry: Entry) -> None:
        """Check that each sequence goes on from a page that holds what was before."""
        starts = batch.starts
        goes_on = starts > 0
        if not goes_on.any():
            return
        columns, last = np.divmod(np.maximum(starts - 1, 0), np.int32(self._room.page_tokens))
        offsets = last + np.int32(1)  # tokens before, in the page that holds the last of them
        rows = np.arange(batch.sequences)
        pages = batch.pages[rows, columns]
        is_lost = self._trails(batch.pages)[rows, columns] != self._trail[pages]
        is_lost |= self._filled[pages] < 0
        is_ahead = self._filled[pages] < offsets
        is_behind = self._most[pages] - STEP_BACK > offsets
        is_wrong = goes_on & (is_lost | is_ahead | is_behind)
        if is_wrong.any():
            row = int(np.flatnonzero(is_wrong)[0])
            held, offset = batch.pages[row, : columns[row] + 1], int(offsets[row])
            reason = self._why_lost(held) if is_lost[row] else self._why_not_from(held, offset)
            raise ValueError(f"sequence {row} goes on after {starts[row]} tokens, but {reason}")

    def _why_lost(self, pages: Int32) -> str:
        """Return which of a sequence's pages does not hold its tokens, and where it can go on."""
        is_lost = self._trails(pages[None])[0] != self._trail[pages]
        is_lost |= self._filled[pages] < 0
        first, size = int(np.flatnonzero(is_lost)[0]), self._room.page_tokens
        page = pages[first]
        before = (first - 1) * size + int(self._filled[pages[first - 1]]) if first else 0
        from_before = f"it can go on from {before}" if before else "start it at 0 again"
        if self._filled[page] < 0:
            return f"page {page} was lost when a forward failed; {from_before}"
        if self._filled[page] == 0:
            return f"page {page} is empty; {from_before}"
        if not first:
            return f"page {page} does not hold its first tokens; start it at 0 again"
        return (
            f"page {page} does not go on from page {pages[first - 1]} as it is now; start it at 0 "
            f"again, or at {before} if its pages up to there are still its own"
        )

    def _why_not_from(self, pages: Int32, offset: int) -> str:
        """Return how many tokens a sequence's pages hold or have held, and where it can go on."""
        before, page = (len(pages) - 1) * self._room.page_tokens, pages[-1]
        held = before + int(self._filled[page])
        if self._filled[page] < offset:
            return f"its pages hold {held}; it can go on from {held}"
        most = before + int(self._most[page])
        return (
            f"page {page} has held tokens up to {most}, and it can go back by at most {STEP_BACK}; "
            f"it can go on from {most - STEP_BACK}"
        )

    def _trails(self, table: Int32) -> UInt64:
        """Return what the trail of each page of a table would be."""
        places = np.arange(1, table.shape[1] + 1, dtype=np.uint64) * _ODD
        return np.cumsum(self._identity[table] ^ places, axis=1, dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Entry:
    """The pages that a batch writes, each with its place in the table and its tokens."""

    rows: npt.NDArray[np.intp]
    columns: npt.NDArray[np.intp]
    pages: Int32
    offsets: Int32  # of the first token written in the page
    ends: Int32  # one past the last

    @classmethod
    def of(cls, batch: Batch, room: Room) -> Entry:
        """Return what the host `batch` writes; ValueError if its table names too few pages."""
        starts, size = batch.starts, room.page_tokens
        lengths = batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]
        columns, offsets = np.divmod(starts, np.int32(size))
        rows, ends = np.arange(batch.sequences), offsets + lengths
        if len(ends) and ends.max() > size:  # a chunk goes on in further pages
            counts = -(-ends // size)
            rows = np.repeat(rows, counts)
            nth = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
            columns = columns[rows] + nth
            offsets = np.where(nth == 0, offsets[rows], np.int32(0))
            ends = np.minimum(ends[rows] - nth * size, size).astype(np.int32)
        return cls(rows, columns, _pages(batch, rows, columns, room), offsets, ends)


def _pages(
    batch: Batch, rows: npt.NDArray[np.intp], columns: npt.NDArray[np.intp], room: Room
) -> Int32:
    table: Int32 = batch.pages
    named = np.count_nonzero(table >= 0, axis=1)
    is_short = columns >= named[rows]
    if is_short.any():
        row = rows[is_short][0]
        end = int(batch.positions[batch.cu_seqlens[row + 1] - 1]) + 1
        raise ValueError(
            f"sequence {row} of {end} tokens needs {room.pages_of(end)} pages of "
            f"{room.page_tokens}, but the batch names {named[row]}"
        )
    return table[rows, columns]


@dataclass(slots=True)
class Run:
    """A run of decoding steps with one table, a token each, which need few checks.

    As long as the sequences stay within their pages, each step writes one token further.
    """

    entry: Entry
    table: bytes
    starts: Int32  # of the next step
    ends: Int32  # tokens in the pages
    left: int  # steps before a sequence needs its next page

    @classmethod
    def after(cls, batch: Batch, entry: Entry, room: Room) -> Run | None:
        """Return the run that a step of decoding may begin; None after another batch."""
        if batch.tokens != batch.sequences or not batch.tokens:
            return None
        starts, ends = batch.positions + np.int32(1), entry.ends.copy()
        return cls(entry, batch.pages.tobytes(), starts, ends, room.page_tokens - int(ends.max()))

    def goes_on_with(self, batch: Batch) -> bool:
        """Return whether the host `batch` is the next step."""
        return (
            self.left > 0
            and batch.tokens == batch.sequences
            and batch.positions.tobytes() == self.starts.tobytes()
            and batch.pages.tobytes() == self.table
        )

    def advance(self) -> None:
        self.starts += np.int32(1)
        self.ends += np.int32(1)
        self.left -= 1
