"""The safetensors format, read by views of a memory map and written tensor by tensor.

    u64 length of the header | JSON {name: {dtype, shape, data_offsets}} | data

Our own reader, because the library's copies every tensor and has no bfloat16 without another
library (docs/decisions/0001-foundation.md).  Format: the README of huggingface/safetensors.
What the library refuses is refused here, and more (docs/decisions/0008-reading-checkpoints.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from reprlib import repr as brief  # of what a header says, however long it is
from typing import Any, BinaryIO, NamedTuple

from lfm2kit import bounds
from lfm2kit.checkpoint.documents import parse_json
from lfm2kit.checkpoint.file_kinds import check_file
from lfm2kit.checkpoint.mapped import Bytes, Extent, Files, check_extents, map_file, view
from lfm2kit.checkpoint.pieces import write_pieces
from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import PLAIN, Format
from lfm2kit.weights import Tensor

LENGTH = 8  # bytes of the header's length
METADATA = "__metadata__"
FORMATS: Mapping[str, Format] = {format.name: format for format in PLAIN}  # by dtype
FIELDS = {"dtype", "shape", "data_offsets"}  # of a tensor; others are ignored


def read_safetensors(path: Path, more: Mapping[str, Format] | None = None) -> dict[str, Tensor]:
    """Return the tensors of a file by the names it gives them.

    A tensor's dtype in the header says how it is stored: F32, F16, BF16, or a key of `more`, which
    plugins give.  Raise `Lfm2kitError` for any other dtype, and for a damaged file.
    """
    formats = {**FORMATS, **(more or {})}
    check_file(path)
    data = map_file(path)
    if len(data) < LENGTH:
        raise Lfm2kitError(f"{path}: {len(data)} bytes are too few for a safetensors file")
    with Files([data]).reading_exactly():
        length = int.from_bytes(data[:LENGTH].tobytes(), "little")
    if length > min(bounds.HEADER, len(data) - LENGTH):
        raise Lfm2kitError(
            f"{path}: the header claims {length} bytes, the file has {len(data)} "
            "(truncated, or not a safetensors file?)"
        )
    start = LENGTH + length
    with Files([data]).reading_exactly():
        header = data[LENGTH:start].tobytes()
    entries = _entries(path, parse_json(path, header), start, formats)
    extents = [Extent(name, entry.begin, entry.end) for name, entry in entries.items()]
    check_extents(path, extents, start, len(data))
    _check_no_gaps(path, extents, start, len(data))
    return {
        name: Tensor(name, e.format, e.shape, _data(path, data, extent, e))
        for (name, e), extent in zip(entries.items(), extents, strict=True)
    }


class Entry(NamedTuple):
    """One line of the header, found sound; `begin` and `end` count from the file's start."""

    format: Format
    shape: tuple[int, ...]
    begin: int
    end: int


def _data(path: Path, data: Bytes, extent: Extent, entry: Entry) -> Any:
    return view(path, data, extent, entry.format.block, entry.format.blocks(entry.shape))


def header_bytes(entries: Iterable[tuple[str, Format, Sequence[int]]]) -> bytes:
    """Return the length and JSON header of a file with these tensors in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, format, shape in entries:
        end = begin + format.nbytes(shape)
        header[name] = {"dtype": format.name, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH)  # data begins aligned
    return len(text).to_bytes(LENGTH, "little") + text


def write_safetensors(
    file: BinaryIO,
    entries: Sequence[tuple[str, Format, Sequence[int]]],
    pieces_of: Callable[[str], Iterable[Any]],
) -> None:
    """Write a file; `pieces_of(name)` gives each tensor's elements when its turn comes."""
    file.write(header_bytes(entries))
    for name, format, shape in entries:
        write_pieces(file, pieces_of(name), format.block, format.blocks(shape))


def _entries(
    path: Path, header: dict[str, Any], start: int, formats: Mapping[str, Format]
) -> dict[str, Entry]:
    metadata = header.pop(METADATA, None)
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if metadata is not None and not texts:
        raise Lfm2kitError(f"{path}: {METADATA} is {brief(metadata)}; expected texts by name")
    if len(header) > bounds.TENSORS:
        raise Lfm2kitError(f"{path}: {len(header)} tensors; lfm2kit takes up to {bounds.TENSORS}")
    return {name: _entry(path, name, entry, start, formats) for name, entry in header.items()}


def _check_no_gaps(path: Path, extents: Sequence[Extent], start: int, size: int) -> None:
    """Refuse bytes that belong to no tensor, and an empty tensor in the middle of another."""
    used = sum(extent.end - extent.begin for extent in extents)
    if used != size - start:
        raise Lfm2kitError(f"{path}: {size - start} bytes of data, but its tensors take {used}")
    borders = {start, *(extent.end for extent in extents if extent.end > extent.begin)}
    for extent in extents:
        if extent.begin == extent.end and extent.begin not in borders:
            raise Lfm2kitError(f"{path}: tensor '{extent.name}' overlaps another")


def _entry(path: Path, name: str, entry: Any, start: int, formats: Mapping[str, Format]) -> Entry:
    if not isinstance(entry, dict) or not set(entry) >= FIELDS:
        raise Lfm2kitError(f"{path}: tensor '{name}' lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if len(name.encode(errors="replace")) > bounds.NAME:
        raise Lfm2kitError(f"{path}: a tensor's name has more than {bounds.NAME} bytes")
    if not all(_is_double(value) for key, value in entry.items() if key not in FIELDS):
        raise Lfm2kitError(f"{path}: tensor '{name}' has a number that is too large for JSON")
    if not isinstance(dtype, str) or dtype not in formats:
        raise Lfm2kitError(
            f"{path}: tensor '{name}' has dtype {brief(dtype)}; "
            f"lfm2kit reads {', '.join(formats)}, but no quantised weights"
        )
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise Lfm2kitError(
            f"{path}: tensor '{name}' has shape {brief(shape)} and data_offsets {brief(offsets)}"
        )
    begin, end = offsets
    if formats[dtype].nbytes(shape) != end - begin:
        raise Lfm2kitError(
            f"{path}: tensor '{name}' of shape {shape} in {dtype} has {end - begin} bytes"
        )
    return Entry(formats[dtype], tuple(shape), start + begin, start + end)


def _sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= bounds.DIMENSIONS
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in values)
    )


def _is_double(value: Any) -> bool:
    """Return whether the library, which ignores `value` as we do, can read the numbers in it."""
    if isinstance(value, (dict, list)):
        return all(map(_is_double, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int) or abs(value) < 10**308
