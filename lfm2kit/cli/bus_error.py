"""Turns a bus error into one line and exit code 2; without this the process would die silently.

The system sends SIGBUS to a thread that reads a mapped file beyond its new, shorter end.  The
checks before each block and after each batch (`lfm2kit.checkpoint.mapped`) cannot exclude that.
The thread may be one of OpenMP's and hold any lock, so only system calls are safe in the handler.
It consists of a few bytes of machine code that write the line and exit.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import platform
import signal
import struct
import sys
from pathlib import Path

WRITE_AND_EXIT = (
    b"\xb8\x01\x00\x00\x00"  # mov eax, 1 (write)
    b"\xbf\x02\x00\x00\x00"  # mov edi, 2 (stderr)
    b"\x48\x8d\x35\x13\x00\x00\x00"  # lea rsi, [rip + 19]: the line, which follows the code
    b"\xba%s"  # mov edx, its length
    b"\x0f\x05"  # syscall
    b"\xb8\xe7\x00\x00\x00"  # mov eax, 231 (exit_group)
    b"\xbf\x02\x00\x00\x00"  # mov edi, 2
    b"\x0f\x05"  # syscall
)
LONGEST = 300  # characters of a path

_code: mmap.mmap | None = None  # must outlive the process's last bus error


def explain_bus_errors(model: Path) -> None:
    """Make bus errors say that a file of `model` changed.

    Do nothing on processors other than x86-64, or if memory may not be executable.
    """
    global _code
    if (sys.platform, platform.machine()) != ("linux", "x86_64") or faulthandler.is_enabled():
        return
    line = (
        f"lfm2kit: error: {ascii(str(model))[1:-1][:LONGEST]}: a file was cut short while it was "
        "in use, or cannot be read (or /dev/shm is full); run again, and put a new file in its "
        "place by renaming it (mv), not by writing into it (cp)\n"
    ).encode()
    try:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return
    code.write(WRITE_AND_EXIT % struct.pack("<I", len(line)) + line)
    handle = ctypes.CDLL(None).signal
    handle.argtypes, handle.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    handle(signal.SIGBUS, ctypes.addressof(ctypes.c_char.from_buffer(code)))
    _code = code
