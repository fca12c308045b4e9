"""Finds the first of several strings in a text that comes in pieces, in linear time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Found(NamedTuple):
    """What is known after a piece: `before` is part of no string, `after` follows the one found."""

    before: str
    string: str | None
    after: str


class Finder:
    """A search for the string that is complete first; of two that end together, the longer one.

    The result does not depend on how the text is cut into pieces.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._matches = [_Match(string) for string in strings]
        self._held = ""  # the longest end of the text that one of the strings may begin with

    def feed(self, piece: str) -> Found:
        """Return what the next piece of the text makes certain; begin anew after a string."""
        if not self._matches:
            return Found(piece, None, "")
        text, seen = self._held + piece, len(self._held)
        for end, character in enumerate(piece, seen + 1):
            complete = [m.string for m in self._matches if m.goes_on(character)]
            if complete:
                string = max(complete, key=len)
                self.rest()
                return Found(text[: end - len(string)], string, text[end:])
        held = max((match.length for match in self._matches), default=0)
        self._held = text[len(text) - held :]
        return Found(text[: len(text) - held], None, "")

    def rest(self) -> str:
        """Return what is still held when the text ends, and begin anew."""
        held, self._held = self._held, ""
        for match in self._matches:
            match.length = 0
        return held


class _Match:
    """The length of a string's longest beginning that ends the text so far (Knuth-Morris-Pratt)."""

    def __init__(self, string: str) -> None:
        self.string = string
        self.length = 0
        self._shorter = [0, 0]  # for each length, that of the next shorter such beginning
        for character in string[1:]:
            self._shorter.append(self._extended(self._shorter[-1], character))

    def goes_on(self, character: str) -> bool:
        """Take the text's next character; return whether the string is complete with it."""
        self.length = self._extended(self.length, character)
        return self.length == len(self.string)

    def _extended(self, length: int, character: str) -> int:
        while length and self.string[length] != character:
            length = self._shorter[length]
        return length + (self.string[length] == character)
