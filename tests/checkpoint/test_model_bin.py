"""The assignment's model.bin, written and read back, and every lie that its table can tell."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from lfm2kit import bounds
from lfm2kit.checkpoint.model_bin import read_model_bin, write_model_bin
from lfm2kit.errors import Lfm2kitError
from tests.checkpoint.attempt import (
    A_LITTLE,
    Attempt,
    assert_refused,
    assert_refused_with_little_memory,
    content,
)

Floats = npt.NDArray[np.float32]

in_one_folder = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80
)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
floats = array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4).flatmap(
    lambda shape: arrays(np.float32, shape)
)


@in_one_folder
@given(tensors=st.dictionaries(names, floats, max_size=5))
def test_what_is_written_is_read_bit_for_bit(tmp_path: Path, tensors: dict[str, Floats]) -> None:
    path = tmp_path / "model.bin"
    with open(path, "wb") as file:
        write_model_bin(file, [(n, t.shape) for n, t in tensors.items()], lambda n: [tensors[n]])
    assert content(read_model_bin(path)) == {
        name: ("F32", tensor.shape, tensor.tobytes()) for name, tensor in tensors.items()
    }


def row(
    name: bytes, dims: list[int], offset: int, nbytes: int, *, length: int = -1, ndim: int = -1
) -> bytes:
    """Return a line of the table, saying what it is told to say."""
    claimed_length = struct.pack("<I", len(name) if length < 0 else length)
    claimed_ndim = struct.pack("<I", len(dims) if ndim < 0 else ndim)
    rest = struct.pack(f"<{len(dims)}I2Q", *dims, offset, nbytes)
    return claimed_length + name + claimed_ndim + rest


def table(*rows: bytes, count: int = -1) -> bytes:
    return struct.pack("<I", len(rows) if count < 0 else count) + b"".join(rows)


def one(dims: list[int], offset: int = 33, nbytes: int = 8) -> bytes:
    """Write 8 bytes of data, from byte 33 on, and one tensor `w` that claims what it likes."""
    return table(row(b"w", dims, offset, nbytes)).ljust(33, b"\0") + struct.pack("<2f", 1, 2)


def two(first: tuple[int, int], second: tuple[int, int]) -> bytes:
    """Write tensors `v` and `w`, each at some of 16 bytes of data, which begin at byte 62."""
    rows = [
        row(name, [(end - begin) // 4], 62 + begin, end - begin)
        for name, (begin, end) in zip((b"v", b"w"), (first, second), strict=True)
    ]
    return table(*rows) + bytes(16)


GOOD = one([2])


def test_the_layout_is_the_assignments_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    values = np.array([1, 2], dtype=np.float32)
    with open(path, "wb") as file:
        write_model_bin(file, [("w", (2,))], lambda name: [values])
    assert path.read_bytes() == GOOD
    assert (
        bytes.fromhex(
            "01000000 01000000 77 01000000 02000000 2100000000000000 0800000000000000"
            "0000803f 00000040".replace(" ", "")
        )
        == GOOD
    )


def test_data_at_any_address_and_with_gaps_is_read(tmp_path: Path) -> None:
    """Nothing says that data begins aligned, or right behind the table."""
    path = tmp_path / "model.bin"
    values = np.arange(4, dtype=np.float32)
    for gap in range(9):
        path.write_bytes(table(row(b"w", [2, 2], 37 + gap, 16)) + bytes(gap) + values.tobytes())
        read = read_model_bin(path)["w"].float32()
        assert read.flags.aligned
        np.testing.assert_array_equal(read, values.reshape(2, 2))


LIES: dict[str, tuple[bytes, list[str]]] = {
    "empty file": (b"", ["empty"]),
    "three bytes": (GOOD[:3], ["table", "3 bytes"]),
    "only a count": (GOOD[:4], ["table", "4 bytes"]),
    "truncated in the table": (GOOD[:20], ["table", "20 bytes"]),
    "truncated in the data": (GOOD[:-1], ["'w'", "truncated"]),
    "data missing": (GOOD[:33], ["'w'", "truncated"]),
    "count one too high": (table(row(b"w", [2], 33, 8), count=2) + bytes(8), ["entry 1 of 2"]),
    "count huge": (table(row(b"w", [2], 33, 8), count=2**32 - 1) + bytes(8), ["entry 1 of 4294"]),
    "some text": (b"some text " * 100, ["entry 0", "not a model.bin"]),
    "a zip archive": (b"PK\x03\x04" + b"zip" * 100, ["zip archive"]),
    "no name": (table(row(b"", [2], 32, 8)) + bytes(8), ["entry 0", "name's length is 0"]),
    "name length huge": (
        table(row(b"w", [2], 33, 8, length=2**32 - 1)),
        ["name's length is 4294967295"],
    ),
    "name beyond the file": (table(row(b"w", [2], 33, 8, length=1000)), ["table", "33 bytes"]),
    "name no UTF-8": (table(row(b"\xff", [2], 33, 8)) + bytes(8), ["UTF-8"]),
    "name of half a surrogate": (table(row(b"\xed\xa0\x80", [2], 35, 8)) + bytes(8), ["UTF-8"]),
    "dimensions huge": (
        table(row(b"w", [2], 33, 8, ndim=2**32 - 1)),
        ["'w'", "4294967295 dimensions"],
    ),
    "dimensions one too many": (
        table(row(b"w", [1] * (bounds.DIMENSIONS + 1), 65, 4)) + bytes(4),
        ["'w'", "9 dimensions"],
    ),
    "fewer bytes than the shape": (one([3]), ["'w'", "[3]", "8 bytes"]),
    "more bytes than the shape": (one([1]), ["'w'", "[1]", "8 bytes"]),
    "bytes of float64": (one([2], nbytes=16), ["'w'", "16 bytes"]),
    "bytes overflow 32 bits to 8": (
        table(row(b"w", [2, 2**29 + 1], 37, 8)) + bytes(8),
        ["'w'", "8 bytes"],
    ),
    "bytes overflow 64 bits to 0": (
        table(row(b"w", [2**31, 2**31], 37, 0)),
        ["'w'", "0 bytes"],
    ),
    "a shape and bytes beyond the file": (
        table(row(b"w", [2**31], 33, 2**33)) + bytes(8),
        ["'w'", "truncated"],
    ),
    "nothing of a huge shape": (
        table(row(b"w", [0, 2**32 - 1, 2**32 - 1, 2**32 - 1], 45, 0)),
        ["'w'", "shape"],
    ),
    "offset in the table": (one([2], offset=32), ["'w'", "data begins at 33"]),
    "offset 0": (one([2], offset=0), ["'w'", "data begins at 33"]),
    "offset beyond the file": (one([2], offset=41), ["'w'", "truncated"]),
    "offset near 2^64": (one([2], offset=2**64 - 4), ["'w'", "truncated"]),
    "overlap": (two((0, 12), (8, 16)), ["'w'", "overlaps", "'v'"]),
    "the same bytes twice": (two((0, 8), (0, 8)), ["'w'", "overlaps", "'v'"]),
    "one within another": (two((0, 16), (4, 8)), ["'w'", "overlaps", "'v'"]),
    "overlap behind an empty tensor within": (
        table(row(b"v", [4], 91, 16), row(b"e", [0], 99, 0), row(b"w", [2], 103, 8)) + bytes(20),
        ["'w'", "overlaps", "'v'"],
    ),
    "a name twice": (
        table(row(b"w", [1], 62, 4), row(b"w", [1], 66, 4)).ljust(70, b"\0"),
        ["'w'", "twice"],
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_with_file_and_cause(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "model.bin"
    file, words = LIES[lie]
    path.write_bytes(file)
    assert_refused(read_model_bin, path, words)


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_allocates_nothing_of_what_it_claims(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(LIES[lie][0])
    assert_refused_with_little_memory(read_model_bin, path)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_what_is_no_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    with pytest.raises(Lfm2kitError, match=kind):
        read_model_bin(path)


WHOLE = table(row(b"v", [2, 1], 66, 8), row(b"w", [2], 74, 8)) + struct.pack("<4f", 1, 2, 3, 4)
edits = st.tuples(st.integers(0, len(WHOLE) - 1), st.binary(max_size=4), st.integers(0, 4))


@settings(in_one_folder, max_examples=600)
@given(edits=st.lists(edits, min_size=1, max_size=3), kept=st.none() | st.integers(0, len(WHOLE)))
def test_a_damaged_file_is_read_within_its_bytes_or_refused(
    tmp_path: Path, edits: list[tuple[int, bytes, int]], kept: int | None
) -> None:
    file = WHOLE
    for at, replacement, width in edits:
        file = file[:at] + replacement + file[at + width :]
    path = tmp_path / "model.bin"
    path.write_bytes(file[:kept])
    attempt = Attempt.to(read_model_bin, path)
    assert attempt.peak < A_LITTLE
    if attempt.tensors is None:
        assert str(path) in attempt.error
    else:
        assert all(data in file[:kept] for _, _, data in attempt.tensors.values())
