"""Grouped matrix products over packed weights: one driver for dense layers, experts and head.

Rows come sorted by group (an expert, or all rows for a dense layer), and are taken in blocks that
stay in the second-level cache.  Threads take in turns a block and a panel.  A panel is taken in
stretches of k that stay in the first-level cache while all rows of the block use them; meanwhile
the stretch that comes next is fetched, as evenly as the multiply-adds go on.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from lfm2kit_cpu_simd.buffers import BUFFERS
from lfm2kit_cpu_simd.compiling import kernel
from lfm2kit_cpu_simd.crew import CREW
from lfm2kit_cpu_simd.elementwise import silu
from lfm2kit_cpu_simd.machine import NR
from lfm2kit_cpu_simd.packing import HALF, Panels
from lfm2kit_cpu_simd.signatures import BOOL, INT, OFFSETS, ROWS, ROWS_OUT, TABLE, VECTOR
from lfm2kit_cpu_simd.tile import (
    ALONE,
    CACHE_LINE,
    FIRST,
    LATER,
    MR,
    SHARED_FROM,
    TABLES,
    UNROLL,
    call_tile,
)

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

NO_BIAS = np.empty(0, np.float32)
# Of k: in float32 32 KB of a panel.  Sums of sums: one chain over all of k would round worse.
STRETCH = 128
ROWS_AT_ONCE = 12 * MR  # of 2048 floats: 576 KB


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
    data, storage = panels.data, panels.storage
    _grouped(
        x, offsets, data.ctypes.data, data.shape[1], data.itemsize, TABLES[storage],
        SHARED_FROM[storage], panels.is_gated, bias, out, CREW.size(),
    )  # fmt: skip
    return out


@numba.njit(inline="always")
def _finish(
    sums: Any, first: Any, m: Any, row: Any, panel: Any, is_gated: Any, bias: Any, out: Any
) -> None:
    """Stores m rows of a panel's sums, from `first` on, in `out`, after the gate or the bias."""
    width = HALF if is_gated else NR
    at = panel * width
    columns = min(width, out.shape[1] - at)
    for i in range(m):
        if is_gated:
            for j in range(HALF):
                sums[first + i, j] = silu(sums[first + i, j]) * sums[first + i, HALF + j]
        for j in range(columns):
            out[row + i, at + j] = sums[first + i, j]
        if bias.size:
            for j in range(columns):
                out[row + i, at + j] += bias[at + j]


@numba.njit(inline="always")
def _multiply(
    x: Any, row: Any, rows: Any, weights: Any, following: Any, itemsize: Any, table: Any,
    shared_from: Any, sums: Any, wide: Any, panel: Any, is_gated: Any, bias: Any, out: Any,
) -> None:  # fmt: skip
    """So many rows of x, from `row` on, times the panel at address `weights`, into `out`.

    A tile's rows are stored at once: their way to memory goes on while the next tile computes.
    """
    k = x.shape[1]
    row_bytes = NR * itemsize
    tiles = -(-rows // MR)
    lines = -(-UNROLL * row_bytes // (CACHE_LINE * tiles))
    is_shared = tiles >= shared_from
    sums[:rows] = 0
    for first in range(0, k, STRETCH):
        depth = min(STRETCH, k - first)
        is_last = first + depth == k
        at = weights + first * row_bytes
        ahead = following if is_last else at + depth * row_bytes
        kind = FIRST if is_shared else ALONE
        done = 0
        for tile in range(tiles):
            m = (rows - done) // (tiles - tile)  # of nearly the same height
            call_tile(
                table[kind, m], x.ctypes.data + 4 * ((row + done) * k + first), k, at, depth,
                sums[done].ctypes.data, ahead, lines, wide.ctypes.data,
            )  # fmt: skip
            if is_last:
                _finish(sums, done, m, row + done, panel, is_gated, bias, out)
            if is_shared:
                kind, at = LATER, np.int64(wide.ctypes.data)
            ahead += depth // UNROLL * lines * CACHE_LINE
            done += m


@numba.njit(inline="always")
def following_panel(
    group: Any, panel: Any, count: Any, groups: Any, threads: Any, is_again: Any
) -> Any:
    """The place among all groups' panels of the one to fetch while this one is multiplied.

    A thread takes the next of its turns, and past the group's last one the group's first ones
    again, or else the next group's; where nothing comes any more, this one.
    """
    this = group * count + panel
    if is_again:
        return group * count + (panel + threads) % count
    return this + threads if this + threads < groups * count else this


@kernel(
    types.void(ROWS, OFFSETS, INT, INT, INT, TABLE, INT, BOOL, VECTOR, ROWS_OUT, INT),
    parallel=True,
    error_model="numpy",  # a check for division by zero would keep silu from being vectorised
)
def _grouped(
    x: Any,
    offsets: Any,
    panels_at: Any,
    count: Any,
    itemsize: Any,
    table: Any,
    shared_from: Any,
    is_gated: Any,
    bias: Any,
    out: Any,
    threads: Any,
) -> None:
    size, groups = itemsize * NR * x.shape[1], offsets.shape[0] - 1
    for thread in numba.prange(threads):
        sums = np.empty((ROWS_AT_ONCE, NR), np.float32)
        memory = np.empty(STRETCH * NR + CACHE_LINE // 4, np.float32)
        # An array to the end: of one whose address alone is used Numba may free the memory.
        wide = memory[-(memory.ctypes.data // 4) % (CACHE_LINE // 4) :]
        tasks = 0
        for group in range(groups):
            first, rows = offsets[group], offsets[group + 1] - offsets[group]
            blocks = -(-rows // ROWS_AT_ONCE)
            for block in range(blocks):
                begin, end = rows * block // blocks, rows * (block + 1) // blocks
                for panel in range((thread - tasks) % threads, count, threads):
                    at = panels_at + (group * count + panel) * size
                    place = following_panel(
                        group, panel, count, groups, threads, block + 1 < blocks
                    )
                    _multiply(x, first + begin, end - begin, at, panels_at + place * size,
                              itemsize, table, shared_from, sums, wide, panel, is_gated, bias,
                              out)  # fmt: skip
                tasks += count
