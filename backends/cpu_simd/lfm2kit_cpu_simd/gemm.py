"""Grouped matrix products over packed weights: one driver for dense layers, experts and head.

Rows come sorted by group (an expert, or all rows for a dense layer).  The work is shared out as
(group, panel) pairs: a pair reads its weights once, whatever the number of rows, and while it
computes it fetches the panel that its thread takes next.
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
from lfm2kit_cpu_simd.tile import MR, NR, call_tile

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

NO_BIAS = np.empty(0, np.float32)
# With so few rows a tile is done before its memory arrives: it fetches just ahead of itself.
# Taller ones fetch the panel that comes next.
SKINNY = 4
JUST_AHEAD = 1024  # bytes
# Sums of sums: the error of one chain over all of k would be twice as large.
STRETCH = 512


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
    x: Any, row: Any, m: Any, panel: Any, itemsize: Any, table: Any, ahead: Any, product: Any,
    sums: Any,
) -> None:  # fmt: skip
    """sums [m, NR] of rows row to row + m of x and a panel, a stretch of k at a time."""
    k = x.shape[1]
    for first in range(0, k, STRETCH):
        out = product if first else sums
        skipped = first * NR * itemsize
        call_tile(
            table[m], x.ctypes.data + 4 * (row * k + first), k, panel + skipped,
            min(STRETCH, k - first), out.ctypes.data, ahead + skipped,
        )  # fmt: skip
        if first:
            for i in range(m):
                for j in range(NR):
                    sums[i, j] += product[i, j]


@numba.njit(inline="always")
def _finish(scratch: Any, row: Any, m: Any, panel: Any, is_gated: Any, bias: Any, out: Any) -> None:
    """Stores a tile's rows in `out`, after the gate or the bias."""
    width = HALF if is_gated else NR
    at = panel * width
    columns = min(width, out.shape[1] - at)
    for i in range(m):
        if is_gated:
            for j in range(HALF):
                scratch[i, j] = silu(scratch[i, j]) * scratch[i, HALF + j]
        for j in range(columns):
            out[row + i, at + j] = scratch[i, j]
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
    k = x.shape[1]
    size = itemsize * NR * k
    tasks = (offsets.shape[0] - 1) * count
    for thread in numba.prange(threads):
        scratch = np.empty((MR, NR), np.float32)
        product = np.empty((MR, NR), np.float32)
        for task in range(thread, tasks, threads):
            first, last = offsets[task // count], offsets[task // count + 1]
            if first == last:
                continue
            panel = panels_at + task * size
            following = panel + threads * size if task + threads < tasks else panel
            tiles = -(-(last - first) // MR)
            row = first
            for tile in range(tiles):
                m = (last - row) // (tiles - tile)  # of nearly the same height
                elsewhere = following if tile == 0 else panel
                ahead = panel + JUST_AHEAD if m <= SKINNY else elsewhere
                _multiply(x, row, m, panel, itemsize, table, ahead, product, scratch)
                _finish(scratch, row, m, task % count, is_gated, bias, out)
                row += m
