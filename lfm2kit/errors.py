"""The one error type that users see: a sentence, no traceback, exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Lfm2kitError(Exception):
    """What the user must change; says what was asked, what is there, what to type."""


def choices(asked: str, available: Iterable[str]) -> str:
    """The tail of an error about an unknown name: what there is, and the nearest of it."""
    names = sorted(available)
    nearest = difflib.get_close_matches(asked, names, n=1)
    hint = f". Did you mean '{nearest[0]}'?" if nearest else ""
    return f"there is: {', '.join(names) or 'nothing'}{hint}"
