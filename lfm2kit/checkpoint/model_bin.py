"""The assignment's `model.bin`: a table of tensors, then their FP32 data.  Little-endian.

    u32 n | n x { u32 name_len, name, u32 ndim, u32 dims[ndim], u64 offset, u64 nbytes } | data

Offsets count from the start of the file.  Names are Hugging Face's without `model.`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lfm2kit import bounds
from lfm2kit.checkpoint.file_kinds import check_file
from lfm2kit.checkpoint.mapped import Bytes, Extent, Files, check_extents, map_file, view
from lfm2kit.checkpoint.pieces import write_pieces
from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import F32
from lfm2kit.weights import Tensor

Entry = tuple[Extent, tuple[int, ...]]  # where a tensor lies, and its shape


def read_model_bin(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name; `Lfm2kitError` says what is wrong with it."""
    check_file(path)
    data = map_file(path)
    with Files([data]).reading_exactly():
        entries, start = _read_table(path, data)
    check_extents(path, [extent for extent, _ in entries], start, len(data))
    tensors: dict[str, Tensor] = {}
    for extent, shape in entries:
        if extent.name in tensors:
            raise Lfm2kitError(f"{path}: the table has '{extent.name}' twice")
        stored = view(path, data, extent, F32.block, shape)
        tensors[extent.name] = Tensor(extent.name, F32, shape, stored)
    return tensors


def write_model_bin(
    file: BinaryIO,
    entries: Sequence[tuple[str, Sequence[int]]],
    pieces_of: Callable[[str], Iterable[Any]],
) -> None:
    """Write a file; `pieces_of(name)` gives each tensor's elements when its turn comes."""
    offset = 4 + sum(len(_table_row(name, shape, 0)) for name, shape in entries)
    file.write(struct.pack("<I", len(entries)))
    for name, shape in entries:
        file.write(_table_row(name, shape, offset))
        offset += 4 * math.prod(shape)
    for name, shape in entries:
        write_pieces(file, pieces_of(name), F32.block, shape)


def _table_row(name: str, shape: Sequence[int], offset: int) -> bytes:
    text = name.encode()
    dims = struct.pack(f"<I{len(shape)}I", len(shape), *shape)
    extent = struct.pack("<QQ", offset, 4 * math.prod(shape))
    return struct.pack("<I", len(text)) + text + dims + extent


class _Reader:
    """A reader of the table, field by field and never past the end of the file."""

    def __init__(self, path: Path, data: Bytes) -> None:
        self.path = path
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise Lfm2kitError(
                f"{self.path}: the table of tensors ends beyond the file's {len(self.data)} bytes"
            )
        self.at += count
        return self.data[self.at - count : self.at].tobytes()

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")


def _read_table(path: Path, data: Bytes) -> tuple[list[Entry], int]:
    """Return the entries of the table, and where it ends."""
    reader = _Reader(path, data)
    count = reader.u32()
    entries = list(_entries(reader, count))
    return entries, reader.at


def _entries(reader: _Reader, count: int) -> Iterator[Entry]:
    for i in range(count):  # a count that lies ends at the file's end
        where = f"{reader.path}: entry {i} of {count}"
        if i == bounds.TENSORS:
            raise Lfm2kitError(f"{where}: lfm2kit takes up to {bounds.TENSORS} tensors")
        name = _name(reader, where)
        ndim = reader.u32()
        if ndim > bounds.DIMENSIONS:
            raise Lfm2kitError(f"{where}, '{name}', claims {ndim} dimensions")
        shape = tuple(reader.u32() for _ in range(ndim))
        offset, nbytes = reader.u64(), reader.u64()
        if 4 * math.prod(shape) != nbytes:
            raise Lfm2kitError(f"{where}, '{name}' of shape {list(shape)}, has {nbytes} bytes")
        yield Extent(name, offset, offset + nbytes), shape


def _name(reader: _Reader, where: str) -> str:
    length = reader.u32()
    if not 1 <= length <= bounds.NAME:
        raise Lfm2kitError(
            f"{where}: the name's length is {length}: this is not a model.bin, or it is damaged"
        )
    try:
        return reader.take(length).decode("utf-8")
    except UnicodeDecodeError:
        raise Lfm2kitError(
            f"{where}: the name is not UTF-8: this is not a model.bin, or it is damaged"
        ) from None
