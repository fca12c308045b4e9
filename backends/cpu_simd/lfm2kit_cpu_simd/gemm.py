"""Grouped matrix products over packed weights: one driver for dense layers, experts and head.

Rows come sorted by group (an expert, or all rows for a dense layer).  The work is shared out as
(group, panel) pairs: a pair reads its weights once, whatever the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from lfm2kit_cpu_simd.elementwise import silu
from lfm2kit_cpu_simd.signatures import INT, OFFSETS, PANELS, ROWS, ROWS_OUT, VECTOR
from lfm2kit_cpu_simd.tile import MR, NR, TABLE, call_tile

Float32 = npt.NDArray[np.float32]
HALF = NR // 2


def pack(matrices: Sequence[Float32]) -> Float32:
    """[groups][out, in] -> panels [groups, ceil(out / NR), in, NR], padded with zeros."""
    rows, k = matrices[0].shape
    panels = np.zeros((len(matrices), -(-rows // NR), k, NR), np.float32)
    for panel, matrix in zip(panels, matrices, strict=True):
        for p in range(len(panel)):
            part = matrix[p * NR : (p + 1) * NR]
            panel[p, :, : len(part)] = part.T
    return panels


def pack_gated(gates: Sequence[Float32], ups: Sequence[Float32]) -> Float32:
    """w1 and w3 in turns, HALF columns each: a tile then holds both halves of its outputs."""
    rows, k = gates[0].shape
    panels = np.zeros((len(gates), -(-rows // HALF), k, NR), np.float32)
    for panel, gate, up in zip(panels, gates, ups, strict=True):
        for p in range(len(panel)):
            g, u = gate[p * HALF : (p + 1) * HALF], up[p * HALF : (p + 1) * HALF]
            panel[p, :, : len(g)] = g.T
            panel[p, :, HALF : HALF + len(u)] = u.T
    return panels


def packed_elements(shape: tuple[int, ...]) -> int:
    """Elements of a packed [out, in] matrix, padding included."""
    return -(-shape[0] // NR) * NR * math.prod(shape[1:])


NO_BIAS = np.empty(0, np.float32)


def linear(x: Float32, panels: Float32, columns: int, bias: Float32 = NO_BIAS) -> Float32:
    """x [rows, in] @ W.T + bias -> [rows, columns], W packed by `pack`."""
    out = np.empty((len(x), columns), np.float32)
    _grouped(x, _one_group(x), panels, bias, out, TABLE, numba.get_num_threads())
    return out


def grouped(x: Float32, offsets: npt.NDArray[np.int64], panels: Float32, columns: int) -> Float32:
    """Rows offsets[g] to offsets[g + 1] of x times matrix g; [rows, columns]."""
    out = np.empty((len(x), columns), np.float32)
    _grouped(x, offsets, panels, NO_BIAS, out, TABLE, numba.get_num_threads())
    return out


def gated(x: Float32, offsets: npt.NDArray[np.int64], panels: Float32, columns: int) -> Float32:
    """silu(x @ w1.T) * (x @ w3.T) by group, packed by `pack_gated`; [rows, columns]."""
    out = np.empty((len(x), columns), np.float32)
    _gated(x, offsets, panels, out, TABLE, numba.get_num_threads())
    return out


def all_rows(x: Float32) -> npt.NDArray[np.int64]:
    """The offsets of a single group that holds all rows."""
    return np.array([0, len(x)], dtype=np.int64)


_one_group = all_rows


@numba.njit(inline="always")
def _run_tile(x: Any, row: int, m: int, panel: Any, scratch: Any, table: Any) -> None:
    k = x.shape[1]
    at = x.ctypes.data + 4 * row * k
    call_tile(table[m], at, k, panel.ctypes.data, k, scratch.ctypes.data)


@numba.njit(
    types.void(ROWS, OFFSETS, PANELS, VECTOR, ROWS_OUT, OFFSETS, INT),
    parallel=True,
    cache=True,
)
def _grouped(
    x: Any, offsets: Any, panels: Any, bias: Any, out: Any, table: Any, threads: Any
) -> None:
    count = panels.shape[1]
    for thread in numba.prange(threads):
        scratch = np.empty((MR, NR), np.float32)
        for task in range(thread, panels.shape[0] * count, threads):
            group, p = task // count, task % count
            columns = min(NR, out.shape[1] - p * NR)
            for row in range(offsets[group], offsets[group + 1], MR):
                m = min(MR, offsets[group + 1] - row)
                _run_tile(x, row, m, panels[group, p], scratch, table)
                for i in range(m):
                    for j in range(columns):
                        out[row + i, p * NR + j] = scratch[i, j]
                if bias.size:
                    for i in range(m):
                        for j in range(columns):
                            out[row + i, p * NR + j] += bias[p * NR + j]


@numba.njit(
    types.void(ROWS, OFFSETS, PANELS, ROWS_OUT, OFFSETS, INT),
    parallel=True,
    cache=True,
    error_model="numpy",  # a check for division by zero would keep silu from being vectorised
)
def _gated(x: Any, offsets: Any, panels: Any, out: Any, table: Any, threads: Any) -> None:
    count = panels.shape[1]
    for thread in numba.prange(threads):
        scratch = np.empty((MR, NR), np.float32)
        for task in range(thread, panels.shape[0] * count, threads):
            group, p = task // count, task % count
            columns = min(HALF, out.shape[1] - p * HALF)
            for row in range(offsets[group], offsets[group + 1], MR):
                m = min(MR, offsets[group + 1] - row)
                _run_tile(x, row, m, panels[group, p], scratch, table)
                for i in range(m):
                    for j in range(HALF):
                        scratch[i, j] = silu(scratch[i, j]) * scratch[i, HALF + j]
                    for j in range(columns):
                        out[row + i, p * HALF + j] = scratch[i, j]
