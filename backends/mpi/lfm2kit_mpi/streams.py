"""Separates what a rank's C libraries print from what its Python code prints.

MPI's libraries may write warnings to stdout, where a result is expected.  So file descriptor 1 is
redirected to stderr, and Python's `sys.stdout` takes another way.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from lfm2kit_mpi.watch import Watch


def through_the_hub(watch: Watch) -> None:
    """Send what Python prints to the process that started the job, which prints it."""
    sys.stdout = _relayed(watch, "stdout", sys.stdout)
    sys.stderr = _relayed(watch, "stderr", sys.stderr)


def apart() -> None:
    """Redirect C code's stdout to stderr, and leave Python's stdout as it is."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(  # noqa: SIM115  (for as long as this process lives)
        kept, "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors
    )


def take_stdin(pid: str | None) -> None:
    """Read what process `pid` of this machine has as stdin, from where it stands.

    Without one, or where it has none, Python's stdin is closed.
    """
    process = Path("/proc", str(pid))
    try:
        opened = os.open(process / "fd" / "0", os.O_RDONLY)
        place = int((process / "fdinfo" / "0").read_text().split()[1])
    except OSError:
        sys.stdin = None
        return
    with suppress(OSError):  # a pipe has no places
        os.lseek(opened, place, os.SEEK_SET)
    os.dup2(opened, 0)
    os.close(opened)


class Relay(io.RawIOBase):
    """A stream whose bytes another process writes."""

    def __init__(self, watch: Watch, name: str) -> None:
        self._watch = watch
        self._name = name

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._watch.send(stream=self._name, text=bytes(data).decode("latin-1"))
        return len(data)


def _relayed(watch: Watch, name: str, like: TextIO) -> io.TextIOWrapper:
    like.flush()
    relay = io.BufferedWriter(Relay(watch, name))
    return io.TextIOWrapper(relay, like.encoding, like.errors, line_buffering=True)
