"""Which rows of the flat `[tokens, hidden_size]` tensors belong to which sequence.

There is no ambient context: a block that needs to know about sequences is given a `Batch`.  The
known ShortConv bugs of other libraries are all implicit batch state.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields
from reprlib import repr as brief  # of what a caller gives, however long it is
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit.batch_rules import ARRAYS, MOST_CONTEXT, PADDING, check, check_pages, integers
from lfm2kit.memory import HOST, Mark, Memory, is_ordered

Make = Callable[["Batch"], "Batch"]


class Form(NamedTuple):
    """The sizes of a batch.  A captured forward serves every batch of its form."""

    tokens: int
    sequences: int
    logits: int
    width: int  # pages of a sequence's row in the page table
    max_seqlen: int


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The rows of one forward.  The arrays lie in `memory`; the integers are always on the host.

    A sequence whose first row has position 0 starts afresh, whatever its pages hold; a sequence
    that starts at position p > 0 goes on after the p tokens that its pages hold.  Token t of a
    sequence lies in page `pages[sequence, t // page_tokens]`, at place `t % page_tokens`.

    A batch may end in padding rows, which stand for no token, if the model's blocks take them (see
    `lfm2kit.backend.TakesPadding`).  Each counts as a sequence, at position -1 and without pages.

    Raise ValueError, when it is made on the host, if a field is not as described here.  The arrays
    are not copied and not checked again, so they must not change.
    """

    token_ids: Any  # int32 [tokens]
    # int32 [tokens], of each row in its own sequence: consecutive, below 2^24; -1 of padding rows
    positions: Any
    cu_seqlens: Any  # int32 [sequences + 1], row where each sequence starts; the last is `tokens`
    pages: Any  # int32 [sequences, width], -1 beyond a sequence's pages; width 0 without a state
    logits_rows: Any  # int32 [logits], the rows whose logits are wanted, in any order
    max_seqlen: int  # rows of the longest sequence; 0 in an empty batch
    memory: Memory = HOST
    # Batches made from this one: copies by their memory's name, derived ones by their key; and how
    # the latter are made.
    views: dict[Hashable, Batch] = field(default_factory=dict, repr=False, init=False)
    makes: dict[Hashable, Make] = field(default_factory=dict, repr=False, init=False)
    copied: Mark | None = field(default=None, repr=False, init=False)  # when `on` made this copy

    def __post_init__(self) -> None:
        if not isinstance(getattr(self.memory, "name", None), str):
            raise ValueError(f"memory is {brief(self.memory)}, but must be a lfm2kit Memory")
        if self.memory.name == HOST.name:
            check(self)

    @property
    def tokens(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def sequences(self) -> int:
        return int(self.pages.shape[0])

    @property
    def form(self) -> Form:
        return Form(
            tokens=self.tokens,
            sequences=self.sequences,
            logits=int(self.logits_rows.shape[0]),
            width=int(self.pages.shape[1]),
            max_seqlen=self.max_seqlen,
        )

    @property
    def starts(self) -> Any:
        """Return each sequence's first position, int32 [sequences], in the batch's memory."""
        is_decoding = self.tokens == self.sequences  # a row each
        return self.positions if is_decoding else self.positions[self.cu_seqlens[:-1]]

    @classmethod
    def of_sequences(
        cls,
        sequences: Sequence[npt.ArrayLike],
        *,
        starts: Sequence[int] | None = None,
        pages: Sequence[Sequence[int]] | npt.NDArray[np.int32] | None = None,
    ) -> Batch:
        """Return one batch of sequences, or of their next chunks, wanting each one's last logits.

        `starts[i]` is how many tokens of sequence i its pages hold already (default 0); `pages[i]`
        its pages (default none, for a forward without a state), or all of them as a table padded
        with -1.

        Raise ValueError for an empty sequence, ids that are not integers, a negative start, pages
        that are not page numbers, and a wrong number of starts or rows of pages.
        """
        if not np.iterable(sequences):
            raise ValueError(
                f"sequences is {brief(sequences)}, but must be rows of token ids, "
                "such as [[1, 2], [3]]"
            )
        chunks = [_row_of_ids(sequence) for sequence in sequences]
        count = len(chunks)
        lengths = np.array([len(chunk) for chunk in chunks], np.int32)
        ends = np.zeros(count + 1, np.int32)
        lengths.cumsum(out=ends[1:])
        first = np.zeros(count, np.int32) if starts is None else _starts(starts, lengths)
        rows = np.arange(ends[-1], dtype=np.int32)
        return _made(
            token_ids=np.concatenate(chunks) if chunks else rows,
            positions=rows + np.repeat(first - ends[:-1], lengths),
            cu_seqlens=ends,
            pages=np.empty((count, 0), np.int32) if pages is None else _table(pages, count),
            logits_rows=ends[1:] - np.int32(1),
            max_seqlen=int(lengths.max(initial=0)),
            memory=HOST,
            views={},
            makes={},
            copied=None,
        )

    def padded(self, tokens: int) -> Batch:
        """Return this host batch with padding rows behind its own, so that it has `tokens` rows.

        It is this batch, if that has as many.  Logits of padding come last.  Raise ValueError if
        the batch has more rows than that.
        """
        count = tokens - self.tokens
        if count < 0:
            raise ValueError(f"the batch has {self.tokens} rows, which is more than {tokens}")
        if count == 0:
            return self
        rows = np.arange(self.tokens, tokens, dtype=np.int32)
        no_page = np.full((count, self.pages.shape[1]), -1, np.int32)
        return self.unchecked(
            token_ids=np.concatenate([self.token_ids, np.zeros(count, np.int32)]),
            positions=np.concatenate([self.positions, np.full(count, PADDING, np.int32)]),
            cu_seqlens=np.concatenate([self.cu_seqlens, rows + np.int32(1)]),
            pages=np.concatenate([self.pages, no_page]),
            logits_rows=np.concatenate([self.logits_rows, rows]),
            max_seqlen=max(self.max_seqlen, 1),
        )

    def without_padding(self) -> Batch:
        """Return this host batch without its padding rows: itself, if it has none."""
        count = int(np.count_nonzero(self.positions == PADDING))
        if not count:
            return self
        tokens, sequences = self.tokens - count, self.sequences - count
        return self.unchecked(
            token_ids=self.token_ids[:tokens],
            positions=self.positions[:tokens],
            cu_seqlens=self.cu_seqlens[: sequences + 1],
            pages=self.pages[:sequences],
            logits_rows=self.logits_rows[self.logits_rows < tokens],
            max_seqlen=self.max_seqlen if tokens else 0,
        )

    def on(self, memory: Memory) -> Batch:
        """Return this batch with its arrays in `memory`; each copy is made once and remembered.

        They are ready for what is enqueued in the memory's current stream, whichever stream they
        were copied in.
        """
        if memory.name == self.memory.name:
            return self
        if (view := self.views.get(memory.name)) is None:
            self.views.setdefault(self.memory.name, self)
            nearest = self.views.get(HOST.name, self)  # its arrays need no copy to the host
            view = self.views[memory.name] = nearest._moved(memory)
        if view.copied is not None and is_ordered(memory):
            memory.wait(view.copied)
        return view

    def derived(self, key: Hashable, make: Make) -> Batch:
        """Return what `make` makes of this batch on the host, in this batch's memory.

        It is made once, and remembered under `key`.  Make the key a tuple that begins with an
        object of your own, such as a function: then neither another module nor a memory's name is
        equal to it.  A captured forward makes it again for every batch that it is given, so it must
        follow from the batch alone.  Nothing more is derived from a derived batch.
        """
        if key not in self.views:
            self.makes[key] = make
            self.views[key] = make(self.on(HOST))
        return self.views[key].on(self.memory)

    def family(self) -> list[Batch]:
        """Return this batch and those derived from it, on the host."""
        host = self.on(HOST)
        return [host, *(host.derived(key, make) for key, make in self.makes.items())]

    def packed(self) -> npt.NDArray[np.int32]:
        """Return the arrays of the whole `family`, one after the other: int32 [n]."""
        arrays = [getattr(one, name) for one in self.family() for name in ARRAYS]
        return np.concatenate([array.reshape(-1) for array in arrays])

    def unpacked(self, memory: Memory, packed: Any) -> Batch:
        """Return this batch with its arrays in `memory`: views of `packed`, and so are the derived.

        `packed` is an array there as long as what `packed()` returns.  Whoever captures a forward
        gives it this batch, and before each replay copies the next batch's `packed()` there.
        """
        taken = 0
        batches = []
        for one in self.family():
            arrays = {}
            for name in ARRAYS:
                shape = getattr(one, name).shape
                size = int(np.prod(shape))
                arrays[name] = packed[taken : taken + size].reshape(shape)
                taken += size
            batches.append(one.unchecked(**arrays, memory=memory))
        whole, *derived = batches
        whole.views.update({memory.name: whole, HOST.name: self.on(HOST)})
        whole.views.update(zip(self.makes, derived, strict=True))
        whole.makes.update(self.makes)
        return whole

    def _moved(self, memory: Memory) -> Batch:
        def move(array: Any) -> Any:
            return memory.from_host(self.memory.to_host(array))

        arrays = {name: move(getattr(self, name)) for name in ARRAYS}
        copied = memory.mark() if is_ordered(memory) else None
        moved = self.unchecked(
            **arrays, memory=memory, views=self.views, makes=self.makes, copied=copied
        )
        if memory.name == HOST.name:  # made elsewhere: the first time that its arrays can be read
            check(moved)
        return moved

    def unchecked(self, **changes: Any) -> Batch:
        """Return a copy with these fields changed, without checking it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return _made(**{**values, "views": {}, "makes": {}, **changes})


def _made(**values: Any) -> Batch:
    """Make a batch of these fields without checking it."""
    batch = object.__new__(Batch)
    for name, value in values.items():
        object.__setattr__(batch, name, value)
    return batch


def _row_of_ids(sequence: npt.ArrayLike) -> npt.NDArray[np.int32]:
    ids = integers("token ids", sequence)
    if ids.ndim != 1 or not len(ids):
        raise ValueError("a sequence is not a row of one or more token ids")
    return ids


def _starts(values: npt.ArrayLike, lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    starts = integers("starts", values)
    if starts.shape != lengths.shape:
        raise ValueError(f"starts has shape {starts.shape} for {len(lengths)} sequences")
    is_within = (starts >= 0) & (starts <= MOST_CONTEXT - lengths)
    if not is_within.all():
        row = int(np.argmin(is_within))
        raise ValueError(
            f"sequence {row} cannot start at {starts[row]}: positions are 0 to {MOST_CONTEXT - 1}"
        )
    return starts


def _table(
    pages: Sequence[Sequence[int]] | npt.NDArray[np.int32], sequences: int
) -> npt.NDArray[np.int32]:
    """Return rows of page numbers as one table, padded with -1."""
    if isinstance(pages, np.ndarray) and pages.ndim == 2:
        table = integers("pages", pages).copy(order="C")
    else:
        rows = _rows_of_pages(pages)
        table = np.full((len(rows), max(map(len, rows), default=0)), -1, np.int32)
        for i, row in enumerate(rows):
            table[i, : len(row)] = row
    if len(table) != sequences:
        raise ValueError(f"there are {len(table)} rows of pages for {sequences} sequences")
    check_pages(table)
    return table


def _rows_of_pages(pages: Any) -> list[npt.NDArray[np.int32]]:
    """Return each sequence's page numbers; ValueError if `pages` is not a row for each."""
    rows = [integers("pages", row) for row in pages] if np.iterable(pages) else None
    if rows is None or any(row.ndim != 1 for row in rows):
        raise ValueError(
            f"pages is {brief(pages)}, but must have a row of page numbers for each sequence, "
            "as [[0], [1, 2]]"
        )
    return rows
