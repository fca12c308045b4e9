"""Grouped matrix products over packed weights: one driver for dense layers, experts and head.

Rows come sorted by group (an expert, or all rows for a dense layer), and are cut into bands that
stay in the second-level cache.  A task is a band and a panel.  Threads take the tasks in turn, each
the next one as soon as it has begun one: cores that others share, or that wake late, do fewer.  A
panel is cut into stretches of k that stay in the first-level cache
while all rows of the band use them.  Meanwhile the next stretch is fetched, a few cache lines at a
time.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from lfm2kit_cpu_simd.buffers import BUFFERS
from lfm2kit_cpu_simd.chains import CHAINS, chain_bounds
from lfm2kit_cpu_simd.claiming import claimed
from lfm2kit_cpu_simd.compiling import kernel
from lfm2kit_cpu_simd.crew import CREW
from lfm2kit_cpu_simd.elementwise import silu
from lfm2kit_cpu_simd.machine import NR
from lfm2kit_cpu_simd.one_row import ONE_ROW, call_one_row
from lfm2kit_cpu_simd.packing import HALF, Panels
from lfm2kit_cpu_simd.signatures import BOOL, INT, OFFSETS, ROWS, ROWS_OUT, TABLE, VECTOR
from lfm2kit_cpu_simd.tile import (
    ALONE,
    CACHE_LINE,
    FIRST,
    LATER,
    MR,
    ROWS_AT_ONCE,
    SHARED_FROM,
    TABLES,
    UNROLL,
    call_tile,
)

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

NO_BIAS = np.empty(0, np.float32)
# k of a stretch: at most 32 KB of a panel in float32.
STRETCH = 128


def linear(
    x: Float32,
    panels: Panels,
    columns: int,
    bias: Float32 = NO_BIAS,
    *,
    buffer: str | None = None,
) -> Float32:
    """Return x [rows, in] @ W.T + bias: [rows, columns]; see `grouped`."""
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
    """Multiply rows offsets[g] to offsets[g + 1] of x by matrix g, and return [rows, columns].

    With gated panels the result is silu(x @ w1.T) * (x @ w3.T).  All groups have the same `bias`.
    The result is a new array, or lies in the `buffer` of that role.
    """
    if buffer is None:
        out = np.empty((len(x), columns), np.float32)
    else:
        out = BUFFERS.array(buffer, len(x), columns)
    data, storage = panels.data, panels.storage
    _grouped(
        x, offsets, panels.address, data.shape[1], data.itemsize, TABLES[storage],
        SHARED_FROM[storage], ONE_ROW[storage], panels.is_gated, bias, out, CREW.size(),
    )  # fmt: skip
    return out


@numba.njit(inline="always")
def _finish(
    sums: Any, first: Any, m: Any, row: Any, panel: Any, is_gated: Any, bias: Any, out: Any
) -> None:
    """Store m rows of a panel's sums, from `first` on, in `out`, after the gate or the bias."""
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
    x: Any, bounds: Any, row: Any, rows: Any, weights: Any, following: Any, itemsize: Any,
    table: Any, shared_from: Any, one_row: Any, sums: Any, wide: Any, panel: Any, is_gated: Any,
    bias: Any, out: Any,
) -> None:  # fmt: skip
    """Multiply `rows` rows of x, from `row` on, by the panel at address `weights`, into `out`.

    A tile's rows are stored as soon as they are summed, so that they go to memory while the next
    tile computes.
    """
    k = x.shape[1]
    if rows == 1 and one_row and bounds.shape[0] > CHAINS:
        sums[0] = 0
        x_at = x.ctypes.data + 4 * row * k
        call_one_row(one_row, x_at, weights, sums.ctypes.data, bounds.ctypes.data)
        _finish(sums, 0, 1, row, panel, is_gated, bias, out)
        return
    row_bytes = NR * itemsize
    tiles = -(-rows // MR)
    lines = -(-UNROLL * row_bytes // (CACHE_LINE * tiles))
    is_shared = tiles >= shared_from
    sums[:rows] = 0
    # A single tile uses no weight twice: its first stretch has all but the last STRETCH.
    most = STRETCH if tiles > 1 else max(STRETCH, k - STRETCH)
    last, chain = 0, 0
    while last < k:
        first, last = last, min(last + most, k)
        is_last = last == k
        while bounds[chain + 1] <= first:
            chain += 1
        at = weights + first * row_bytes
        ahead = following if is_last else weights + (first + STRETCH) * row_bytes
        kind = FIRST if is_shared else ALONE
        done = 0
        for tile in range(tiles):
            m = (rows - done) // (tiles - tile)  # tiles have nearly the same height
            call_tile(
                table[kind, m], x.ctypes.data + 4 * ((row + done) * k + first), at,
                sums[done].ctypes.data, lines, k, first, last, bounds.ctypes.data + 8 * chain,
                ahead, wide.ctypes.data,
            )  # fmt: skip
            if is_last:
                _finish(sums, done, m, row + done, panel, is_gated, bias, out)
            if is_shared:
                kind, at = LATER, np.int64(wide.ctypes.data)
            ahead += (last - first) // UNROLL * lines * CACHE_LINE
            done += m


@numba.njit(inline="always")
def bands_of(rows: Any) -> Any:
    """Return into how many bands the rows of a group are cut."""
    return -(-rows // ROWS_AT_ONCE)


@numba.njit(inline="always")
def group_of(task: Any, group: Any, before: Any, offsets: Any, count: Any) -> Any:
    """Return the group of a task and the number of tasks before that group's.

    The search begins at a `group`, which has `before` tasks before it.  Each group has `count`
    panels.  After the last task, the group is the number of groups.
    """
    while group < offsets.shape[0] - 1:
        tasks = bands_of(offsets[group + 1] - offsets[group]) * count
        if task < before + tasks:
            break
        before += tasks
        group += 1
    return group, before


@kernel(
    types.void(ROWS, OFFSETS, INT, INT, INT, TABLE, INT, INT, BOOL, VECTOR, ROWS_OUT, INT),
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
    one_row: Any,
    is_gated: Any,
    bias: Any,
    out: Any,
    threads: Any,
) -> None:
    size, groups = itemsize * NR * x.shape[1], offsets.shape[0] - 1
    counter = np.empty(1, np.int64)
    counter[0] = 0
    for _ in numba.prange(threads):
        memory = np.empty((2 * ROWS_AT_ONCE + STRETCH) * NR + CACHE_LINE // 4, np.float32)
        # Both begin on a cache line: a vector across two takes twice as long.  They are used as
        # arrays to the end, because Numba may free one of which only the address is used.
        aligned = memory[-(memory.ctypes.data // 4) % (CACHE_LINE // 4) :]
        # The latter half of sums is for unfinished chains.
        sums = aligned[: 2 * ROWS_AT_ONCE * NR].reshape((2 * ROWS_AT_ONCE, NR))
        wide = aligned[2 * ROWS_AT_ONCE * NR :]
        bounds = chain_bounds(x.shape[1])
        task = claimed(counter)
        group, before = group_of(task, 0, 0, offsets, count)
        while group < groups:
            following = claimed(counter)  # now, to fetch its panel meanwhile
            next_group, next_before = group_of(following, group, before, offsets, count)
            first, rows = offsets[group], offsets[group + 1] - offsets[group]
            band, panel = (task - before) // count, (task - before) % count
            begin, end = rows * band // bands_of(rows), rows * (band + 1) // bands_of(rows)
            at = panels_at + (group * count + panel) * size
            ahead = at  # after the last task
            if next_group < groups:
                next_panel = (following - next_before) % count
                ahead = panels_at + (next_group * count + next_panel) * size
            _multiply(x, bounds, first + begin, end - begin, at, ahead, itemsize, table,
                      shared_from, one_row, sums, wide, panel, is_gated, bias, out)  # fmt: skip
            task, group, before = following, next_group, next_before
