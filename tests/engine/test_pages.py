"""Pages are found by what they hold, and never once they may hold something else."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2kit.engine.pages import Pages
from lfm2kit.state import Room

SIZE = 64
PAGES = 8

Ids = npt.NDArray[np.int32]
# One number a page: with two of them many sequences begin alike.
PROMPTS = st.lists(st.sampled_from([0, 1]), min_size=1, max_size=4)


def ids_of(numbers: list[int], rest: int = 1) -> Ids:
    """Return the tokens of whole pages, each full of one number, and `rest` tokens more."""
    return np.repeat(np.array([*numbers, 7], np.int32), [*[SIZE] * len(numbers), rest])


class Told:
    """Books of pages, and beside them what each page holds: the tokens of its sequence up to it."""

    def __init__(self) -> None:
        self.pages = Pages(Room(PAGES, SIZE))
        self.held: dict[int, bytes] = {}

    def begin(self, ids: Ids) -> list[int] | None:
        """Return the pages of a sequence, whose whole ones are computed at once."""
        has_room = self.pages.has_room(ids, len(ids))
        beginning = self.pages.begin(ids)
        assert has_room == (beginning is not None)
        if beginning is None:
            return None
        pages, tokens = beginning
        assert tokens < len(ids)
        for i, page in enumerate(pages):
            prefix = ids[: (i + 1) * SIZE].tobytes()
            if i < tokens // SIZE:
                assert self.held[page] == prefix
            else:
                self.held[page] = prefix
        return pages


@given(st.lists(st.one_of(PROMPTS, st.integers(0, 20)), max_size=30))
@settings(max_examples=200, derandomize=True, database=None, deadline=None)
def test_what_is_found_holds_the_tokens_that_are_looked_for(program: list[Any]) -> None:
    """A list begins a sequence, which another one may have begun alike; a number ends one."""
    told = Told()
    running: list[tuple[list[int], Ids]] = []
    late: list[tuple[list[int], Ids]] = []  # computed at the same time as those after them
    for one in program:
        if isinstance(one, list):
            ids = ids_of(one)
            if (pages := told.begin(ids)) is not None:
                running.append((pages, ids))
                late.append((pages, ids))
        elif running:
            told.pages.give_back(running.pop(one % len(running))[0])
            late = [pair for pair in late if any(pair[0] is pages for pages, _ in running)]
        if len(late) > 1:
            for end in range(SIZE, 5 * SIZE, SIZE):  # a page of each after the other
                for pages, ids in late:
                    if end < len(ids):
                        told.pages.know(pages, ids[:end], end - SIZE)
            late = []
        assert told.pages.free == PAGES - len({page for pages, _ in running for page in pages})
    for pages, _ in running:
        told.pages.give_back(pages)
    assert told.pages.free == PAGES


def known(pages: Pages, numbers: list[int]) -> list[int]:
    """Return the pages of a sequence whose whole pages are computed."""
    ids = ids_of(numbers)
    beginning = pages.begin(ids)
    assert beginning is not None
    pages.know(beginning.pages, ids, beginning.tokens)
    return beginning.pages


def test_a_beginning_that_is_known_is_shared() -> None:
    pages = Pages(Room(PAGES, SIZE))
    first = known(pages, [0, 1, 0])
    other = pages.begin(ids_of([0, 1, 1]))
    assert other is not None
    assert other.pages[:2] == first[:2]
    assert not set(other.pages[2:]) & set(first)
    assert other.tokens == 2 * SIZE
    assert pages.free == PAGES - 6


def test_one_token_is_always_left_to_compute() -> None:
    pages = Pages(Room(PAGES, SIZE))
    first = known(pages, [0, 1])
    whole = pages.begin(ids_of([0, 1], rest=0))
    assert whole is not None
    assert whole.tokens == SIZE
    assert whole.pages[0] == first[0]
    assert whole.pages[1] not in first


def test_a_sequence_finds_its_pages_again_as_long_as_nobody_has_taken_them() -> None:
    pages = Pages(Room(PAGES, SIZE))
    first = known(pages, [0, 1, 0])
    pages.give_back(first)
    taken = [pages.take() for _ in range(PAGES - 2)]
    assert not set(taken) & set(first[:2])  # those in which it begins are taken last
    again = pages.begin(ids_of([0, 1]))
    assert again is None  # two pages are found, and one more is needed
    pages.give_back(taken)
    again = pages.begin(ids_of([0, 1]))
    assert again is not None
    assert again.pages[:2] == first[:2]


def test_too_few_pages_change_nothing() -> None:
    pages = Pages(Room(2, SIZE))
    pages.give_back(known(pages, [0]))
    assert pages.begin(ids_of([0, 1])) is None
    assert pages.free == 2
    assert pages.begin(ids_of([0])) is not None


def test_what_is_forgotten_is_not_found() -> None:
    pages = Pages(Room(PAGES, SIZE))
    first = known(pages, [0, 1])
    pages.forget()
    pages.know(first, ids_of([0, 1]), 2 * SIZE)  # as the first one goes on
    other = pages.begin(ids_of([0, 1]))
    assert other is not None
    assert other.tokens == 0


def test_what_follows_a_second_copy_is_not_found() -> None:
    """Else it would be found behind the other tokens that its first page holds later."""
    pages = Pages(Room(PAGES, SIZE))
    ids = ids_of([0, 1], rest=0)
    first, second = pages.begin(ids), pages.begin(ids)
    assert first is not None
    assert second is not None
    for end in (SIZE, 2 * SIZE):
        for copy in (first.pages, second.pages):
            pages.know(copy, ids[:end], end - SIZE)
    pages.give_back(second.pages)
    other = pages.begin(ids_of([1], rest=0))
    assert other is not None
    assert other.pages == second.pages[:1]
    pages.know(other.pages, ids_of([1], rest=0), 0)
    after = pages.begin(ids_of([1, 1]))
    assert after is not None
    assert after.tokens == SIZE


def test_pages_that_nobody_can_find_are_taken_first() -> None:
    pages = Pages(Room(PAGES, SIZE))
    first, other = known(pages, [0]), pages.take()
    pages.give_back(first)
    pages.give_back([other])
    assert [pages.take() for _ in range(PAGES)][-1] == first[0]
