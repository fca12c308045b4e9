"""Writes folders so that a reader sees the old one or the new one, as `files` writes files."""

from __future__ import annotations

import os
import shutil
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lfm2kit.errors import Lfm2kitError
from lfm2kit.outputs.disk import mount_points, sync
from lfm2kit.outputs.files import Note
from lfm2kit.outputs.leftovers import beside, held, remove_leftovers

INSIDE = "new"  # the name of a partial folder inside one that cannot be renamed


@contextmanager
def replaced_folder(path: Path, note: Note = warnings.warn) -> Iterator[Path]:
    """Yield a new folder that replaces `path` when the block ends well, and is removed if not.

    A folder may be impossible to rename, because something is mounted on it or because its parent
    is not writable.  Then its files are replaced one by one, and `note` is called with a sentence.
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
        sync(path.parent)
    except OSError as error:
        raise Lfm2kitError(f"{path}: {error.strerror or error}") from error
    finally:
        if os.path.isdir(old) and not os.path.exists(path):  # interrupted between the two renames
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder that becomes `path` when the block ends well, and is removed if not.

    Raise `Lfm2kitError` if it cannot be written, or if there is something at `path`.
    """
    if os.path.lexists(path):
        raise Lfm2kitError(f"{path} is there already; name another folder")
    remove_leftovers(path)
    partial = beside(path, "partial")
    try:
        partial.mkdir()
        with held(partial):
            yield partial
            _sync_all(partial)
            partial.rename(path)
        sync(path.parent)
    except OSError as error:
        raise Lfm2kitError(f"{path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_leftovers_of_folder(path: Path) -> None:
    """Remove the partial folders that killed runs left beside `path` and inside it."""
    remove_leftovers(path)
    if os.path.isdir(path):
        remove_leftovers(path / INSIDE)


def _can_move(folder: Path) -> bool:
    """Return whether a folder can be renamed and another one can take its name."""
    return os.access(folder.parent, os.W_OK | os.X_OK) and str(folder) not in mount_points()


def _keep_modes(old: Path, new: Path) -> None:
    """Give a new folder and its files the modes of their namesakes in `old`."""
    for path in [new, *new.rglob("*")]:
        before = old / path.relative_to(new)
        if before.exists():
            path.chmod(stat.S_IMODE(before.stat().st_mode))


def _swap(partial: Path, path: Path, old: Path) -> None:
    if os.path.exists(path):
        path.rename(old)
    partial.rename(path)


def _move_files(partial: Path, folder: Path) -> None:
    """Move the files of `partial` into `folder`, and remove those that were there."""
    outdated = [p for p in folder.rglob("*") if p.is_file() and not p.is_relative_to(partial)]
    for new in [p for p in partial.rglob("*") if p.is_file()]:
        target = folder / new.relative_to(partial)
        target.parent.mkdir(exist_ok=True, parents=True)
        new.replace(target)
        outdated = [path for path in outdated if path != target]
    for path in outdated:
        path.unlink()
    sync(folder)


def _sync_all(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        sync(path)
