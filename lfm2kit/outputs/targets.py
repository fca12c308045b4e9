"""Keeps an output from replacing a file that is read, or another output.

Files are compared as the system knows them, by device and inode: a link, a second hard link, a
bind mount and another spelling of a path all lead to the same file.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable, Mapping
from glob import escape, glob  # not Path's: it raises where a folder may not be read
from pathlib import Path

from lfm2kit.errors import Lfm2kitError
from lfm2kit.kernel_cache import root_folder

Identity = tuple[object, ...]


def identity(path: Path) -> Identity:
    """Return a value that is equal for two paths if they lead to the same file.

    A file that does not exist yet is identified by its folder and its name.
    """
    try:
        found = os.stat(path)
        return found.st_dev, found.st_ino
    except OSError:
        folder, name = os.path.split(os.path.realpath(path))
    try:
        found = os.stat(folder)
        return found.st_dev, found.st_ino, name
    except OSError:
        return folder, name


def check_apart(outputs: Mapping[str, Path | None], reads: Mapping[str, Iterable[Path]]) -> None:
    """Raise `Lfm2kitError` if an output is a file that is read, or another output.

    `outputs` maps options to paths; `reads` maps descriptions ("the plan") to files.  Loaded
    modules, kept kernels, and the files behind stdout and stderr count as well.
    """
    written = {o: path for o, path in outputs.items() if path is not None and not _is_device(path)}
    if not written:
        return
    if any(map(os.path.exists, written.values())):  # no new file is one of these
        reads = {**reads, "a loaded module": _modules(), "a kept kernel": _kernels()}
    taken = {identity(path): f"is {what}" for what, paths in reads.items() for path in paths}
    taken |= dict.fromkeys(_printed(), "is where the printed lines go")
    for option, path in written.items():
        key = identity(path)
        if key in taken:
            raise Lfm2kitError(f"{option} {path}: this file {taken[key]}; give another name")
        taken[key] = f"is {option}'s as well"


def _is_device(path: Path) -> bool:
    """Return whether `path` is a device, such as /dev/null, which several outputs may name."""
    return os.path.exists(path) and stat.S_ISCHR(os.stat(path).st_mode)


def _modules() -> list[Path]:
    files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    return [Path(file) for file in files if isinstance(file, str)]


def _kernels() -> list[Path]:
    root = root_folder()
    if root is None:
        return []
    return [Path(path) for path in glob(os.path.join(escape(str(root)), "*", "*"))]


def _printed() -> list[Identity]:
    """Return the identities of the files that stdout and stderr are redirected to."""
    found: list[Identity] = []
    for descriptor in (1, 2):
        try:
            status = os.fstat(descriptor)
        except OSError:  # closed
            continue
        if stat.S_ISREG(status.st_mode):
            found.append((status.st_dev, status.st_ino))
    return found
