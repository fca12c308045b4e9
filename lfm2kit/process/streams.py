"""A stdout whose failure ends the command at once, and a stderr whose failure ends nothing.

Work whose result cannot be printed is not done: a full disk, or a stdout that was closed before the
start, is one line and exit code 2.  When the reader of a pipe has left, as `head` does after its
lines, the process ends silently, as SIGPIPE would end it.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import signal
import sys
from typing import Any

READER_GONE = 128 + signal.SIGPIPE  # exit code
PLAIN = "lfm2kit.plain"  # the error handler of our streams' encodings


class StdoutFailed(BaseException):
    """The end of what stdout takes; no OSError, which libraries would turn into exit code 1."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.said = f"stdout: {error.strerror}; the result could not be printed"
        if error.errno == errno.EBADF:
            self.said = "stdout is closed, and the result could not be printed; open it"


class ReaderGone(StdoutFailed):
    """The loss of stdout's reader."""

    def __init__(self) -> None:
        super().__init__(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))


class Output(io.FileIO):
    """A stream's file descriptor.  It keeps its first error, and writes nothing afterwards."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.error: OSError | None = None
        self.ends_process = descriptor == 1  # when it fails

    def write(self, data: Any) -> int:
        """Write `data`, or drop it; raise `StdoutFailed` once if it is stdout, and fails."""
        if self.error is None:
            try:
                return self._written(data)
            except OSError as error:
                self.error = error
            if self.ends_process:
                raise ReaderGone if self.reader_is_gone else StdoutFailed(self.error)
        return len(data)

    @property
    def reader_is_gone(self) -> bool:
        return isinstance(self.error, BrokenPipeError)

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
        if self._stdout.reader_is_gone:
            return READER_GONE
        from lfm2kit.cli.console import complain

        complain(StdoutFailed(self._stdout.error).said)
        return code or USER_ERROR


def _open_closed_descriptors() -> None:
    """Open closed descriptors on /dev/null; else a file opened later would get what is printed.

    Nothing can be written to a stdout that was closed, here and in processes that inherit it.
    """
    for descriptor, how in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_RDWR)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, how)  # the lowest number that is free


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
