"""Sequences that are fed to an operator in chunks, over a state with pages for each."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.batch import Batch
from lfm2kit.specs import Layer, Spec
from lfm2kit.state import Room
from lfm2kit.testing.compare import Result, each, rows_of
from lfm2kit.testing.host_block import HostBlock
from lfm2kit.testing.random_inputs import random_inputs
from lfm2kit.testing.verdicts import CheckFailed

Float32 = npt.NDArray[np.float32]

PAGE_TOKENS = 64


class Pages:
    """The free page numbers, given in an order that no block can rely on, with their users."""

    def __init__(self, room: Room, rng: np.random.Generator) -> None:
        self.room = room
        self._rng = rng
        self._users = dict.fromkeys(range(room.pages), 0)
        self._free = list(range(room.pages))
        self.tables: dict[Hashable, list[int]] = {}
        self.tokens: dict[Hashable, int] = {}

    def extend(self, name: Hashable, tokens: int) -> tuple[int, list[int]]:
        """Give a sequence the pages for its next tokens; return its start and its pages."""
        start = self.tokens.get(name, 0)
        table = self.tables.setdefault(name, [])
        while len(table) < self.room.pages_of(start + tokens):
            table.append(self._take())
        self.tokens[name] = start + tokens
        return start, table

    def _take(self) -> int:
        """Take a free page; of a fresh room the last one, for which NumPy takes -1, too."""
        is_fresh = len(self._free) == self.room.pages
        page = self._free.pop(-1 if is_fresh else self._rng.integers(len(self._free)))
        self._users[page] = 1
        return page

    def step_back(self, name: Hashable, tokens: int) -> None:
        """Take back a sequence's last tokens; pages that it no longer needs are free again."""
        self.tokens[name] -= tokens
        self._give_back(name, self.room.pages_of(self.tokens[name]))

    def fork(self, name: Hashable, of: Hashable) -> int:
        """Begin a sequence with the whole pages of another one; return the tokens they hold."""
        whole = self.tokens[of] // self.room.page_tokens
        self.tables[name] = self.tables[of][:whole]
        for page in self.tables[name]:
            self._users[page] += 1
        self.tokens[name] = whole * self.room.page_tokens
        return self.tokens[name]

    def is_alone(self, name: Hashable, start: int) -> bool:
        """Return whether no other sequence uses the pages from position `start` on."""
        pages = self.tables[name][start // self.room.page_tokens :]
        return all(self._users[page] == 1 for page in pages)

    def drop(self, name: Hashable) -> None:
        """End a sequence: its pages are free again."""
        self._give_back(name, 0)
        del self.tables[name], self.tokens[name]

    def _give_back(self, name: Hashable, keep: int) -> None:
        for page in self.tables[name][keep:]:
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)
        del self.tables[name][keep:]


class Session:
    """A state of a block, and the pages of its sequences."""

    def __init__(
        self,
        spec: Spec,
        block: HostBlock,
        rng: np.random.Generator,
        room: Room = Room(12, PAGE_TOKENS),  # noqa: B008 (it is frozen)
    ) -> None:
        self._spec = spec
        self._block = block
        self._state = block.new_state(room)
        self.pages = Pages(room, rng)

    def feed(self, *chunks: tuple[Hashable, Float32]) -> list[Result]:
        """Return the results of one call with the next rows of some sequences, by name."""
        extended = [self.pages.extend(name, len(rows)) for name, rows in chunks]
        batch = Batch.of_sequences(
            [np.zeros(len(rows), np.int32) for _, rows in chunks],
            starts=[start for start, _ in extended],
            pages=[table for _, table in extended],
        )
        x = np.concatenate([rows for _, rows in chunks])
        result = _call(self._spec, self._block, x, batch, self._state)
        return [rows_of(result, slice(a, b)) for a, b in pairwise(batch.cu_seqlens)]

    def feed_nothing(self, columns: int) -> None:
        """Make one call without any sequence, with a page table of some columns."""
        empty = Batch.of_sequences([], pages=np.empty((0, columns), np.int32))
        x = np.zeros((0, hidden_size_of(self._spec)), np.float32)
        _call(self._spec, self._block, x, empty, self._state)

    def feed_in_chunks(self, name: Hashable, x: Float32, lengths: Sequence[int]) -> Result:
        """Return the joined results of `x`, fed to one sequence in a call for each chunk."""
        ends = np.cumsum([0, *lengths])
        assert ends[-1] == len(x)
        return joined([self.feed((name, x[a:b]))[0] for a, b in pairwise(ends)])


def calls(spec: Spec, block: HostBlock, rng: np.random.Generator) -> Iterator[tuple[Any, ...]]:
    """Yield arguments of calls of 1, 17 and 130 rows; of operators and layers with a state, too.

    Those with a state are to be made in order: a prefill of two sequences, then a step of both, and
    of one of them beside a prefill of another.
    """
    for rows in (1, 17, 130):
        yield random_inputs(spec, rng, rows)
    if not spec.has_state:
        return
    state = block.new_state(Room(4, PAGE_TOKENS))
    for starts, lengths in (([0, 0], [5, 3]), ([5, 3], [1, 1]), ([6, 0], [1, 70])):
        ids = [np.zeros(n, np.int32) for n in lengths]
        batch = Batch.of_sequences(ids, starts=starts, pages=[[1, -1], [2, 0]])
        *arrays, _, _ = random_inputs(spec, rng, batch.tokens)
        yield *arrays, batch, state


def one_shot(spec: Spec, block: HostBlock, x: Float32) -> Result:
    """Return the result of one forward over a whole sequence, without a state."""
    return _call(spec, block, x, Batch.of_sequences([np.zeros(len(x), np.int32)]), None)


def joined(results: Sequence[Result]) -> Result:
    """Return the results of consecutive chunks as one."""
    parts = [each(result) for result in results]
    arrays = tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return arrays if isinstance(results[0], tuple) else arrays[0]


def _call(spec: Spec, block: HostBlock, x: Float32, batch: Batch, state: Any) -> Result:
    inputs = (x, None) if isinstance(spec, Layer) else (x,)
    result: Result = block(*inputs, batch, state)
    wanted = (batch.tokens, hidden_size_of(spec))
    for array in each(result):
        if array.shape != wanted:
            raise CheckFailed(f"{spec} returned {list(array.shape)}, expected {list(wanted)}")
    return result


def hidden_size_of(spec: Spec) -> int:
    """Return the width of the rows that an operator or a layer takes."""
    operator = spec.operator if isinstance(spec, Layer) else spec
    size: int = operator.hidden_size  # type: ignore[attr-defined]
    return size
