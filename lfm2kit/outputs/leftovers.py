"""Names partial files, and removes those of killed runs when the same target is written again.

A file or folder that is being written is called `.NAME.PID-TOKEN.partial`, and its writer holds a
lock on it.  The lock shows whether the writer is alive, even on another machine or in another
container that shares the folder.  The random token distinguishes writers with equal process ids.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LONGEST_NAME = 255  # bytes of a file's name on most systems
LONGEST_STEM = 220  # bytes of it that a partial file's name keeps


def beside(path: Path, ending: str) -> Path:
    """Return a new name beside `path`, for its partial successor or for the old one."""
    return path.with_name(f".{_stem(path)}.{os.getpid()}-{secrets.token_hex(4)}.{ending}")


def _stem(path: Path) -> str:
    """Return the name of `path`, or a shorter one if it leaves no room for more.

    A name that is itself too long is returned unchanged, so that writing fails before the work.
    """
    name = os.fsencode(path.name)
    if not LONGEST_STEM < len(name) <= LONGEST_NAME:
        return path.name
    digest = hashlib.sha256(name).hexdigest()[:16]
    return name[: LONGEST_STEM - 17].decode(errors="ignore") + f"~{digest}"


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a lock on a partial file or folder, if the file system has locks."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(path: Path) -> None:
    """Remove the partial files that killed runs of this user left beside `path`.

    If such a run was killed while it exchanged folders, the old folder gets its name back.
    """
    pattern = re.compile(re.escape(f".{_stem(path)}.") + r"(\d{1,9})-[0-9a-f]{8}\.(partial|old)")
    with suppress(OSError):
        for name in os.listdir(path.parent):
            found = pattern.fullmatch(name)
            if found and _is_abandoned(leftover := path.with_name(name), int(found[1])):
                _remove(leftover, path, is_old=found[2] == "old")


def _remove(leftover: Path, path: Path, *, is_old: bool) -> None:
    if is_old and not os.path.lexists(path):
        leftover.rename(path)
    elif leftover.is_dir():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink()


def _is_abandoned(leftover: Path, pid: int) -> bool:
    """Return whether the leftover's writer, a process of this user, has ended."""
    if leftover.is_symlink() or leftover.stat().st_uid != os.geteuid():
        return False
    if pid != os.getpid() and _is_alive(pid):
        return False
    descriptor = os.open(leftover, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by a writer elsewhere?
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True
