"""The safetensors format, read by views of a memory map and written tensor by tensor.

    u64 length of the header | JSON {name: {dtype, shape, data_offsets}} | data

Our own reader, because the library's copies every tensor and has no bfloat16 without another
library (docs/decisions/0001-foundation.md).  Format: the README of huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from reprlib import repr as brief  # of what a header says, however long it is
from typing import Any, BinaryIO, NamedTuple

from lfm2kit.checkpoint.mapped import Extent, check_extents, map_file, view
from lfm2kit.checkpoint.pieces import write_pieces
from lfm2kit.errors import Lfm2kitError
from lfm2kit.weights import STORED_AS, DType, Tensor

MAX_HEADER = 100_000_000  # bytes: the library's own limit
LENGTH = 8  # bytes of the header's length


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by the names it gives them; `Lfm2kitError` says what is wrong."""
    data = map_file(path)
    if len(data) < LENGTH:
        raise Lfm2kitError(f"{path}: {len(data)} bytes are too few for a safetensors file")
    length = int.from_bytes(data[:LENGTH].tobytes(), "little")
    if length > min(MAX_HEADER, len(data) - LENGTH):
        raise Lfm2kitError(
            f"{path}: the header claims {length} bytes, the file has {len(data)} "
            "(truncated, or no safetensors file?)"
        )
    start = LENGTH + length
    header = json_object(path, data[LENGTH:start].tobytes())
    entries = {n: _entry(path, n, e, start) for n, e in header.items() if n != "__metadata__"}
    extents = [Extent(name, entry.begin, entry.end) for name, entry in entries.items()]
    check_extents(path, extents, start, len(data))
    used = sum(entry.end - entry.begin for entry in entries.values())
    if used != len(data) - start:
        raise Lfm2kitError(
            f"{path}: {len(data) - start} bytes of data, but its tensors take {used}"
        )
    return {
        name: Tensor(name, e.dtype, view(path, data, extent, STORED_AS[e.dtype], e.shape))
        for (name, e), extent in zip(entries.items(), extents, strict=True)
    }


class Entry(NamedTuple):
    """One line of the header, found sound; `begin` and `end` count from the file's start."""

    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int


def header_bytes(entries: Iterable[tuple[str, DType, Sequence[int]]]) -> bytes:
    """Length and JSON header of a file with these tensors in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, dtype, shape in entries:
        end = begin + math.prod(shape) * STORED_AS[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH)  # data begins aligned
    return len(text).to_bytes(LENGTH, "little") + text


def write_safetensors(
    file: BinaryIO,
    entries: Sequence[tuple[str, DType, Sequence[int]]],
    pieces_of: Callable[[str], Iterable[Any]],
) -> None:
    """Writes a file; `pieces_of(name)` gives each tensor's elements when its turn comes."""
    file.write(header_bytes(entries))
    for name, dtype, shape in entries:
        write_pieces(file, pieces_of(name), STORED_AS[dtype], shape)


def json_object(path: Path, text: bytes) -> dict[str, Any]:
    """The fields in `text`; a key that comes twice is refused, where `json` would take the last."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for key, value in pairs:
            if key in fields:
                raise Lfm2kitError(f"{path}: the JSON has '{key}' twice")
            fields[key] = value
        return fields

    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise Lfm2kitError(f"{path}: no readable JSON: {error}") from None
    if not isinstance(fields, dict):
        raise Lfm2kitError(f"{path}: this is no JSON object")
    return fields


def _entry(path: Path, name: str, entry: Any, start: int) -> Entry:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise Lfm2kitError(f"{path}: tensor '{name}' lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORED_AS:
        raise Lfm2kitError(
            f"{path}: tensor '{name}' has dtype {brief(dtype)}; "
            f"lfm2kit reads {', '.join(STORED_AS)}"
        )
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise Lfm2kitError(
            f"{path}: tensor '{name}' has shape {brief(shape)} and data_offsets {brief(offsets)}"
        )
    begin, end = offsets
    itemsize = STORED_AS[dtype].itemsize
    if math.prod(shape) * itemsize != end - begin:
        raise Lfm2kitError(
            f"{path}: tensor '{name}' of shape {shape} in {dtype} has {end - begin} bytes"
        )
    return Entry(dtype, tuple(shape), start + begin, start + end)


def _sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= 8
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in values)
    )
