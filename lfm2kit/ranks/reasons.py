"""Says why a rank ends its job, for everybody who waits for it."""

from __future__ import annotations

from collections.abc import Callable

from lfm2kit.errors import BUG, USER_ERROR, Lfm2kitError
from lfm2kit.process.interrupts import exit_code
from lfm2kit.process.streams import READER_GONE, ReaderGone, StdoutFailed


def reason(error: BaseException, told: Callable[[Lfm2kitError], str] = str) -> tuple[int, str]:
    """Return the exit code and a sentence for what was raised on a rank.

    `told` returns the sentence of an error for the user to correct.
    """
    if isinstance(error, Lfm2kitError):
        return USER_ERROR, told(error)
    if isinstance(error, KeyboardInterrupt):
        return exit_code(error), "interrupted"
    if isinstance(error, ReaderGone):
        return READER_GONE, "nobody reads its output any more"
    if isinstance(error, StdoutFailed):
        return USER_ERROR, error.said
    if isinstance(error, SystemExit):
        return BUG, f"sys.exit({error.code!r}) was called"
    said = f"{type(error).__name__}: {error}".rstrip(": ").partition("\n")[0]
    if isinstance(error, MemoryError):
        return USER_ERROR, f"out of memory ({said})"
    return BUG, said
