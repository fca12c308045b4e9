"""Writing files so that a reader sees the old one or the new one, never half of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lfm2kit.errors import Lfm2kitError


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well, and vanishes if not.

    A link stays one: what it points to is replaced.  A pipe or a device is written as it is.
    """
    path = Path(os.path.realpath(path))
    partial = path if _is_special(path) else _beside(path, "partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise Lfm2kitError(f"{path}: {error.strerror}") from error
    finally:  # an interrupt as well
        if partial != path:
            with suppress(OSError):
                partial.unlink()


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """The same for a folder: the old one stays until the new one is complete."""
    partial, old = _beside(path, "partial"), _beside(path, "old")
    try:
        partial.mkdir()
        yield partial
        if os.path.exists(path):
            path.rename(old)
        partial.rename(path)
    except OSError as error:
        raise Lfm2kitError(f"{path}: {error.strerror}") from error
    finally:
        if os.path.isdir(old) and not os.path.exists(path):  # interrupted between the two
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)


def check_target(option: str, path: Path) -> None:
    """`Lfm2kitError` where no file can come to be: better before the work than after it."""
    if os.path.isdir(path):
        raise Lfm2kitError(f"{option} {path}: this is a folder")
    path = Path(os.path.realpath(path))
    if _is_special(path):
        return
    partial = _beside(path, "partial")
    try:
        partial.touch()
        partial.unlink(missing_ok=True)  # other ranks try as well
    except OSError as error:
        raise Lfm2kitError(f"{option} {path}: {error.strerror}") from None


def _is_special(path: Path) -> bool:
    return os.path.exists(path) and not os.path.isfile(path)  # not Path's: they may raise


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{ending}")
