"""A page of memory in which a rank writes what it is doing, for a hub on the same machine.

Steps follow each other faster than they can be sent.  The page holds the last one, even if the
process is dead, stopped, or keeps Python's lock.  It has no name, and is freed with its readers.
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from functools import lru_cache
from typing import Protocol

SIZE = 256  # bytes: longer words are cut


class Page(Protocol):
    """A place where a rank writes what it is doing."""

    fd: int  # -1 where no other process can read it

    def write(self, words: str) -> None: ...


class SharedPage:
    def __init__(self) -> None:
        self.fd = os.memfd_create("lfm2kit-step")
        os.ftruncate(self.fd, SIZE)
        self._memory = mmap.mmap(self.fd, SIZE)

    def write(self, words: str) -> None:
        self._memory[:] = _padded(words)


class NoPage:
    """A page for systems without such memory, where the hub knows only what was last sent."""

    fd = -1

    def write(self, words: str) -> None:
        pass


def new_page() -> Page:
    return SharedPage() if hasattr(os, "memfd_create") else NoPage()


class Reader:
    """The page of another process of this machine."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    def read(self) -> str:
        return self._memory[:].rstrip(b"\0").decode(errors="replace")


def reader_of(pid: int, fd: int) -> Reader | None:
    """Return the page that the process `pid` has open as `fd`; None if it cannot be read."""
    with suppress(OSError, ValueError):
        page = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY)
        try:
            return Reader(mmap.mmap(page, SIZE, prot=mmap.PROT_READ))
        finally:
            os.close(page)
    return None


@lru_cache(maxsize=4096)
def _padded(words: str) -> bytes:
    return words.encode()[:SIZE].ljust(SIZE, b"\0")
