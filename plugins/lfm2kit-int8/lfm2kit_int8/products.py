"""Products of rows and packed int8 matrices, on all threads, and the sum of experts' products.

A task is a block of a group's matrix and all rows of the group (an expert's, or all of a dense
layer).  Threads take tasks in turn, because cores that others share do fewer.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from lfm2kit_cpu_simd.compiling import kernel
from lfm2kit_cpu_simd.crew import CREW
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lfm2kit_int8.formats import Float32
from lfm2kit_int8.packing import BLOCK, LINE, PANELS, ROWS, Panels
from lfm2kit_int8.tile import MOST_ROWS, TILES, call_tile

Int64 = npt.NDArray[np.int64]

BOOL, INT, OUT = types.boolean, types.int64, types.float32[:, ::1]
INDICES, INDICES_2D = (types.Array(INT, n, "C", readonly=True) for n in (1, 2))
MATRIX, SCALES = (types.Array(types.float32, n, "C", readonly=True) for n in (2, 3))


def product(x: Float32, rows: Int64, offsets: Int64, panels: Panels) -> Float32:
    """Return [len(rows), columns]: rows offsets[g] to offsets[g + 1] are of group g's matrix.

    Row i is the product of x[rows[i]], and silu(x @ w1.T) * (x @ w3.T) if the panels are gated.
    """
    out = np.empty((len(rows), panels.columns), np.float32)
    address, threads = panels.data.ctypes.data, CREW.size()
    _product(x, rows, offsets, address, panels.scales, panels.is_gated, TILES, out, threads)
    return out


def combine(products: Float32, places: Int64, weights: Float32, delta: Float32) -> None:
    """Compute delta[row], the sum over k, in order, of weights[row, k] * products[places[row, k]].

    At a place of -1 there is none.  Terms are rounded before they are added, as elsewhere.
    """
    CREW.size()  # sets the number of threads
    _combine(products, places, weights, delta)


@intrinsic
def _claimed(typingctx: Any, counter: Any) -> Any:
    """Return counter[0] of an int64 array, and add 1 to it; no two threads get the same number."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array = context.make_array(sig.args[0])(context, builder, args[0])
        return builder.atomic_rmw("add", array.data, ir.IntType(64)(1), "monotonic")

    return types.int64(counter), codegen


@numba.njit(inline="always")
def _finish(sums: Any, scales: Any, is_gated: Any, out: Any) -> None:
    """Scale the sums [m, BLOCK] of a block, and store those that `out` [m, columns] has."""
    for i in range(out.shape[0]):
        for c in range(out.shape[1]):
            y = sums[i, c] * scales[c]
            if is_gated:
                up = sums[i, BLOCK // 2 + c] * scales[BLOCK // 2 + c]
                y = y / (np.float32(1) + math.exp(-y)) * up
            out[i, c] = y


@numba.njit(inline="always")
def _multiply(
    x: Any, rows: Any, panels_at: Any, scales: Any, is_gated: Any, tiles: Any, out: Any
) -> None:
    """Multiply x[rows] by a block, in parts of nearly the same number of rows."""
    xs, sums = np.empty(MOST_ROWS, np.int64), np.empty((MOST_ROWS, BLOCK), np.float32)
    count, k = rows.shape[0], x.shape[1]
    panel_bytes = -(-k // LINE) * ROWS * LINE
    parts = -(-count // MOST_ROWS)
    for part in range(parts):
        at, after = count * part // parts, count * (part + 1) // parts
        for i in range(after - at):
            xs[i] = x.ctypes.data + 4 * k * rows[at + i]
        for panel in range(min(PANELS, out.shape[1])):
            panel_at, sums_at = panels_at + panel * panel_bytes, sums.ctypes.data + 4 * panel
            call_tile(tiles[after - at], xs.ctypes.data, panel_at, k, sums_at)
        _finish(sums, scales, is_gated, out[at:after])


@kernel(
    types.void(MATRIX, INDICES, INDICES, INT, SCALES, BOOL, INDICES, OUT, INT),
    parallel=True,
    error_model="numpy",  # x / 0 is inf, and no branch
)
def _product(
    x: Any, rows: Any, offsets: Any, panels_at: Any, scales: Any, is_gated: Any, tiles: Any,
    out: Any, threads: Any,
) -> None:  # fmt: skip
    groups, blocks = scales.shape[:2]
    width = BLOCK // 2 if is_gated else BLOCK
    block_bytes = -(-x.shape[1] // LINE) * BLOCK * LINE
    counter = np.zeros(1, np.int64)
    for _ in numba.prange(threads):
        task = _claimed(counter)
        while task < groups * blocks:
            group, block = task // blocks, task % blocks
            begin, end, at = offsets[group], offsets[group + 1], panels_at + task * block_bytes
            part = out[begin:end, block * width : (block + 1) * width]
            _multiply(x, rows[begin:end], at, scales[group, block], is_gated, tiles, part)
            task = _claimed(counter)


@kernel(types.void(MATRIX, INDICES_2D, MATRIX, OUT), parallel=True)
def _combine(products: Any, places: Any, weights: Any, delta: Any) -> None:
    for row in numba.prange(delta.shape[0]):
        is_first = True
        for k in range(places.shape[1]):
            place = places[row, k]
            if place < 0:
                continue
            for c in range(delta.shape[1]):
                term = weights[row, k] * products[place, c]
                delta[row, c] = term if is_first else delta[row, c] + term
            is_first = False
        if is_first:
            delta[row] = np.float32(0)
