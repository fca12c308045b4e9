"""Keeps compiled kernels from run to run.

lfm2kit runs without the cache, too: kernels that cannot be read are compiled again, and kernels
that cannot be kept are compiled for this run only, with one line on stderr.  Kept kernels are code,
so a folder or a file is used only if it belongs to this user, to root or to the owner of the
installation, and if nobody else may write to it.  Every file has a checksum of its name and its
contents.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from lfm2kit import progress
from lfm2kit.text import printable

VARIABLE = "LFM2KIT_CACHE_DIR"
ENDING, PARTIAL = ".kernel", ".partial"
HEADER = b"lfm2kit kernel 1\n"
UNUSED_SECONDS = 90 * 24 * 3600
ABANDONED_SECONDS = 24 * 3600  # a partial file of a process that was killed
TURN_SECONDS = 30.0


class UnusableError(Exception):
    """A folder or a file that is not used; the message says why in a few words."""


class KernelCache:
    """The compiled kernels of one backend, by name, in a folder of their own.

    The folder is `$LFM2KIT_CACHE_DIR/BACKEND`, or else `lfm2kit/BACKEND` below `$XDG_CACHE_HOME`
    or `~/.cache`.  A name consists of letters, digits and `.-_`, and has to change with everything
    that the machine code depends on: sources, compiler, options, and the processor.

    No method raises because of what is or is not in the folder.
    """

    seconds: ClassVar[float] = 0.0  # that all turns of this process have taken

    def __init__(self, backend: str) -> None:
        self.keeps = True  # until keeping a kernel fails
        self._backend = backend
        self._descriptor: int | None = None  # of the folder, once it is there and trusted
        self._is_refused = self._has_cleaned_up = self._has_met_damage = False

    @property
    def folder(self) -> Path | None:
        """Return the folder that kernels are kept in; None if there is no home folder."""
        root = root_folder()
        return root / self._backend if root is not None else None

    def read(self, name: str) -> bytes | None:
        """Return the bytes that were written under `name`; None if there are none to use."""
        if (descriptor := self._opened()) is None:
            return None
        try:
            return _read(descriptor, name)
        except FileNotFoundError:
            return None
        except (OSError, UnusableError) as error:
            self.discard(name, _reason(error))
            return None

    def has(self, name: str) -> bool:
        """Return whether a file exists under `name`, damaged or not."""
        descriptor = self._opened()
        return descriptor is not None and os.access(name + ENDING, os.F_OK, dir_fd=descriptor)

    def discard(self, name: str, reason: str) -> None:
        """Remove a kernel that cannot be used, and say so the first time."""
        if self._descriptor is not None:
            with suppress(OSError):
                os.unlink(name + ENDING, dir_fd=self._descriptor)
        if not self._has_met_damage:
            self._has_met_damage = True
            path = _quoted(f"{self.folder}/{name}{ENDING}")
            self.say(f"{path} cannot be used ({reason}); such kernels are compiled again")

    def write(self, name: str, data: bytes) -> None:
        """Keep `data` under `name`; if that fails, say so the first time."""
        if not self.keeps:
            return
        try:
            if (descriptor := self._made()) is not None:
                _write(descriptor, name, data)
        except OSError as error:
            self._keep_no_more(f"{_quoted(self.folder)} cannot be written ({_reason(error)})")

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Let one process at a time compile a missing kernel, while the others wait.

        Inside, look again whether the kernel is there before compiling it.  Nobody waits for more
        than half a minute, or at all if the file system has no locks: it does no harm if several
        processes compile the same kernel.  A missing kernel is a step: a watched rank may wait for
        many of them, one after the other.
        """
        start = time.monotonic()
        give_up = start + TURN_SECONDS
        is_missing = not self.has(name)
        label = name.rpartition("-")[0] or name  # without a hash
        if is_missing:
            progress.step(f"waiting for kernel {label}", progress.COMPILING)
        with suppress(OSError):
            descriptor = self._made() if is_missing else None
            while descriptor is not None and not locked(descriptor):
                if self.has(name) or time.monotonic() > give_up:
                    break
                time.sleep(0.02)
        try:
            yield
            if is_missing:
                progress.step(f"kernel {label} is ready")
        finally:
            if self._descriptor is not None:
                with suppress(OSError):
                    fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            KernelCache.seconds += time.monotonic() - start

    def _opened(self) -> int | None:
        """Return a descriptor of the folder; None if there is no folder that can be trusted."""
        if self._descriptor is None and not self._is_refused:
            try:
                self._descriptor = _open_folder(root_folder(), self._backend)
            except FileNotFoundError:
                pass
            except UnusableError as error:
                self._is_refused = True
                self._keep_no_more(str(error))
        return self._descriptor

    def _made(self) -> int | None:
        """Return what `_opened` does, but makes a missing folder first; raise `OSError`."""
        if self._opened() is None and (root := root_folder()) is not None and not self._is_refused:
            make_folder(root, self._backend)
        if (descriptor := self._opened()) is not None and not self._has_cleaned_up:
            self._has_cleaned_up = True
            _remove_unused(descriptor)
        return descriptor

    def _keep_no_more(self, reason: str) -> None:
        if self.keeps:
            self.keeps = False
            self.say(
                f"{reason}, so kernels are compiled for this run only; "
                f"{VARIABLE} can name another folder"
            )

    def say(self, sentence: str) -> None:
        """Print a line about this backend's kernels on stderr, if the process has one."""
        if sys.stderr is not None:
            with suppress(OSError, ValueError):  # of a stream that is closed, or on a full disk
                print(f"{self._backend}: {printable(sentence)}", file=sys.stderr, flush=True)


def root_folder() -> Path | None:
    """Return the folder that holds one folder per backend; None if there is no home."""
    if named := os.environ.get(VARIABLE):
        return Path(os.path.expanduser(named))  # a Dockerfile's ENV does not expand ~
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # which the XDG specification says to ignore
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            return None
    return base / "lfm2kit" if base.is_absolute() else None


def _open_folder(root: Path | None, backend: str) -> int:
    """Return a descriptor of the backend's folder, after checking who may write there.

    Files are then opened relative to the descriptor, so nobody can exchange the folder meanwhile.
    """
    if root is None:
        raise UnusableError("there is no home folder")
    path, descriptor = root, None
    try:
        above = os.stat(root)
        _check_trust(_quoted(root), above, is_sticky=bool(above.st_mode & stat.S_ISVTX))
        path = root / backend
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        _check_trust(_quoted(path), os.fstat(descriptor))
        return descriptor
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnusableError(f"{_quoted(path)} cannot be opened ({_reason(error)})") from None
    except UnusableError:
        if descriptor is not None:
            os.close(descriptor)
        raise


def _check_trust(what: str, status: os.stat_result, *, is_sticky: bool = False) -> None:
    """Raise `UnusableError` if somebody who is not trusted may have written the file or folder."""
    if status.st_uid not in {os.geteuid(), *_trusted_by_all()}:
        raise UnusableError(f"{what} belongs to user {status.st_uid}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_sticky:
        raise UnusableError(
            f"{what} can be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
        )


def check_kept(path: Path) -> None:
    """Raise `UnusableError` if a folder or a file below the root folder is not used here.

    Nothing is followed or opened: it may be a link or a pipe.  What is not there is all right.
    """
    try:
        status = os.lstat(path)
    except OSError:
        return
    if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
        raise UnusableError(f"{_quoted(path)} is neither a file nor a folder")
    _check_trust(_quoted(path), status)


def _trusted_by_all() -> set[int]:
    """Return the user ids of root and of the owner of the installation."""
    return {0, os.stat(__file__).st_uid}


def make_folder(root: Path, backend: str) -> None:
    """Make a private folder, or a readable one if it was named and everybody trusts its owner."""
    is_shared = bool(os.environ.get(VARIABLE)) and os.geteuid() in _trusted_by_all()
    mode = 0o755 if is_shared else 0o700
    root.parent.mkdir(parents=True, exist_ok=True)
    for path in (root, root / backend):
        with suppress(FileExistsError):
            path.mkdir(mode)
            if is_shared:
                path.chmod(mode)  # whatever the umask


def _read(folder: int, name: str) -> bytes:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    with open(os.open(name + ENDING, flags, dir_fd=folder), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UnusableError("it is not a file")
        _check_trust("it", status)
        stored = file.read()
    start = len(HEADER) + hashlib.sha256().digest_size
    data = stored[start:]
    if stored[:start] != HEADER + _checksum(name, data):
        raise UnusableError("it is damaged")
    return data


def _write(folder: int, name: str, data: bytes) -> None:
    """Write a kernel so that a reader sees the whole file or none."""
    partial = f".{name}.{secrets.token_hex(8)}{PARTIAL}"
    mode = 0o644 if os.fstat(folder).st_mode & stat.S_IROTH else 0o600
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        with open(os.open(partial, flags, mode, dir_fd=folder), "wb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask
            file.write(HEADER + _checksum(name, data) + data)
        os.replace(partial, name + ENDING, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:  # Ctrl-C as well
        with suppress(OSError):
            os.unlink(partial, dir_fd=folder)
        raise


def _checksum(name: str, data: bytes) -> bytes:
    """Return a checksum that covers the name, so that a renamed file is not another kernel."""
    return hashlib.sha256(name.encode() + b"\0" + data).digest()


def _remove_unused(folder: int) -> None:
    """Remove kernels that nobody has read for months, and partial files of killed processes."""
    now = time.time()
    for name in os.listdir(folder):
        limit = {ENDING: UNUSED_SECONDS, PARTIAL: ABANDONED_SECONDS}.get(Path(name).suffix)
        with suppress(OSError):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if limit is not None and now - max(status.st_atime, status.st_mtime) > limit:
                os.unlink(name, dir_fd=folder)


def locked(descriptor: int) -> bool:
    """Lock an open file or folder, and return whether nobody else holds the lock.

    Raise `OSError` if the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _quoted(path: object) -> str:
    """Return a path in quotes, with line ends and the like escaped."""
    return repr(str(path))
