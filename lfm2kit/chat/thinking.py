"""Splits a model's text into its answer and its thoughts, between `<think>` and `</think>`."""

from __future__ import annotations

from typing import NamedTuple

from lfm2kit.chat.matching import Finder

TAGS = BEGIN, END = "<think>", "</think>"  # some tokenizers have them as special tokens


class Part(NamedTuple):
    """A piece of text, without tags."""

    text: str
    is_thought: bool


class Thinking:
    """A splitter of a text that comes in pieces, which may cut a tag anywhere.

    `begun` says that the text begins within a thought (`begins_in_thought`).  A closing tag outside
    a thought, and an opening one inside, are text.  A thought may lack its end.
    """

    def __init__(self, begun: bool = False) -> None:
        self._enter(begun)

    def push(self, piece: str) -> list[Part]:
        """Return the parts that are certain after the next piece, none of them empty."""
        parts = []
        found = self._tag.feed(piece)
        while found.string is not None:
            parts.append(Part(found.before, self._inside))
            self._enter(not self._inside)
            found = self._tag.feed(found.after)
        parts.append(Part(found.before, self._inside))
        return [part for part in parts if part.text]

    def finish(self) -> list[Part]:
        """Return what was held back because a tag might have followed."""
        rest = Part(self._tag.rest(), self._inside)
        return [rest] if rest.text else []

    def _enter(self, inside: bool) -> None:
        self._inside = inside
        self._tag = Finder([END if inside else BEGIN])


def begins_in_thought(prompt: str) -> bool:
    """Return whether a prompt ends with an opening tag, so that the model's text is a thought."""
    return prompt.rstrip().endswith(BEGIN)
