"""Keeps special tokens in users' text apart from those that a template writes.

Both are the same characters once a chat is rendered.  So users' tokens get a mark before the
template sees them: a character that nobody's text contains.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

MODEL = "assistant"  # the role whose messages are the model's own, tokens included


class PlainText:
    """A finder of special tokens in text."""

    def __init__(self, tokens: Iterable[str]) -> None:
        longest_first = sorted(tokens, key=len, reverse=True)
        self._any = _any_of(longest_first)
        self._start = re.compile(f"(?={self._any})")
        self._beginnings = {token[:n] for token in longest_first for n in range(1, len(token))}
        self._longest = max(map(len, longest_first), default=0)

    def marked(self, messages: Any, tools: Any) -> tuple[Any, Any, str]:
        """Return messages and tools with a mark before each special token, and the mark.

        The mark is empty if there are no such tokens.  Messages of the model are left as they are.
        """
        mark = _unused([messages, tools])

        def walked(value: Any) -> Any:
            if isinstance(value, str):
                return self._marked(value, mark)
            if isinstance(value, dict):
                return {walked(key): walked(item) for key, item in value.items()}
            return [walked(item) for item in value] if isinstance(value, (list, tuple)) else value

        marked = [m if _is_models(m) else walked(m) for m in messages], walked(tools)
        return (*marked, mark) if _contains(marked, mark) else (messages, tools, "")

    def parts(self, rendered: str, mark: str) -> list[str]:
        """Return a rendered chat cut at its own special tokens: text, token, text, ..., text."""
        rendered = rendered.replace(json.dumps(mark)[1:-1], mark)  # as JSON in ASCII has it
        parts = re.split(f"(?<!{mark})({self._any})", rendered)
        return [part.replace(mark, "") for part in parts]

    def _marked(self, text: str, mark: str) -> str:
        """Mark tokens, and a beginning of one at the end, which the template may complete."""
        starts = {found.start() for found in self._start.finditer(text)}
        tail = range(max(0, len(text) - self._longest + 1), len(text))
        starts |= {start for start in tail if text[start:] in self._beginnings}
        cuts = [0, *sorted(starts), len(text)]
        return mark.join(text[a:b] for a, b in pairwise(cuts))


def _any_of(longest_first: Iterable[str]) -> str:
    """Return a pattern of all tokens, those with the same first character together.

    Thousands of alternatives are only tried where the first characters match.
    """
    groups: dict[str, list[str]] = {}
    for token in longest_first:
        groups.setdefault(token[0], []).append(re.escape(token))
    return "|".join(f"(?:{'|'.join(group)})" for group in groups.values()) or "(?!)"


def _is_models(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == MODEL


def _contains(value: Any, mark: str) -> bool:
    return mark in json.dumps(value, ensure_ascii=False, default=str)


def _unused(value: Any) -> str:
    """Return a private character that is nowhere in `value`."""
    used = set(json.dumps(value, ensure_ascii=False, default=str))
    return next(c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in used)
