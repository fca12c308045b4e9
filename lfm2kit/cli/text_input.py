"""Reads the text that a command is given: an argument, or stdin where the argument is `-`."""

from __future__ import annotations

import sys

from lfm2kit import bounds
from lfm2kit.errors import Lfm2kitError

STDIN = "-"


def text_of(argument: str) -> str:
    """Return the text; raise `Lfm2kitError` if stdin is closed, too long or not UTF-8."""
    return _from_stdin() if argument == STDIN else argument


def _from_stdin() -> str:
    if sys.stdin is None:
        raise Lfm2kitError("stdin is closed; give the text as an argument, or open stdin")
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
