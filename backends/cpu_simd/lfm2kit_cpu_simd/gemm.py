"""Grouped matrix products over packed weights: one driver for dense layers, experts and head.

Rows come sorted by group (an expert, or all rows for a dense layer).  The work is shared out as
(group, panel) pairs: a pair reads its weights once, whatever the number of rows.  A panel is taken
in stretches of k that stay in the first-level cache while all rows use them; meanwhile the
stretch that comes next is fetched, as evenly as the multiply-adds go on.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from lfm2kit_cpu_simd.buffers import BUFFERS
from lfm2kit_cpu_simd.elementwise import silu
from lfm2kit_cpu_simd.packing import HALF, Panels
from lfm2kit_cpu_simd.signatures import BOOL, INT, OFFSETS, ROWS, ROWS_OUT, TABLE, VECTOR
from lfm2kit_cpu_simd.tile import CACHE_LINE, MR, NR, UNROLL, call_tile

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

NO_BIAS = np.empty(0, np.float32)
# Of k: in float32 32 KB of a panel.  Sums of sums: one chain over all of k would round worse.
STRETCH = 128
ROWS_AT_ONCE = 8 * MR  # their sums stay in the first-level cache as well


def linear(
    x: Float32,
    panels: Panels,
    columns: int,
    bias: Float32 = NO_BIAS,
    *,
    buffer: str | None = None,
) -> Float32:
    """x [rows, in] @ W.T + bias -> [rows, columns]; see `grouped`."""
    return grouped(x, np.array([0, len(x)]), panels, columns, bias, buffer=buffer)


def grouped(
    x: Float32,
    offsets: Int64,
    panels: Panels,
    columns: int,
    bias: Float32 = NO_BIAS,
    *,
    buffer: str | None = None,
) -> Float32:
    """Rows offsets[g] to offsets[g + 1] of x times matrix g -> [rows, columns].

    Gated panels: silu(x @ w1.T) * (x @ w3.T).  `bias` is every group's.  The result is a new
    array, or lies in the `buffer` of that role.
    """
    if buffer is None:
        out = np.empty((len(x), columns), np.float32)
    else:
        out = BUFFERS.array(buffer, len(x), columns)
    data = panels.data
    _grouped(
        x, offsets, data.ctypes.data, data.shape[1], data.itemsize, panels.table, panels.is_gated,
        bias, out, numba.get_num_threads(),
    )  # fmt: skip
    return out


@numba.njit(inline="always")
def _multiply(
    x: Any, row: Any, rows: Any, panel: Any, following: Any, itemsize: Any, table: Any, sums: Any
) -> None:  # fmt: skip
    """sums [rows, NR] of so many rows of x, from `row` on, and a panel."""
    k = x.shape[1]
    row_bytes = NR * itemsize
    tiles = -(-rows // MR)
    lines = -(-UNROLL * row_bytes // (CACHE_LINE * tiles))
    sums[:rows] = 0
    for first in range(0, k, STRETCH):
        depth = min(STRETCH, k - first)
        at = panel + first * row_bytes
        ahead = at + depth * row_bytes if first + depth < k else following
        done = 0
        for tile in range(tiles):
            m = (rows - done) // (tiles - tile)  # of nearly the same height
            call_tile(
                table[m], x.ctypes.data + 4 * ((row + done) * k + first), k, at, depth,
                sums[done].ctypes.data, ahead, lines,
            )  # fmt: skip
            ahead += depth // UNROLL * lines * CACHE_LINE
            done += m


@numba.njit(inline="always")
def _finish(sums: Any, row: Any, rows: Any, panel: Any, is_gated: Any, bias: Any, out: Any) -> None:
    """Stores a panel's sums in `out`, after the gate or the bias."""
    width = HALF if is_gated else NR
    at = panel * width
    columns = min(width, out.shape[1] - at)
    for i in range(rows):
        if is_gated:
            for j in range(HALF):
                sums[i, j] = silu(sums[i, j]) * sums[i, HALF + j]
        for j in range(columns):
            out[row + i, at + j] = sums[i, j]
        if bias.size:
            for j in range(columns):
                out[row + i, at + j] += bias[at + j]


@numba.njit(
    types.void(ROWS, OFFSETS, INT, INT, INT, TABLE, BOOL, VECTOR, ROWS_OUT, INT),
    parallel=True,
    cache=True,
    error_model="numpy",  # a check for division by zero would keep silu from being vectorised
)
def _grouped(
    x: Any,
    offsets: Any,
    panels_at: Any,
    count: Any,
    itemsize: Any,
    table: Any,
    is_gated: Any,
    bias: Any,
    out: Any,
    threads: Any,
) -> None:
    size = itemsize * NR * x.shape[1]
    tasks = (offsets.shape[0] - 1) * count
    for thread in numba.prange(threads):
        sums = np.empty((ROWS_AT_ONCE, NR), np.float32)
        for task in range(thread, tasks, threads):
            first, last = offsets[task // count], offsets[task // count + 1]
            panel = panels_at + task * size
            following = panel + threads * size if task + threads < tasks else panel
            for row in range(first, last, ROWS_AT_ONCE):
                rows = min(ROWS_AT_ONCE, last - row)
                _multiply(x, row, rows, panel, following, itemsize, table, sums)
                _finish(sums, row, rows, task % count, is_gated, bias, out)
