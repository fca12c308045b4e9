"""Makes sure that written data reaches the disk, and lists what is mounted where."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

SYNC_SECONDS = 1.0


class Mount(NamedTuple):
    """A line of Linux's /proc/self/mountinfo."""

    inside: str  # the mounted folder, within its file system
    point: str  # where it is mounted
    kind: str  # "ext4"
    options: str  # of the file system


def mounts(root: Path = Path("/")) -> Iterator[Mount]:
    """Yield all mounts that Linux lists below `root`; none on other systems."""
    try:
        lines = os.fsdecode((root / "proc/self/mountinfo").read_bytes()).split("\n")
    except OSError:
        return
    for line in filter(None, lines):
        before, _, after = line.partition(" - ")
        inside, point = map(_unescaped, before.split(" ")[3:5])
        kind, _, options = after.split(" ", 2)
        yield Mount(inside, point, kind, options)


def mount_points() -> set[str]:
    """Return all mount points; `os.path.ismount` misses mounts within one file system."""
    return {mount.point for mount in mounts()}


def _unescaped(field: str) -> str:
    r"""Decode a path from mountinfo, which writes a blank as \040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


@contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file whose content is on the disk when the `with` block ends."""
    with path.open("wb") as file, syncing(file):
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def syncing(file: BinaryIO) -> Iterator[None]:
    """Send data to the disk while it is written, so that little is left for the end."""
    is_done = threading.Event()

    def sync() -> None:
        while not is_done.wait(SYNC_SECONDS):
            os.fsync(file.fileno())

    with ThreadPoolExecutor(1) as pool:
        syncing = pool.submit(sync)
        try:
            yield
        finally:
            is_done.set()
    syncing.result()  # the disk reports an error to only one call


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk.

    After a rename without it, a power failure may leave the new name with no content.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder that may be written but not listed
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # this file system cannot sync folders
            raise
    finally:
        os.close(descriptor)
