"""Formats of stored weights: blocks of values, rows without unpacking, and what becomes of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lfm2kit.checkpoint.huggingface import canonical
from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import BF16, F16, F32, PLAIN, Format, fate, rounded
from lfm2kit.weights import Tensor, Weights

Float32 = npt.NDArray[np.float32]

Q4_0_BLOCK = np.dtype([("scale", "<f2"), ("quants", "u1", 16)])


def unpack_q4_0(data: npt.NDArray[Any]) -> Float32:
    """Unpack as llama.cpp does: 16 bytes hold two values each, the second half of them above."""
    quants = data["quants"]
    values = np.concatenate([quants & 15, quants >> 4], axis=-1).astype(np.float32) - 8
    values *= data["scale"].astype(np.float32)[..., None]
    return values.reshape(*data.shape[:-1], -1)


def unpack_int8(data: npt.NDArray[np.int8], scales: Float32) -> Float32:
    return data.astype(np.float32) * scales[..., None]


Q4_0 = Format("Q4_0", 32, Q4_0_BLOCK, unpack_q4_0)
INT8 = Format("int8", 1, np.dtype(np.int8), unpack_int8)


def q4_0(*shape: int) -> Tensor:
    rng = np.random.default_rng(0)
    data = np.zeros(Q4_0.blocks(shape), Q4_0_BLOCK)
    data["scale"] = rng.uniform(0.1, 1, data.shape)
    data["quants"] = rng.integers(256, size=(*data.shape, 16))
    return Tensor("w", Q4_0, shape, data)


def int8(*shape: int) -> Tensor:
    rng = np.random.default_rng(0)
    data = rng.integers(-127, 128, shape).astype(np.int8)
    return Tensor("w", INT8, shape, data, (rng.uniform(0.1, 1, shape[:-1]).astype(np.float32),))


def test_a_block_of_many_values_has_their_bytes_and_bits() -> None:
    assert (Q4_0.block_bytes, Q4_0.bits, str(Q4_0)) == (18, 4.5, "Q4_0")
    assert Q4_0.blocks((3, 64)) == (3, 2)
    assert Q4_0.nbytes((3, 64)) == q4_0(3, 64).nbytes == 3 * 2 * 18
    assert [format.nbytes((3, 64)) for format in PLAIN] == [768, 384, 384]


def test_q4_0_gives_the_values_that_its_definition_says() -> None:
    tensor = q4_0(2, 64)
    values = tensor.float32()
    block = tensor.data[1, 1]
    for i, byte in enumerate(block["quants"].tolist()):
        scale = np.float32(block["scale"])
        assert values[1, 32 + i] == scale * ((byte & 15) - 8)
        assert values[1, 48 + i] == scale * ((byte >> 4) - 8)


def test_padding_of_the_last_block_of_a_row_is_cut_off() -> None:
    tensor = q4_0(3, 40)
    assert tensor.data.shape == (3, 2)
    np.testing.assert_array_equal(tensor.float32(), Q4_0.unpack(tensor.data)[:, :40])


@pytest.mark.parametrize("make", [q4_0, int8])
@pytest.mark.parametrize("index", [2, slice(1, 3), [3, 0, 0], (1, slice(0, 2))], ids=str)
def test_rows_and_experts_are_taken_as_stored(make: Any, index: Any) -> None:
    tensor = make(4, 5, 64)
    part = tensor[index]
    assert part.format == tensor.format
    assert part.nbytes * tensor.size == tensor.nbytes * part.size
    np.testing.assert_array_equal(part.float32(), tensor.float32()[index])


def test_an_index_of_the_last_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="its data are"):
        q4_0(64)[:1]


@pytest.mark.parametrize("make", [q4_0, int8])
def test_packed_experts_of_any_format_are_taken_apart_without_a_copy(make: Any) -> None:
    packed = make(3, 8, 64)
    name = "layers.0.feed_forward.experts.{}.{}.weight"
    parts = canonical(Path("m"), {"model.layers.0.feed_forward.experts.gate_up_proj": packed})
    assert len(parts) == 6
    for e in range(3):
        w1, w3 = parts[name.format(e, "w1")], parts[name.format(e, "w3")]
        assert np.shares_memory(w1.data, packed.data)
        np.testing.assert_array_equal(w1.float32(), packed.float32()[e, :4])
        np.testing.assert_array_equal(w3.float32(), packed.float32()[e, 4:])


def test_a_scope_leaves_tensors_of_any_format_as_they_are() -> None:
    tensor = q4_0(3, 64)
    assert Weights({"layers.0.w": tensor}).scope("layers.0")["w"] is tensor


@pytest.mark.parametrize("make", [q4_0, int8, lambda *s: q4_0(*s).stored_as(BF16)])
def test_any_stretch_of_values_can_be_taken(make: Any) -> None:
    """As conversions take them: across rows, in no step with blocks."""
    tensor = make(3, 5, 64)
    flat = tensor.float32().reshape(-1)
    for begin, end in ((0, tensor.size), (0, 1), (63, 65), (70, 700), (959, 960), (7, 7)):
        np.testing.assert_array_equal(tensor.flat(begin, end).float32(), flat[begin:end])


def test_a_vector_and_an_empty_tensor_have_stretches_too() -> None:
    vector = q4_0(96)
    np.testing.assert_array_equal(vector.flat(30, 70).float32(), vector.float32()[30:70])
    assert q4_0(3, 0).flat(0, 0).size == 0


def test_no_rows_are_unpacked_to_no_rows() -> None:
    """An embedding of no tokens: `unpack_q4_0` itself cannot reshape nothing."""
    assert q4_0(3, 64)[np.empty(0, np.int32)].float32().shape == (0, 64)


def test_values_of_any_format_can_be_rounded_to_the_plain_ones() -> None:
    tensor = q4_0(3, 64)
    for format in (F16, BF16):
        assert tensor.stored_as(format).format == format
        error = np.abs(tensor.stored_as(format).float32() - tensor.float32())
        assert math.ldexp(np.max(error), 7) <= np.max(np.abs(tensor.float32()))
    assert tensor.stored_as(Q4_0) is tensor
    with pytest.raises(Lfm2kitError, match="tensor 'w': int8 can be read, but not written"):
        tensor.stored_as(INT8)


def test_arrays_that_do_not_fit_the_shape_are_refused() -> None:
    blocks, scales = np.zeros((3, 2), Q4_0_BLOCK), np.ones(2, np.float32)
    with pytest.raises(ValueError, match=r"tensor 'w' \[3, 32\] in Q4_0: its data are \[3, 2\]"):
        Tensor("w", Q4_0, (3, 32), blocks)
    with pytest.raises(ValueError, match=r"expected .* of uint16"):
        Tensor.of_array("w", np.ones(3, np.float32), BF16)
    with pytest.raises(ValueError, match=r"beside its data is \[2\]; it must begin with \[3\]"):
        Tensor("w", INT8, (3, 4), np.zeros((3, 4), np.int8), (scales,))


def test_one_scale_stands_for_every_row_and_counts_once() -> None:
    scale = np.float32(0.5)
    rows = np.broadcast_to(scale, (4, 3))
    tensor = Tensor("w", INT8, (4, 3, 8), np.ones((4, 3, 8), np.int8), (rows,))
    assert tensor.nbytes == 4 * 3 * 8 + 4
    np.testing.assert_array_equal(tensor[2, 1:].float32(), np.full((2, 8), scale))


@pytest.mark.parametrize(
    ("unpack", "said"),
    [
        (lambda data: data.astype(np.float64), r"returned \[2, 4\] of float64, not \[2, 4\] of"),
        (lambda data: np.ones(3, np.float32), r"returned \[3\] of float32, not \[2, 4\] of"),
        (lambda data: np.ones((2, 8), np.float32), r"returned \[2, 8\] of float32, not \[2, 4\]"),
        (lambda data: None, "returned None, not"),
        (lambda data: data / {}["scale"], "raised KeyError: 'scale'"),
    ],
)
def test_a_format_that_unpacks_something_else_is_named(unpack: Any, said: str) -> None:
    format = Format("odd", 1, np.dtype(np.int8), unpack)
    tensor = Tensor("w", format, (2, 4), np.zeros((2, 4), np.int8))
    with pytest.raises(Lfm2kitError, match=rf"format odd, unpacking tensor 'w' \[2, 4\], {said}"):
        tensor.float32()


@pytest.mark.parametrize(
    "wrong",
    [
        {"block": "<f4"},
        {"block_values": 0},
        {"block_values": 2.0},
        {"unpack": None},
        {"pack": 5},
        {"name": None},
    ],
)
def test_a_format_of_nonsense_cannot_be_made(wrong: dict[str, Any]) -> None:
    fields = {"name": "odd", "block_values": 1, "block": np.dtype("<f4"), "unpack": abs, **wrong}
    with pytest.raises(TypeError, match=f"{next(iter(wrong))} is"):
        Format(**fields)


@pytest.mark.parametrize(
    ("stored", "kept", "said"),
    [
        (BF16, BF16, "BF16 as stored"),
        (BF16, F32, "BF16 widened to F32"),
        (Q4_0, BF16, "Q4_0 widened to BF16"),
        (F32, F16, "F32 rounded to F16"),
        (F16, BF16, "F16 rounded to BF16"),
    ],
    ids=str,
)
def test_what_becomes_of_weights_is_said(stored: Format, kept: Format, said: str) -> None:
    assert fate(stored, kept) == said


def nearest(value: float, format: Format) -> float:
    """Return the number of a format that is nearest to a finite one, in Python's own arithmetic."""
    bits, least = (8, -126) if format == BF16 else (11, -14)
    exponent = max(math.frexp(value)[1] - 1, least)
    step = math.ldexp(1.0, exponent - bits + 1)
    return math.copysign(round(value / step) * step, value)  # Python rounds ties to even


EDGES = np.array(
    [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9, 1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-11,
     2**-24, 2**-25, 1.5 * 2**-24, -(2**-25) - 2**-40, 2**-14, 2**-14 - 2**-26, 65504, 65519.9,
     65520, -7e4, 1e38, 3.39e38, 1e-40, -1e-45, 2**-126, 2**-133, 2**-134, 1.5 * 2**-133],
    np.float32,
)  # fmt: skip


@pytest.mark.parametrize("format", [BF16, F16], ids=str)
def test_rows_are_rounded_to_nearest_ties_to_even_and_refuse_no_value(format: Format) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
    x = np.concatenate([EDGES, bits.view(np.float32)])
    x = x[np.isfinite(x)]
    want = np.array([nearest(float(value), format) for value in x])
    if format == F16:
        want = np.clip(want, -65504, 65504)
    with np.errstate(over="ignore"):
        want = want.astype(np.float32)
    got = rounded(x, format)
    assert got.dtype == format.block
    assert format.unpack(got).tobytes() == want.tobytes()


@pytest.mark.parametrize(
    ("format", "nans"), [(BF16, [0x7FC0, 0xFFC1, 0x7FFF]), (F16, [0x7FFF] * 3)], ids=["BF16", "F16"]
)
def test_what_is_not_finite_stays_so_in_rows(format: Format, nans: list[int]) -> None:
    x = np.array([0x7F800001, 0xFFC10000, 0x7FFFFFFF, 0x7F800000, 0xFF800000], np.uint32)
    *found, up, down = rounded(x.view(np.float32), format).view(np.uint16).tolist()
    assert found == nans
    assert format.unpack(np.array([up, down], np.uint16).view(format.block)).tolist() == [
        math.inf, -math.inf,
    ]  # fmt: skip


@pytest.mark.parametrize("format", PLAIN, ids=str)
def test_rows_that_are_rounded_already_stay_as_they_are(format: Format) -> None:
    x = np.random.default_rng(1).standard_normal((17, 5)).astype(np.float32)
    once = rounded(x, format)
    assert once.shape == x.shape
    assert rounded(format.unpack(once), format).tobytes() == once.tobytes()
    assert rounded(x[:0], format).shape == (0, 5)


def test_rows_are_not_rounded_to_blocks_of_many_values() -> None:
    with pytest.raises(ValueError, match="not rounded to Q4_0, but to F32, F16 or BF16"):
        rounded(np.zeros((1, 32), np.float32), Q4_0)
