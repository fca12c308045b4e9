"""Maps files into memory, and checks that headers describe their files truly."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from numpy.lib.array_utils import byte_bounds

from lfm2kit import bounds
from lfm2kit.checkpoint.file_kinds import EMPTY, check_regular
from lfm2kit.errors import Lfm2kitError

Bytes = npt.NDArray[np.uint8]


class Extent(NamedTuple):
    """The place of a tensor's bytes in its file, if the header is right."""

    name: str
    begin: int
    end: int


class MappedFile(NamedTuple):
    """A mapped file, and its status when it was mapped."""

    path: Path
    seen: os.stat_result

    def check(self, its_map: mmap.mmap) -> None:
        """Raise `Lfm2kitError` if the file has changed; another file with its name is harmless."""
        try:
            now = os.stat(self.path)
        except OSError:
            now = self.seen  # it was removed, and the map is still valid
        is_same = (now.st_dev, now.st_ino) == (self.seen.st_dev, self.seen.st_ino)
        is_written = is_same and now.st_mtime_ns != self.seen.st_mtime_ns
        if is_written or its_map.size() != self.seen.st_size:
            raise Lfm2kitError(
                f"{self.path}: the file was written to while it was in use; run again, and put a "
                "new file in its place by renaming it (mv), not by writing into it (cp)"
            )


_FILES: WeakKeyDictionary[mmap.mmap, MappedFile] = WeakKeyDictionary()


class Files:
    """The mapped files that some arrays are views of."""

    def __init__(self, arrays: Iterable[npt.NDArray[Any]]) -> None:
        maps = dict.fromkeys(map(_map_of, arrays))
        self._maps = [m for m in maps if m is not None and m in _FILES]

    def check_unchanged(self) -> None:
        """Raise `Lfm2kitError` for the first file that was written to since it was mapped.

        Reading a mapped file beyond its new, shorter end would end the process.
        """
        for its_map in self._maps:
            _FILES[its_map].check(its_map)

    @contextmanager
    def reading_exactly(self) -> Iterator[None]:
        """Let the system read no more than what is used meanwhile.

        Else it reads some of a file around each place, up to several MB: of a rank's share, or of
        a few rows of every matrix, that makes most of a model.
        """
        self._advise("MADV_RANDOM")
        try:
            yield
        finally:
            self._advise("MADV_NORMAL")

    def _advise(self, advice: str) -> None:
        for its_map in self._maps if hasattr(mmap, advice) else []:
            its_map.madvise(getattr(mmap, advice))


def map_file(path: Path) -> Bytes:
    """Map a file and return its bytes, read-only; nothing is read before it is used.

    Raise `Lfm2kitError` for an empty file, a pipe and a device.  Another format than the caller's
    is its own to recognise.
    """
    if check_regular(path) == 0:
        raise Lfm2kitError(f"{path}: {EMPTY}")
    try:
        seen = os.stat(path)
        data = np.memmap(path, np.uint8, "r")
        if (its_map := _map_of(data)) is not None:
            _FILES[its_map] = MappedFile(path.absolute(), seen)
        return data
    except (OSError, ValueError) as error:
        raise Lfm2kitError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def check_extents(path: Path, extents: Iterable[Extent], start: int, size: int) -> None:
    """Raise `Lfm2kitError` if a tensor leaves [start, size) or overlaps another."""
    previous = Extent("the header", 0, start)
    for extent in sorted(extents, key=lambda e: (e.begin, e.end)):
        if not start <= extent.begin <= extent.end:
            raise Lfm2kitError(
                f"{path}: tensor '{extent.name}' claims bytes {extent.begin} to {extent.end}, "
                f"but data begins at {start}"
            )
        if extent.end > size:
            raise Lfm2kitError(
                f"{path}: tensor '{extent.name}' ends at byte {extent.end}, but the file has "
                f"{size} (truncated download?)"
            )
        if extent.begin < previous.end and extent.end > extent.begin:
            raise Lfm2kitError(f"{path}: tensor '{extent.name}' overlaps '{previous.name}'")
        previous = max(previous, extent, key=lambda e: e.end)


def prefetch(array: npt.NDArray[Any]) -> None:
    """Let the system begin to read a view of a map, and all of it at once."""
    owner = _map_of(array)
    if owner is None or not hasattr(mmap, "MADV_WILLNEED"):
        return
    first, last = _place(owner, array)
    first = first // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        owner.madvise(mmap.MADV_WILLNEED, first, last - first)


def release(array: npt.NDArray[Any]) -> None:
    """Give back the memory of a view of a map; the file is read again when the view is used.

    Weights that a backend has packed need not stay in memory twice.
    """
    owner = _map_of(array)
    if owner is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    begin, end = _place(owner, array)
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    last = end // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        owner.madvise(mmap.MADV_DONTNEED, first, last - first)


def _place(owner: mmap.mmap, array: npt.NDArray[Any]) -> tuple[int, int]:
    """Return where the bytes of a view of a map begin and end in it."""
    begin, end = byte_bounds(array)  # not its nbytes: a scale may be broadcast to every row
    start = np.frombuffer(owner, np.uint8).ctypes.data
    return begin - start, end - start


def files_of(arrays: Iterable[npt.NDArray[Any]]) -> list[Path]:
    """Return the files that arrays are views of, links resolved."""
    names = {getattr(array, "filename", None) for array in arrays}
    return sorted(map(Path, filter(None, names)))


def _map_of(array: npt.NDArray[Any]) -> mmap.mmap | None:
    """Return the map that an array is a view of, if any."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return owner if isinstance(owner, mmap.mmap) else None


def view(
    path: Path, data: Bytes, extent: Extent, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> Any:
    """Return the tensor's elements where they lie, of any alignment."""
    if any(size > bounds.DIMENSION for size in shape):
        raise Lfm2kitError(
            f"{path}: tensor '{extent.name}' has shape {list(shape)}; "
            f"lfm2kit takes dimensions up to {bounds.DIMENSION}"
        )
    try:
        return data[extent.begin : extent.end].view(dtype).reshape(shape)
    except ValueError:  # no elements, but other dimensions that overflow
        raise Lfm2kitError(f"{path}: tensor '{extent.name}' has shape {list(shape)}") from None
