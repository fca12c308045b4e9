"""The formats that weights are stored in: blocks of values, and how to unpack them to float32.

F32, F16 and BF16 have one value in a block.  Quantised formats have more: Q4_0 stores 32 values in
18 bytes.  Whoever reads a format defines it; blocks of every backend can run it, because
`Format.unpack` widens it for those that do not take it as it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from reprlib import repr as brief  # of what a reader gives, however long it is
from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Blocks = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Format:
    """A way to store values: an element of type `block` holds `block_values` values of a row.

    `unpack(data, *beside)` returns the values in float32: from data [..., blocks] of type `block`,
    the values [..., blocks * block_values].  The leading dimensions are any, also none at all.
    `beside` are the arrays that the tensor keeps beside its data, such as scales, with the same
    leading dimensions.

    `pack(values)` rounds float32 values to such data, to nearest, ties to even; with arrays beside,
    it returns a tuple of the data and these.  It raises OverflowError where a finite value has no
    finite neighbour.  A format without it is only read.

    Raise TypeError for a field of another type, and for blocks of less than one value.
    """

    name: str  # as users see it
    block_values: int
    block: np.dtype[Any]
    unpack: Callable[..., Float32]
    pack: Callable[[Float32], Blocks | tuple[Blocks, ...]] | None = None

    def __hash__(self) -> int:
        return hash(self.name)  # of all fields it would take half a microsecond at every product

    def __post_init__(self) -> None:
        fits = {
            "name": isinstance(self.name, str),
            "block_values": type(self.block_values) is int and self.block_values > 0,
            "block": isinstance(self.block, np.dtype),
            "unpack": callable(self.unpack),
            "pack": self.pack is None or callable(self.pack),
        }
        for field, does_fit in fits.items():
            if not does_fit:
                raise TypeError(f"format {self.name}: {field} is {brief(getattr(self, field))}")

    def __str__(self) -> str:
        return self.name

    @property
    def block_bytes(self) -> int:
        return self.block.itemsize

    @property
    def bits(self) -> float:
        """Return the bits that a value takes, without what lies beside the data."""
        return 8 * self.block_bytes / self.block_values

    def blocks(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the data of a tensor of `shape`; rows may end in padding."""
        return (*shape[:-1], -(-shape[-1] // self.block_values)) if shape else ()

    def nbytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of the data of a tensor of `shape`."""
        return math.prod(self.blocks(shape)) * self.block_bytes


def fate(stored: Format, kept: Format) -> str:
    """Say what becomes of weights: "BF16 as stored", "BF16 widened to F32"."""
    if stored == kept:
        return f"{stored} as stored"
    return f"{stored} {'widened' if kept.bits > stored.bits else 'rounded'} to {kept}"


def _widened(data: Blocks) -> Float32:
    return data.astype(np.float32, copy=False)


def _float16(values: Float32) -> Blocks:
    with np.errstate(over="ignore"):
        stored = values.astype("<f2")
    if np.any(np.isinf(stored) & np.isfinite(values)):
        raise OverflowError("values beyond F16's 65504; take BF16")
    return stored


def _from_bfloat16(data: Blocks) -> Float32:
    return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _bfloat16(values: Float32) -> Blocks:
    """Return the upper halves of the bits, rounded to nearest even; a NaN stays one."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def _saturated_float16(values: Float32) -> Blocks:
    """Return F16 as GPUs' kernels make it: too large a number becomes the largest, a NaN 0x7fff."""
    largest = np.float32(65504)
    with np.errstate(all="ignore"):
        stored = np.clip(values, -largest, largest).astype("<f2")
    infinite, is_nan = np.isinf(values), np.isnan(values)
    stored[infinite] = np.copysign(np.float16(np.inf), values[infinite])
    stored.view(np.uint16)[is_nan] = 0x7FFF
    return stored


F32 = Format("F32", 1, np.dtype("<f4"), _widened, _widened)
F16 = Format("F16", 1, np.dtype("<f2"), _widened, _float16)
# NumPy has no bfloat16: the data are the upper halves of float32's bits.
BF16 = Format("BF16", 1, np.dtype("<u2"), _from_bfloat16, _bfloat16)

PLAIN = (F32, F16, BF16)  # what checkpoints of every tool hold, and lfm2kit writes
_ROUNDING = {F32: _widened, F16: _saturated_float16, BF16: _bfloat16}


def rounded(values: Float32, kept: Format) -> Blocks:
    """Return float32 values of any shape in F32, F16 or BF16, as kernels round what they multiply.

    To nearest, ties to even.  Unlike `Format.pack` it refuses no value: in F16, a finite one beyond
    65504 becomes 65504 with its sign, an infinity stays one, and every NaN becomes 0x7fff.  In BF16
    a NaN keeps its upper bits and becomes a quiet one.

    Raise ValueError for any other format.
    """
    if kept not in _ROUNDING:
        raise ValueError(f"rows of float32 are not rounded to {kept}, but to F32, F16 or BF16")
    return _ROUNDING[kept](values)
