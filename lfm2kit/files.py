"""Writing files so that a reader sees the old one or the new one, never half of it.

What is new is written beside its target, reaches the disk, and takes the target's place in one
step.  Where a file cannot be replaced so, the new content is complete before the old is touched.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lfm2kit.errors import Lfm2kitError
from lfm2kit.leftovers import beside, held, remove_leftovers

Note = Callable[[str], None]  # takes a sentence for the user

READER_WAIT = 10.0  # seconds that a pipe is given to find its reader
CANNOT_CREATE = (errno.EACCES, errno.EPERM, errno.EROFS)  # in a folder
CANNOT_REPLACE = (*CANNOT_CREATE, errno.EBUSY)  # a file: EBUSY where something is mounted on it
CHUNK = 1 << 20  # bytes copied at once
SYNC_SECONDS = 1.0
INSIDE = "new"  # the name that a partial folder goes by inside one that cannot be renamed


@contextmanager
def replaced(path: Path, note: Note = warnings.warn) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well, and vanishes if not.

    The old file's mode stays.  A link stays one: what it points to is replaced.  A file that has
    several hard links, or that cannot be renamed onto, is written in place, and `note` is told.
    A pipe or a device is written as it is; a pipe that finds no reader within `READER_WAIT` is an
    error.  Raises `Lfm2kitError` where the file cannot be written.
    """
    opened = _special(path, note) if _is_special(path) else _regular(path, note)
    try:
        with opened as file:
            yield file
    except OSError as error:
        raise Lfm2kitError(f"{path}: {error.strerror or error}") from error


@contextmanager
def replaced_folder(path: Path, note: Note = warnings.warn) -> Iterator[Path]:
    """The same for a folder: the old one stays until the new one is complete.

    A folder that cannot be renamed, because something is mounted on it or because the folder
    around it is not writable, gets the new files one by one instead, and `note` is told.
    """
    remove_leftovers_of_folder(path)
    cannot_move = os.path.isdir(path) and not _can_move(path)
    partial = beside(path / INSIDE if cannot_move else path, "partial")
    old = beside(path, "old")
    try:
        partial.mkdir()
        with held(partial):
            yield partial
            _keep_modes(path, partial)
            _sync_all(partial)
            if cannot_move:
                note(f"{path} cannot be renamed: its files are replaced one by one")
                _move_files(partial, path)
            else:
                _swap(partial, path, old)
        _sync(path.parent)
    except OSError as error:
        raise Lfm2kitError(f"{path}: {error.strerror or error}") from error
    finally:
        if os.path.isdir(old) and not os.path.exists(path):  # interrupted between the two
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """A new file in a folder that is being made; its content is on the disk when the block ends."""
    with path.open("wb") as file, _syncing(file):
        yield file
        file.flush()
        os.fsync(file.fileno())


def remove_leftovers_of_folder(path: Path) -> None:
    """Removes what killed runs left of a folder, beside it and inside it."""
    remove_leftovers(path)
    if os.path.isdir(path):
        remove_leftovers(path / INSIDE)


def check_target(option: str, path: Path) -> None:
    """`Lfm2kitError` where no file can come to be: better before the work than after it."""
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


def _check_regular(path: Path) -> None:
    """`OSError` where a file can be put neither beside `path` nor into it."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    can_write_in_place = os.path.isfile(path) and os.access(path, os.W_OK)
    if os.path.isfile(path) and not can_write_in_place and not _can_replace(path):
        raise OSError(errno.EACCES, "it cannot be written, and no other file can take its place")
    partial = beside(path, "partial")
    try:
        partial.touch()
        partial.unlink(missing_ok=True)  # other ranks try as well
    except OSError as error:
        if error.errno not in CANNOT_CREATE or not can_write_in_place:
            raise


def _can_replace(file: Path) -> bool:
    return file.stat().st_nlink == 1 and str(file) not in _mount_points()


def _is_special(path: Path) -> bool:
    return os.path.exists(path) and not os.path.isfile(path)  # not Path's: they may raise


@contextmanager
def _special(path: Path, note: Note) -> Iterator[BinaryIO]:
    """A pipe or a device, open for writing."""
    is_pipe = stat.S_ISFIFO(os.stat(path).st_mode)
    with open(_pipe_with_a_reader(path, note) if is_pipe else path, "wb") as file:
        yield file


def _pipe_with_a_reader(path: Path, note: Note) -> int:
    """Returns a descriptor to write to; without a time limit, an unread pipe would hang the run."""
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
        with _syncing(file):
            yield file
        file.flush()
        os.fsync(file.fileno())
        obstacle = _replace(path, file, partial)
        if obstacle:
            note(f"{path} is written in place: {obstacle}")
            _copy_into(path, file)


@contextmanager
def _staged(path: Path) -> Iterator[tuple[BinaryIO, Path | None]]:
    """A new file beside `path`; one without a name where only `path` itself can be written."""
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
    """Puts `partial` in the place of `path`, or returns a clause that says why it cannot."""
    if partial is None:
        return "its folder takes no new file"
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
    _sync(path.parent)
    return None


def _copy_into(path: Path, file: BinaryIO) -> None:
    """Copies the content of `file` over that of `path`, once the disk has room for all of it."""
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
    """Makes `target` at least `size` bytes long on the disk, or leaves it as it was."""
    before = target.seek(0, os.SEEK_END)
    target.seek(0)
    if size <= before:
        return
    try:
        os.posix_fallocate(target.fileno(), before, size - before)
    except OSError as error:
        target.truncate(before)
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # it cannot reserve: just write
            raise


def _can_move(folder: Path) -> bool:
    """Whether a folder can be renamed and another take its name."""
    return os.access(folder.parent, os.W_OK | os.X_OK) and str(folder) not in _mount_points()


def _mount_points() -> set[str]:
    """Linux's list of them; `os.path.ismount` misses folders bound from the same file system."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return set()
    escaped = (line.split()[4] for line in lines)  # a space as \040
    return {os.fsdecode(path.decode("unicode_escape").encode("latin-1")) for path in escaped}


def _keep_modes(old: Path, new: Path) -> None:
    """Gives a new folder, and every file in it, the mode that one of the same name has in `old`."""
    for path in [new, *new.rglob("*")]:
        before = old / path.relative_to(new)
        if before.exists():
            path.chmod(stat.S_IMODE(before.stat().st_mode))


def _swap(partial: Path, path: Path, old: Path) -> None:
    if os.path.exists(path):
        path.rename(old)
    partial.rename(path)


def _move_files(partial: Path, folder: Path) -> None:
    """Puts the files of `partial` into `folder` in place of those that are there."""
    outdated = [p for p in folder.rglob("*") if p.is_file() and not p.is_relative_to(partial)]
    for new in [p for p in partial.rglob("*") if p.is_file()]:
        target = folder / new.relative_to(partial)
        target.parent.mkdir(exist_ok=True, parents=True)
        new.replace(target)
        outdated = [path for path in outdated if path != target]
    for path in outdated:
        path.unlink()
    _sync(folder)


@contextmanager
def _syncing(file: BinaryIO) -> Iterator[None]:
    """Sends to the disk what is written, all along: a large file leaves little for the end."""
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
    syncing.result()  # an error of the disk is reported to one call alone


def _sync_all(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        _sync(path)


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk.

    After a rename without it, a power failure may leave the new name with no content.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder that may be written but not listed
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not know this for folders
            raise
    finally:
        os.close(descriptor)
