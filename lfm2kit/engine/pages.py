"""The pages of a state: who uses each one, and what the whole ones hold.

A page that nobody uses keeps what it holds until it is taken again.  So a sequence finds the whole
pages of another one that began in the same way: of its fork, of the same prompt, of the last turn
of a chat, or its own, if it was put back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit.state import Room

Int32 = npt.NDArray[np.int32]


class Beginning(NamedTuple):
    """A sequence's pages, and how many of its tokens they hold already."""

    pages: list[int]
    tokens: int


class Contents(NamedTuple):
    """The tokens of a whole page, and the page before it, -1 for the first of a sequence.

    The page before stands for all tokens before: a page's contents change only once it is free, and
    by then the pages after it are free as well, and have been taken.
    """

    before: int
    ids: bytes


class Pages:
    """The books of a room's pages."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._users = [0] * room.pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(room.pages))  # first first
        self._contents: dict[int, Contents] = {}  # of whole pages
        self._page_of: dict[Contents, int] = {}

    @property
    def free(self) -> int:
        """Return how many pages nobody uses."""
        return len(self._free)

    def begin(self, ids: Int32, shareable: int | None = None) -> Beginning | None:
        """Return pages for a sequence of these tokens; None if too few are free.

        Those of its beginning that is known are shared, of the first `shareable` tokens alone if
        that is given.  At least one token is left to compute.
        """
        found = self._holding(ids if shareable is None else ids[: shareable + 1])
        for page in found:
            self._use(page)
        missing = self._room.pages_of(len(ids)) - len(found)
        if missing > self.free:
            self.give_back(found)
            return None
        return Beginning(
            [*found, *(self.take() for _ in range(missing))], len(found) * self._room.page_tokens
        )

    def has_room(self, ids: Int32, shareable: int) -> bool:
        """Return whether `begin` would find pages for these tokens."""
        found = self._holding(ids[: shareable + 1])
        free = self.free - sum(not self._users[page] for page in found)
        return self._room.pages_of(len(ids)) - len(found) <= free

    def take(self) -> int:
        """Return a page that was free, and that the caller may write."""
        page = next(iter(self._free))
        if (contents := self._contents.pop(page, None)) is not None:
            del self._page_of[contents]
        self._use(page)
        return page

    def give_back(self, pages: Iterable[int]) -> None:
        """Free the pages of a sequence, in their order, unless others use them.

        The last one is taken first, so that a known page follows known ones; before it come those
        whose contents nobody can find.
        """
        for page in reversed(list(pages)):
            self._users[page] -= 1
            if not self._users[page]:
                self._free[page] = None
                if page not in self._contents:
                    self._free.move_to_end(page, last=False)

    def know(self, pages: list[int], ids: Int32, since: int) -> None:
        """Note that a sequence's pages hold these tokens, those from `since` on for the first time.

        Where two sequences have computed the same tokens, the pages of the first are found.
        """
        size = self._room.page_tokens
        for i in range(since // size, len(ids) // size):
            before = pages[i - 1] if i else -1
            contents = Contents(before, ids[i * size : (i + 1) * size].tobytes())
            if contents in self._page_of or (i and before not in self._contents):
                return
            self._contents[pages[i]] = contents
            self._page_of[contents] = pages[i]

    def forget(self) -> None:
        """Find none of the pages again that are known now: what they hold is doubtful."""
        self._contents.clear()
        self._page_of.clear()

    def _holding(self, ids: Int32) -> list[int]:
        """Return the known pages that hold the beginning of `ids`, but for the last token."""
        size, pages, before = self._room.page_tokens, [], -1
        for start in range(0, len(ids) - size, size):
            page = self._page_of.get(Contents(before, ids[start : start + size].tobytes()))
            if page is None:
                break
            pages.append(page)
            before = page
        return pages

    def _use(self, page: int) -> None:
        self._free.pop(page, None)
        self._users[page] += 1
