"""The one error type that users see, and the exit codes of every command."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Exit codes.  After a signal it is 128 and the signal's number.
WRONG_RESULT = 1  # INVALID, or not finite
USER_ERROR = 2  # there is something for the user to change
BUG = 3  # neither the result's fault nor the user's

TRACEBACK = "LFM2KIT_TRACEBACK"  # set: errors show where they come from, for plugin writers
TRACEBACK_HINT = f"; its traceback: {TRACEBACK}=1"
LEAVE_OUT = "LFM2KIT_PLUGINS=NAME,... loads only the plugins that it names"


class Lfm2kitError(Exception):
    """What the user must change; says what was asked, what is there, what to type.

    Shown as a sentence without a traceback, with `USER_ERROR` as the exit code.
    """


def choices(asked: str, available: Iterable[str]) -> str:
    """The tail of an error about an unknown name: what there is, and the nearest of it."""
    names = sorted(available)
    nearest = difflib.get_close_matches(asked, names, n=1)
    hint = f". Did you mean '{nearest[0]}'?" if nearest else ""
    return f"there is: {', '.join(names) or 'nothing'}{hint}"
