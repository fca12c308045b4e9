"""Weights packed into panels for the tile, in the format in which the checkpoint stores them.

A panel holds NR rows of a matrix [out, in], transposed: [in, NR], its columns in the tile's order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from lfm2kit.backend import F32, Format, Tensor
from lfm2kit_cpu_simd.compiling import kernel
from lfm2kit_cpu_simd.machine import NR, common_storage
from lfm2kit_cpu_simd.signatures import FLOAT, INT, ORDER, WORD
from lfm2kit_cpu_simd.tile import CACHE_LINE, lane_order

HALF = NR // 2
COLUMNS_AT_ONCE = 32  # columns that are transposed at once: a cache line of 16-bit weights


@dataclass(frozen=True, slots=True)
class Panels:
    """Packed matrices of one shape: data [groups, ceil(out / NR), in, NR], zero-padded."""

    data: npt.NDArray[Any]
    storage: Format
    is_gated: bool
    address: int = field(init=False)  # of data: asking an array for it takes a microsecond

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", self.data.ctypes.data)


def pack(groups: Sequence[Sequence[Tensor]], format: Format | None = None) -> Panels:
    """Pack each group's matrices [out_i, in] below each other, rounded to a `format` if given."""
    storage = format or common_storage(tensor for tensors in groups for tensor in tensors)
    rows = sum(t.shape[0] for t in groups[0])
    panels = _empty_panels(len(groups), -(-rows // NR), groups[0][0].shape[1], storage)
    order = lane_order(storage)
    for panel, tensors in zip(panels, groups, strict=True):
        first = 0
        for tensor in tensors:
            _place(_elements(tensor, storage), panel, order, first)
            first += tensor.shape[0]
    return Panels(panels, storage, is_gated=False)


def pack_gated(
    gates: Sequence[Tensor], ups: Sequence[Tensor], format: Format | None = None
) -> Panels:
    """Pack HALF columns of w1, then HALF of w3, and so on: a tile has both sums of its outputs."""
    storage = format or common_storage([*gates, *ups])
    rows, k = gates[0].shape
    panels = _empty_panels(len(gates), -(-rows // HALF), k, storage)
    order = lane_order(storage)
    for panel, gate, up in zip(panels, gates, ups, strict=True):
        _place(_elements(gate, storage), panel, order[:HALF], 0)
        _place(_elements(up, storage), panel, order[HALF:], 0)
    return Panels(panels, storage, is_gated=True)


def _elements(tensor: Tensor, storage: Format) -> npt.NDArray[Any]:
    """Return the matrix as floats, or as the bits of its 16-bit type, aligned and contiguous."""
    if storage == F32:
        return np.ascontiguousarray(tensor.float32())
    return np.require(tensor.stored_as(storage).data, requirements=["C", "A"]).view(np.uint16)


def _empty_panels(groups: int, panels: int, k: int, storage: Format) -> npt.NDArray[Any]:
    """Return zeros that begin on a cache line: a vector load across two takes twice as long."""
    shape = (groups, panels, k, NR)
    count = math.prod(shape)
    itemsize = storage.block_bytes
    memory = np.zeros(count + CACHE_LINE // itemsize, np.float32 if storage == F32 else np.uint16)
    skipped = -memory.ctypes.data % CACHE_LINE // itemsize
    return memory[skipped : skipped + count].reshape(shape)


def _signature(element: types.Type) -> Any:
    source = types.Array(element, 2, "C", readonly=True)
    return types.void(source, types.Array(element, 3, "C"), ORDER, INT)


@kernel(_signature(FLOAT), _signature(WORD), parallel=True)
def _place(source: Any, panels: Any, order: Any, first: Any) -> None:
    """Put row r of `source` at place order[(first + r) % n] of panel (first + r) // n.

    COLUMNS_AT_ONCE columns are placed at a time: their part of the panel stays in the first-level
    cache.
    """
    n, (rows, k) = order.shape[0], source.shape
    for panel in numba.prange(first // n, -(-(first + rows) // n)):
        for begin in range(0, k, COLUMNS_AT_ONCE):
            end = min(k, begin + COLUMNS_AT_ONCE)
            for r in range(max(0, panel * n - first), min(rows, (panel + 1) * n - first)):
                place = order[first + r - panel * n]
                for c in range(begin, end):
                    panels[panel, c, place] = source[r, c]
