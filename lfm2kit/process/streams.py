"""A stdout and stderr that let the process go on when nothing can be printed.

A full disk is reported once, at the end, when the work is done and its files are written.  What is
printed to a stream that was closed before the start is dropped.  When the reader of a pipe has
left, as `head` does after its lines, the process ends silently, as SIGPIPE would end it.
"""

from __future__ import annotations

import codecs
import io
import os
import select
import signal
import sys
from typing import Any

READER_GONE = 128 + signal.SIGPIPE  # exit code
PLAIN = "lfm2kit.plain"  # the error handler of our streams' encodings


class ReaderGone(BaseException):
    """The loss of stdout's reader; no OSError, which libraries would turn into exit code 1."""


class Output(io.FileIO):
    """A stream's file descriptor.  It keeps its first error, and writes nothing afterwards."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.error: OSError | None = None
        self.ends_process = descriptor == 1  # when its reader is gone

    def write(self, data: Any) -> int:
        """Write `data`, or drops it; raise `ReaderGone` once if stdout has lost its reader."""
        if self.error is None:
            try:
                return self._written(data)
            except OSError as error:
                self.error = error
            if isinstance(self.error, BrokenPipeError) and self.ends_process:
                raise ReaderGone
        return len(data)

    def _written(self, data: Any) -> int:
        """Write `data`, and wait if another process has made the descriptor non-blocking."""
        while (count := super().write(data)) is None:
            select.select([], [self], [])
        return count


class Streams:
    """This process's stdout and stderr, from `take` to its last instruction."""

    def take(self) -> None:
        """Replace `sys.stdout` and `sys.stderr`."""
        _open_closed_descriptors()
        codecs.register_error(PLAIN, _plain)
        self._stdout = Output(1)
        sys.stdout = _text(self._stdout, sys.stdout)
        sys.stderr = _text(Output(2), sys.stderr)

    def conclude(self, code: int) -> int:
        """Return the exit code of the process, given its command's `code`."""
        from lfm2kit.errors import USER_ERROR, WRONG_RESULT

        self._stdout.ends_process = False
        sys.stdout.flush()
        if self._stdout.error is None or code not in (0, WRONG_RESULT):
            return code
        if isinstance(self._stdout.error, BrokenPipeError):
            return READER_GONE
        from lfm2kit.cli.console import complain

        complain(f"stdout: {self._stdout.error.strerror}; the result could not be printed")
        return code or USER_ERROR


def _open_closed_descriptors() -> None:
    """Open closed descriptors on /dev/null; else a file opened later would get what is printed."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def _text(output: Output, before: Any) -> io.TextIOWrapper:
    """Return a text stream like `before`, which is None if the descriptor was closed."""
    is_unbuffered = getattr(before, "write_through", False)
    return io.TextIOWrapper(
        io.BufferedWriter(output),
        encoding=getattr(before, "encoding", "utf-8"),
        errors=PLAIN,
        line_buffering=is_unbuffered or getattr(before, "line_buffering", False),
        write_through=is_unbuffered,
    )


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Return a replacement for characters that a stream's encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end].replace("±", "+-")
    return missing.encode("ascii", "backslashreplace").decode(), error.end
