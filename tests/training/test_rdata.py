"""Strings in R's .rdb files."""

from __future__ import annotations

import struct
import zlib

import pytest

from lfm2kit.errors import Lfm2kitError
from training.rdata import string_vectors

NUMBERS = 14  # REALSXP


def block(strings: list[str | None], version: int = 3, kind: int = 16) -> bytes:
    """Return a block of an .rdb file; None is R's NA."""
    data = b"X\n" + struct.pack(">iii", version, 0x00040201, 0x00030500)
    if version == 3:
        data += struct.pack(">i", 5) + b"UTF-8"
    data += struct.pack(">ii", kind, len(strings))
    for string in strings:
        encoded = b"" if string is None else string.encode()
        flags, length = 0x00040009, -1 if string is None else len(encoded)
        data += struct.pack(">ii", flags, length) + encoded
    return struct.pack(">i", len(data)) + zlib.compress(data)


@pytest.mark.parametrize("version", [2, 3])
def test_vectors_of_strings_come_back_in_order(version: int) -> None:
    first, second = ["EMMA", "", "£5 a naïve line"], ["one"]
    data = block([*first], version) + block([*second], version)
    assert list(string_vectors(data)) == [first, second]


def test_na_is_the_empty_string() -> None:
    assert list(string_vectors(block([None, "x"]))) == [["", "x"]]


def test_objects_of_another_type_are_refused() -> None:
    with pytest.raises(Lfm2kitError, match="an R object of type 14, expected strings"):
        list(string_vectors(block([], kind=NUMBERS)))


def test_a_block_of_another_length_is_refused() -> None:
    data = block(["x"])
    with pytest.raises(Lfm2kitError, match="another length"):
        list(string_vectors(struct.pack(">i", 1) + data[4:]))
