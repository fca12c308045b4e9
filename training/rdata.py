"""Reads vectors of strings from the .rdb files in which R packages keep their data.

Such a file is a row of blocks: a length, big-endian, and a zlib stream of one serialised object
in R's XDR format. The format is described in "R Internals", section "Serialization Formats".
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from lfm2kit.errors import Lfm2kitError

STRINGS, STRING = 16, 9  # STRSXP and CHARSXP, in the lowest 8 bits of an object's flags


def string_vectors(data: bytes) -> Iterator[list[str]]:
    """Yield the string vectors of an .rdb file in order; `NA` becomes the empty string.

    Raise `Lfm2kitError` for blocks that are anything else.
    """
    while data:
        stream = zlib.decompressobj()
        block = stream.decompress(data[4:])
        if len(block) != struct.unpack(">i", data[:4])[0]:
            raise Lfm2kitError("an .rdb block has another length than it says")
        yield _strings(block)
        data = stream.unused_data


def _strings(block: bytes) -> list[str]:
    begin = _after_header(block)
    flags, count = struct.unpack_from(">ii", block, begin)
    if flags & 0xFF != STRINGS:
        raise Lfm2kitError(f"an R object of type {flags & 0xFF}, expected strings ({STRINGS})")
    begin += 8
    strings = []
    for _ in range(count):
        flags, length = struct.unpack_from(">ii", block, begin)
        if flags & 0xFF != STRING:
            raise Lfm2kitError(f"an R object of type {flags & 0xFF}, expected a string ({STRING})")
        begin += 8
        strings.append(block[begin : begin + max(0, length)].decode())  # NA has length -1
        begin += max(0, length)
    return strings


def _after_header(block: bytes) -> int:
    """Return where the object begins: version 3 also names the encoding of the strings."""
    if not block.startswith(b"X\n"):
        raise Lfm2kitError("an .rdb block is not in R's XDR format")
    version = struct.unpack_from(">i", block, 2)[0]
    if version == 2:
        return 14
    return 18 + int(struct.unpack_from(">i", block, 14)[0])
