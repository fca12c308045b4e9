"""Programs of sequences, which come, grow, fork, step back and end in any order, over one state.

A program is data: `lfm2kit.testing.draws` draws one, and whoever has a state runs it.  What cannot
be done where it stands, such as a fork of a sequence without a whole page, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lfm2kit.state import STEP_BACK, Room
from lfm2kit.testing.compare import Result, each
from lfm2kit.testing.sessions import PAGE_TOKENS, Pages

Values = npt.NDArray[Any]  # of a sequence's tokens: [tokens, ...]

MOST_SEQUENCES, MOST_TOKENS = 4, 150
ROOM = Room.of_sequences(MOST_SEQUENCES, MOST_TOKENS, PAGE_TOKENS)


class Feed(NamedTuple):
    """One call with the next tokens of the sequences there are, and perhaps a new one's first."""

    tokens: tuple[int, ...]  # of each sequence, the oldest first; none of those beyond
    new: int


class Steps(NamedTuple):
    """Calls with one token of each sequence."""

    calls: int


class Fork(NamedTuple):
    """A new sequence that shares the whole pages of another one, and its first own token."""

    of: int


class StepBack(NamedTuple):
    """Takes back a sequence's last tokens, and feeds it another one."""

    of: int
    tokens: int


class End(NamedTuple):
    """Gives a sequence's pages back."""

    of: int


Action = Feed | Steps | Fork | StepBack | End


class Program(NamedTuple):
    """Actions, whose sequences are counted from 0, over and over; the seed draws all values."""

    seed: int
    actions: tuple[Action, ...]


class Fed(NamedTuple):
    """The result of the last rows of a chunk, and where in their sequence they stand."""

    rows: range
    result: Result


class Subject(Protocol):
    """Something with a state, that sequences are fed to."""

    pages: Pages

    def draw(self, rng: np.random.Generator, tokens: int) -> Values:
        """Return the values of as many tokens."""
        ...

    def feed(self, *chunks: tuple[Any, Values]) -> Sequence[Result]:
        """Return the results of the last rows of each chunk, of one row at least."""
        ...

    def judge(self, values: Values, fed: Sequence[Fed], what: str) -> None:
        """Raise `CheckFailed` unless these are the results of the sequence alone."""
        ...


class Run:
    """A run of a program: the sequences that are alive, and what they were given."""

    def __init__(self, subject: Subject, program: Program) -> None:
        self._subject = subject
        self._program = program
        self._rng = np.random.default_rng(program.seed)
        self._values: dict[int, Values] = {}
        self._most: dict[int, int] = {}  # tokens that a sequence has had
        self._fed: dict[int, list[Fed]] = {}
        self.done: list[str] = []  # in words
        self._names = count()

    def judge(self) -> None:
        """Do all that the program says; raise `CheckFailed` for the first wrong sequence."""
        for action in self._program.actions:
            self._do(action)
        for name in self._values:
            self._judge(name)

    def _do(self, action: Action) -> None:
        names = list(self._values)
        match action:
            case Feed(tokens, new):
                lengths = dict(zip(names, tokens, strict=False))
                is_room = len(names) < MOST_SEQUENCES
                self._feed(lengths | ({next(self._names): new} if new and is_room else {}))
            case Steps(calls):
                for _ in range(calls):
                    self._feed(dict.fromkeys(names, 1))
            case Fork(of) if 0 < len(names) < MOST_SEQUENCES:
                self._fork(names[of % len(names)])
            case StepBack(of, tokens) if names:
                self._step_back(names[of % len(names)], tokens)
            case End(of) if names:
                self._end(names[of % len(names)])

    def _feed(self, lengths: dict[int, int]) -> None:
        held = self._subject.pages.tokens
        fed = {name: n for name, n in lengths.items() if 0 < n <= MOST_TOKENS - held.get(name, 0)}
        if not fed:
            return
        self.done.append(str(fed))
        order = [int(name) for name in self._rng.permutation(list(fed))]
        new = {name: self._subject.draw(self._rng, fed[name]) for name in order}
        for name, result in zip(order, self._subject.feed(*new.items()), strict=True):
            values = self._values.get(name, new[name][:0])
            self._values[name] = np.concatenate([values, new[name]])
            end = len(self._values[name])
            self._most[name] = max(self._most.get(name, 0), end)
            self._fed.setdefault(name, []).append(Fed(range(end - _rows(result), end), result))

    def _fork(self, origin: int) -> None:
        if self._subject.pages.tokens[origin] < self._subject.pages.room.page_tokens:
            return
        name = next(self._names)
        self.done.append(f"{name} forks {origin}")
        self._values[name] = self._values[origin][: self._subject.pages.fork(name, origin)]
        self._feed({name: 1})

    def _step_back(self, name: int, tokens: int) -> None:
        pages = self._subject.pages
        start = pages.tokens[name] - tokens
        can_go = start >= max(1, self._most[name] - STEP_BACK)
        if not (can_go and pages.is_alone(name, start)):
            return
        self._judge(name)
        self.done.append(f"{name} back {tokens}")
        pages.step_back(name, tokens)
        self._values[name] = self._values[name][:start]
        self._feed({name: 1})

    def _end(self, name: int) -> None:
        self._judge(name)
        self.done.append(f"{name} ends")
        self._subject.pages.drop(name)
        del self._values[name]

    def _judge(self, name: int) -> None:
        """Judge what a sequence was given since it was judged last."""
        if fed := self._fed.pop(name, []):
            what = f"sequence {name} after {', '.join(self.done)} (seed {self._program.seed})"
            self._subject.judge(self._values[name], fed, what)


def _rows(result: Result) -> int:
    return len(each(result)[0])
