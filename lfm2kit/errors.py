"""The one error type that users see, and the exit codes of every command."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable
from reprlib import repr as brief  # of what a caller gives, however long it is
from typing import NamedTuple

# Exit codes.  After a signal it is 128 and the signal's number.
WRONG_RESULT = 1  # INVALID, or not finite
USER_ERROR = 2  # there is something for the user to change
BUG = 3  # neither the result's fault nor the user's

TRACEBACK = "LFM2KIT_TRACEBACK"  # set: errors show where they come from, for plugin writers
TRACEBACK_HINT = f"; its traceback: {TRACEBACK}=1"
LEAVE_OUT = "LFM2KIT_PLUGINS=NAME,... loads only the plugins that it names"


class Option(NamedTuple):
    """An option in a sentence, by the name of its field or argument; without a value, any value.

    Its text is the keyword argument `threads=8`, for users of Python.  The command line shows
    the flag instead: `--threads 8`.
    """

    name: str
    value: object = None

    def __str__(self) -> str:
        if self.value is None:
            return self.name
        is_text = isinstance(self.value, (str, os.PathLike))
        return f"{self.name}={repr(str(self.value)) if is_text else brief(self.value)}"


class Lfm2kitError(Exception):
    """An error for the user to correct: what was asked, what is there, what to type.

    Shown as a sentence without a traceback, with `USER_ERROR` as the exit code.  The sentence is
    given in parts where it names options: `Lfm2kitError(Option("threads", 8), ": 4 cores")`.
    """

    def __init__(self, *parts: str | Option) -> None:
        super().__init__(*parts)

    def __str__(self) -> str:
        return self.sentence()

    def sentence(self, option: Callable[[Option], str] = str) -> str:
        """Return the whole sentence, with each option as the function `option` writes it."""
        return "".join(option(p) if isinstance(p, Option) else str(p) for p in self.args)


def either(options: Iterable[Option]) -> list[str | Option]:
    """Return the parts of a sentence that offer these options: "a or b"."""
    parts = [part for option in options for part in (" or ", option)]
    return parts[1:]


def choices(asked: str, available: Iterable[str]) -> str:
    """Return the tail of an error about an unknown name: the nearest name, and all names."""
    names = sorted(available)
    nearest = difflib.get_close_matches(asked, names, n=1)
    hint = f". Did you mean '{nearest[0]}'?" if nearest else ""
    return f"available: {', '.join(names) or 'none'}{hint}"
