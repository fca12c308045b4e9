"""Reads the text that a command is given: an argument, or stdin where the argument is `-`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lfm2kit import bounds
from lfm2kit.errors import Lfm2kitError

STDIN = "-"


def text_of(argument: str) -> str:
    """Return the text; raise `Lfm2kitError` if stdin cannot be read, is too long or not UTF-8."""
    return _from_stdin() if argument == STDIN else argument


@contextmanager
def readable() -> Iterator[None]:
    """Raise `Lfm2kitError` if stdin cannot be read inside: it may be open for writing only."""
    try:
        yield
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise Lfm2kitError(f"stdin cannot be read: {why}; give a file or a pipe") from None


def _from_stdin() -> str:
    if sys.stdin is None:
        raise Lfm2kitError("stdin is closed; give the text as an argument, or open stdin")
    with readable():
        data = sys.stdin.buffer.read(bounds.TEXT + 1)
    if len(data) > bounds.TEXT:
        raise Lfm2kitError(f"stdin has more than the {bounds.TEXT} bytes that lfm2kit reads")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise Lfm2kitError(
            f"stdin is not UTF-8: byte 0x{byte:02x} at {error.start} ({error.reason}); convert it"
        ) from None
