"""Writes files so that a reader sees the old one or the new one, never half of it.

A new file is written beside its target, reaches the disk, and replaces the target in one step.  If
a file cannot be replaced in this way, the new content is complete before the old is touched.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lfm2kit.errors import Lfm2kitError
from lfm2kit.outputs.disk import mount_points, sync, syncing
from lfm2kit.outputs.leftovers import beside, held, remove_leftovers

Note = Callable[[str], None]  # takes a sentence for the user

READER_WAIT = 10.0  # seconds that a pipe is given to find its reader
CANNOT_CREATE = (errno.EACCES, errno.EPERM, errno.EROFS)  # of a new file in a folder
CANNOT_REPLACE = (*CANNOT_CREATE, errno.EBUSY)  # EBUSY: something is mounted on it
CHUNK = 1 << 20  # bytes copied at once
ROOM = 1 << 16  # bytes that a disk must have free before the work begins


@contextmanager
def replaced(path: Path, note: Note = warnings.warn) -> Iterator[BinaryIO]:
    """Yield a new file that replaces `path` when the block ends well, and is removed if not.

    The old file's mode is kept.  If `path` is a link, its target is replaced.  A file with several
    hard links, or one that cannot be replaced, is written in place, and `note` is called with a
    sentence.  A pipe or a device is written directly; a pipe without a reader within `READER_WAIT`
    is an error.  Raise `Lfm2kitError` if the file cannot be written.
    """
    opened = _special(path, note) if _is_special(path) else _regular(path, note)
    try:
        with opened as file:
            yield file
    except OSError as error:
        raise Lfm2kitError(f"{path}: {error.strerror or error}") from error


def check_target(option: str, path: Path) -> None:
    """Raise `Lfm2kitError` if `path` cannot be written, so that this shows before the work.

    A disk without `ROOM` left is full; one that fills up during the work shows only at its end.
    """
    if os.path.isdir(path):
        raise Lfm2kitError(f"{option} {path}: this is a folder")
    try:
        if _is_special(path):
            _check_special(path)
        else:
            _check_regular(Path(os.path.realpath(path)))
    except OSError as error:
        raise Lfm2kitError(f"{option} {path}: {error.strerror}") from None


def _check_special(path: Path) -> None:
    mode = os.stat(path).st_mode
    if not stat.S_ISFIFO(mode) and not stat.S_ISCHR(mode):
        raise OSError(errno.EINVAL, "this is neither a file nor a pipe nor a terminal")
    if stat.S_ISCHR(mode):
        _check_device(path)


def _check_device(path: Path) -> None:
    """Raise `OSError` if a device takes no bytes, as /dev/full does; write none to any other."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        os.write(descriptor, b"")
    finally:
        os.close(descriptor)


def _check_regular(path: Path) -> None:
    """Raise `OSError` if a file can be written neither beside `path` nor into it."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    can_write_in_place = os.path.isfile(path) and os.access(path, os.W_OK)
    if os.path.isfile(path) and not can_write_in_place and not _can_replace(path):
        raise OSError(errno.EACCES, "it cannot be written, and no other file can take its place")
    partial = beside(path, "partial")
    try:
        with partial.open("wb") as file:
            _reserve(file, ROOM)
    except OSError as error:
        if error.errno not in CANNOT_CREATE or not can_write_in_place:
            raise
    finally:
        with suppress(OSError):  # other ranks try as well
            partial.unlink()


def _can_replace(file: Path) -> bool:
    return file.stat().st_nlink == 1 and str(file) not in mount_points()


def _is_special(path: Path) -> bool:
    return os.path.exists(path) and not os.path.isfile(path)  # not Path's: they may raise


@contextmanager
def _special(path: Path, note: Note) -> Iterator[BinaryIO]:
    """Yield a pipe or a device that is open for writing."""
    is_pipe = stat.S_ISFIFO(os.stat(path).st_mode)
    with open(_pipe_with_a_reader(path, note) if is_pipe else path, "wb") as file:
        yield file


def _pipe_with_a_reader(path: Path, note: Note) -> int:
    """Return a descriptor to write to; raise `OSError` if nobody opens the pipe for reading."""
    deadline = time.monotonic() + READER_WAIT
    noted = False
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        else:
            os.set_blocking(descriptor, True)
            return descriptor
        if time.monotonic() >= deadline:
            raise OSError(errno.ENXIO, "nobody reads this pipe; start its reader first")
        if not noted:
            note(f"{path}: waiting for a reader of this pipe, {READER_WAIT:g} s at most")
            noted = True
        time.sleep(0.05)


@contextmanager
def _regular(path: Path, note: Note) -> Iterator[BinaryIO]:
    path = Path(os.path.realpath(path))
    remove_leftovers(path)
    with _staged(path) as (file, partial):
        with syncing(file):
            yield file
        file.flush()
        os.fsync(file.fileno())
        obstacle = _replace(path, file, partial)
        if obstacle:
            note(f"{path} is written in place: {obstacle}")
            _copy_into(path, file)


@contextmanager
def _staged(path: Path) -> Iterator[tuple[BinaryIO, Path | None]]:
    """Yield a new file beside `path`, or a nameless one if only `path` itself can be written."""
    partial = beside(path, "partial")
    try:
        file = partial.open("w+b")
    except OSError as error:
        if error.errno not in CANNOT_CREATE or not os.path.isfile(path):
            raise
        with tempfile.TemporaryFile() as nameless:
            yield nameless, None
        return
    try:
        with file, held(partial):
            yield file, partial
    finally:  # Ctrl-C as well
        with suppress(OSError):
            partial.unlink()


def _replace(path: Path, file: BinaryIO, partial: Path | None) -> str | None:
    """Replace `path` by `partial`, or return a clause that says why that is impossible."""
    if partial is None:
        return "no new file can be made in its folder"
    old = os.stat(path) if os.path.exists(path) else None
    if old is not None:
        if old.st_nlink > 1:
            return f"it has {old.st_nlink} names (hard links)"
        with suppress(OSError):  # a file of someone else's becomes ours
            os.fchown(file.fileno(), old.st_uid, old.st_gid)
        os.fchmod(file.fileno(), stat.S_IMODE(old.st_mode))
    try:
        partial.replace(path)
    except OSError as error:
        if old is None or error.errno not in CANNOT_REPLACE:
            raise
        return f"it cannot be replaced ({error.strerror})"
    sync(path.parent)
    return None


def _copy_into(path: Path, file: BinaryIO) -> None:
    """Copy the content of `file` into `path`, once space for all of it is reserved."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    with open(path, "r+b") as target:
        _reserve(target, size)
        try:
            shutil.copyfileobj(file, target, CHUNK)
            target.truncate()
            target.flush()
            os.fsync(target.fileno())
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; the file is now incomplete") from error


def _reserve(target: BinaryIO, size: int) -> None:
    """Make `target` at least `size` bytes long on the disk, or leave it unchanged."""
    before = target.seek(0, os.SEEK_END)
    target.seek(0)
    if size <= before:
        return
    try:
        os.posix_fallocate(target.fileno(), before, size - before)
    except OSError as error:
        target.truncate(before)
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # it cannot reserve space
            raise
