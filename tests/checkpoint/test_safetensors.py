"""The safetensors reader and writer against the library, and every lie that a header can tell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from lfm2kit import bounds
from lfm2kit.checkpoint.safetensors import read_safetensors, write_safetensors
from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import BF16, F16, F32, PLAIN, Format
from lfm2kit.weights import Tensor
from tests.checkpoint.attempt import (
    A_LITTLE,
    Attempt,
    Content,
    assert_refused,
    assert_refused_with_little_memory,
    content,
)

LIBRARY_NAMES = {F32: "float32", F16: "float16", BF16: "bfloat16"}

in_one_folder = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = texts.filter(lambda name: name != "__metadata__")
metadata = st.dictionaries(texts, texts, min_size=1, max_size=3)  # {} the library writes as no JSON


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    """Draw tensors of any bits: a NaN's payload is data like any other."""
    drawn: dict[str, Tensor] = {}
    for name in draw(st.lists(names, max_size=5, unique=True)):
        format = draw(st.sampled_from(PLAIN))
        shape = draw(array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4))
        size = format.nbytes(shape)
        bits = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), format.block)
        drawn[name] = Tensor(name, format, shape, bits.reshape(shape))
    return drawn


def saved_by_the_library(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> bytes:
    specs = {
        name: safetensors.TensorSpec(
            dtype=LIBRARY_NAMES[t.format],
            shape=list(t.shape),
            data_ptr=t.data.ctypes.data,
            data_len=t.nbytes,
        )
        for name, t in tensors.items()
    }
    return bytes(safetensors.serialize(specs, metadata=metadata))


def saved(path: Path, tensors: Mapping[str, Tensor]) -> None:
    entries = [(name, t.format, t.shape) for name, t in tensors.items()]
    with open(path, "wb") as file:
        write_safetensors(file, entries, lambda name: [tensors[name].data])


def read_by_the_library(file: bytes) -> Content:
    return {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for name, entry in safetensors.deserialize(file)
    }


@in_one_folder
@given(tensors=tensors(), metadata=st.none() | metadata)
def test_what_the_library_writes_is_read_bit_for_bit(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(saved_by_the_library(tensors, metadata))
    assert content(read_safetensors(path)) == content(tensors)


@in_one_folder
@given(tensors=tensors())
def test_what_we_write_is_read_bit_for_bit_by_the_library_and_by_us(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    path = tmp_path / "model.safetensors"
    saved(path, tensors)
    assert read_by_the_library(path.read_bytes()) == content(tensors)
    assert content(read_safetensors(path)) == content(tensors)


@pytest.mark.parametrize(
    ("format", "bits", "values"),
    [
        (BF16, [0x3F80, 0xC040, 0x0001, 0xFF80], [1.0, -3.0, 2.0**-133, -np.inf]),
        (F16, [0x3C00, 0xC200, 0x0001, 0xFC00], [1.0, -3.0, 2.0**-24, -np.inf]),
    ],
)
def test_16_bit_values_become_float32_exactly(
    format: Format, bits: list[int], values: list[float]
) -> None:
    data = np.array(bits, np.uint16).view(format.block)
    tensor = Tensor.of_array("x", data, format)
    np.testing.assert_array_equal(tensor.float32(), np.float32(values))


def test_data_at_an_odd_address_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    values = np.arange(6, dtype=np.float32)
    path.write_bytes(stated({"x": entry([6], 0, 24)}, values.tobytes(), pad_to_odd=True))
    np.testing.assert_array_equal(read_safetensors(path)["x"].float32(), values)


# ---- lies ----


def stated(header: object, data: bytes, *, pad_to_odd: bool = False) -> bytes:
    """Write a file whose header is `header`: the JSON of it, or the very bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (pad_to_odd and len(text) % 2 == 0)
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: object, begin: object, end: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def one(shape: object, begin: object = 0, end: object = 8, dtype: object = "F32") -> bytes:
    """Write a file of 8 bytes of data and one tensor, `w`, that claims what it likes."""
    return stated({"w": entry(shape, begin, end, dtype)}, bytes(8))


def two(first: tuple[int, int], second: tuple[int, int], data: int = 16) -> bytes:
    """Write a file with tensors `v` and `w` of one dimension at these offsets."""
    entries = {
        name: entry([(end - begin) // 4], begin, end)
        for name, (begin, end) in zip("vw", (first, second), strict=True)
    }
    return stated(entries, bytes(data))


def length(claimed: int) -> bytes:
    return claimed.to_bytes(8, "little") + one([2])[8:]


GOOD = one([2])
TWICE = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":1}'
TWICE_WITHIN = b'{"w":{"dtype":"F32","shape":[1],"shape":[2],"data_offsets":[0,8]}}'

LIES: dict[str, tuple[bytes, list[str]]] = {
    "empty file": (b"", ["empty"]),
    "seven bytes": (GOOD[:7], ["7 bytes"]),
    "only a length": (GOOD[:8], ["header", "the file has 8"]),
    "truncated in the header": (GOOD[:20], ["header", "the file has 20"]),
    "truncated in the data": (GOOD[:-1], ["'w'", "truncated"]),
    "trailing bytes": (GOOD + b"\0", ["9 bytes of data", "take 8"]),
    "header length 0": (length(0), ["JSON"]),
    "header length cut short": (length(5), ["JSON"]),
    "header length one beyond the file": (length(len(GOOD) - 7), ["header claims"]),
    "header length huge": (length(2**63 - 1), ["header claims", str(2**63 - 1)]),
    "header length negative": (length(2**64 - 1), ["header claims"]),
    "not JSON": (stated(b"{'w': 1}", b""), ["JSON"]),
    "not UTF-8": (stated(b'{"\xff": 1}', b""), ["JSON", "utf-8"]),
    "a UTF-8 mark first": (stated(b"\xef\xbb\xbf{}", b""), ["JSON"]),
    "nested too deep": (stated(b"[" * 100_000, b""), ["JSON"]),
    "a number of 5000 digits": (stated(b"1" * 5000, b""), ["JSON"]),
    "a list": (stated([], b""), ["expected a JSON object"]),
    "null": (stated(None, b""), ["expected a JSON object"]),
    "a tensor twice": (stated(TWICE, bytes(4)), ["'w' twice"]),
    "a field twice": (stated(TWICE_WITHIN, bytes(8)), ["'shape' twice"]),
    "entry is a list": (stated({"w": [1]}, b""), ["'w'", "lacks"]),
    "entry without dtype": (stated({"w": {"shape": [], "data_offsets": [0, 0]}}, b""), ["lacks"]),
    "unknown dtype": (one([2], dtype="F64"), ["'w'", "'F64'", "BF16"]),
    "dtype in small letters": (one([2], dtype="f32"), ["'w'", "'f32'"]),
    "dtype a list": (one([2], dtype=["F32"]), ["'w'", "dtype"]),
    "shape not a list": (one(2), ["'w'", "shape 2"]),
    "shape of text": (one(["2"]), ["'w'", "shape ['2']"]),
    "shape of fractions": (one([2.0]), ["'w'", "shape [2.0]"]),
    "shape of truths": (one([True, 2]), ["'w'", "shape [True, 2]"]),
    "shape NaN": (one([float("nan")]), ["NaN", "JSON"]),
    "negative dimensions": (one([-1, -2]), ["'w'", "shape [-1, -2]"]),
    "product overflows to 8 bytes": (one([2**32 + 1, 2**32 - 1, 2]), ["'w'", "has 8 bytes"]),
    "dimension of 5 * 10^18": (one([5 * 10**18]), ["'w'", "has 8 bytes"]),
    "nothing of a huge shape": (
        stated({"w": entry([0, 2**62, 2**62], 0, 0)}, b""),
        ["'w'", "shape"],
    ),
    "nine dimensions": (one([2] + [1] * 8), ["'w'", "shape"]),
    "a million dimensions": (stated({"w": entry([1] * 10**6, 0, 4)}, bytes(4)), ["'w'", "shape"]),
    "three offsets": (
        stated({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, bytes(8)),
        ["'w'", "data_offsets"],
    ),
    "offsets of text": (one([2], "0", "8"), ["'w'", "data_offsets"]),
    "offsets negative": (one([2], -8, 0), ["'w'", "data_offsets"]),
    "offsets reversed": (one([2], 8, 0), ["'w'", "bytes"]),
    "offsets beyond 2^64": (one([2], 2**64, 2**64 + 8), ["'w'", "data_offsets"]),
    "offsets beyond the file": (one([2], 8, 16), ["'w'", "truncated"]),
    "fewer bytes than the shape": (one([3]), ["'w'", "[3]", "has 8 bytes"]),
    "more bytes than the shape": (one([1]), ["'w'", "[1]", "has 8 bytes"]),
    "two bytes a float": (one([2], dtype="F16"), ["'w'", "F16", "has 8 bytes"]),
    "overlap": (two((0, 12), (8, 16)), ["'w'", "overlaps", "'v'"]),
    "the same bytes twice": (two((0, 8), (0, 8), 8), ["'w'", "overlaps", "'v'"]),
    "one within another": (two((0, 16), (4, 8)), ["'w'", "overlaps", "'v'"]),
    "a gap before": (two((4, 8), (8, 16)), ["16 bytes of data", "take 12"]),
    "a gap between": (two((0, 4), (8, 16)), ["16 bytes of data", "take 12"]),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_with_file_and_cause(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "model.safetensors"
    file, words = LIES[lie]
    path.write_bytes(file)
    assert_refused(read_safetensors, path, words)


@pytest.mark.parametrize("lie", [lie for lie, (file, _) in LIES.items() if len(file) < 10_000])
def test_a_lie_allocates_nothing_of_what_it_claims(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(LIES[lie][0])
    assert_refused_with_little_memory(read_safetensors, path)


def test_a_header_over_the_librarys_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write((bounds.HEADER + 1).to_bytes(8, "little"))
        file.truncate(bounds.HEADER + 1000)  # a hole: no bytes on the disk
    assert_refused_with_little_memory(read_safetensors, path)


def test_a_key_that_comes_twice_among_very_many_is_found(tmp_path: Path) -> None:
    """A search that is quadratic in the number of keys would take many minutes here."""
    path = tmp_path / "model.safetensors"
    keys = [f'"{i}":0' for i in [*range(300_000), 299_999]]
    path.write_bytes(stated(b"{" + ",".join(keys).encode() + b"}", b""))
    with pytest.raises(Lfm2kitError, match="'299999' twice"):
        read_safetensors(path)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_what_is_no_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    with pytest.raises(Lfm2kitError, match=kind):
        read_safetensors(path)


# ---- damage ----

WHOLE = saved_by_the_library(
    {
        "first.weight": Tensor.of_array("", np.arange(6, dtype="<f4").reshape(2, 3)),
        "second.weight": Tensor.of_array("", np.arange(5, dtype="<u2"), BF16),
        "third": Tensor.of_array("", np.ones((2, 1, 2), "<f2"), F16),
    },
    {"format": "pt"},
)
in_the_header = st.integers(0, int.from_bytes(WHOLE[:8], "little") + 7)
edits = st.tuples(in_the_header | st.integers(0, len(WHOLE) - 1), st.binary(max_size=3))


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Draw a sound file with bytes replaced, inserted or removed, and perhaps cut off."""
    file = WHOLE
    for at, replacement in draw(st.lists(edits, min_size=1, max_size=3)):
        width = draw(st.integers(0, 3))
        file = file[:at] + replacement + file[at + width :]
    return file[: draw(st.integers(0, len(file)))] if draw(st.booleans()) else file


@settings(in_one_folder, max_examples=600)
@given(file=damaged())
def test_a_damaged_file_is_read_as_the_library_reads_it_or_refused(
    tmp_path: Path, file: bytes
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file)
    attempt = Attempt.to(read_safetensors, path)
    assert attempt.peak < A_LITTLE
    if attempt.tensors is None:
        assert str(path) in attempt.error
    else:
        assert attempt.tensors == read_by_the_library(file)
