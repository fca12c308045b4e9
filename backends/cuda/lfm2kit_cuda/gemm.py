"""Matrix products in float32: weights packed on the device, products by `gemm.cu`.

A dense layer is a product of one group; experts bring a list of row tiles made on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cupy

from lfm2kit.backend import Tensor
from lfm2kit_cuda.device import compute_capability, processors
from lfm2kit_cuda.kernels import Kernel, load_kernel
from lfm2kit_cuda.upload import upload

TILE_N, TILE_K, TILE_ROWS, THREADS = 128, 16, 128, 128
WIDTH = 256  # packed matrices have a multiple of so many columns
RUN = 32  # columns of w1 before as many of w3

# What gemm.cu makes of so many rows: columns of a block, and its cycles per k on a multiprocessor
# that others share (the busier of the multipliers and shared memory).
MENU = {16: (256, 48), 32: (256, 64), 48: (256, 96), 64: (256, 128), 96: (128, 96), 128: (128, 128)}


@dataclass(frozen=True, slots=True)
class Matrix:
    """Packed matrices, one per group; results have `columns` columns."""

    packed: cupy.ndarray
    inputs: int
    columns: int
    width: int  # columns with padding, and w1's and w3's both


@dataclass(frozen=True, slots=True)
class RowTiles:
    """Which rows belong to which group, as `group_by_expert` lists them."""

    rows: int
    tiles: cupy.ndarray  # int32 [most, 4]
    count: cupy.ndarray  # int32 [1]
    source: cupy.ndarray | None  # int32 [rows]: the row of x that each reads; None: its own

    def in_place(self) -> RowTiles:
        """The same rows of an x that is sorted already."""
        return replace(self, source=None)


class Gemm:
    """The arithmetic of precision fp32."""

    def pack(self, matrices: Sequence[Tensor]) -> Matrix:
        """[out, in] of each group."""
        columns, inputs = matrices[0].shape
        packed = _panels(len(matrices), inputs, columns)
        for panel, matrix in zip(packed, matrices, strict=True):
            _transpose(matrix, panel, run=columns, stride=0, offset=0)
        return Matrix(packed, inputs, columns, packed.shape[2])

    def pack_gated(self, gates: Sequence[Tensor], ups: Sequence[Tensor]) -> Matrix:
        """w1 and w3 of each group, in turns of RUN columns."""
        columns, inputs = gates[0].shape
        packed = _panels(len(gates), inputs, 2 * RUN * -(-columns // RUN))
        for panel, gate, up in zip(packed, gates, ups, strict=True):
            _transpose(gate, panel, run=RUN, stride=2 * RUN, offset=0)
            _transpose(up, panel, run=RUN, stride=2 * RUN, offset=RUN)
        return Matrix(packed, inputs, columns, packed.shape[2])

    def rounded(self, x: cupy.ndarray) -> cupy.ndarray:
        """Activations as the products read them."""
        return x

    def linear(
        self,
        x: cupy.ndarray,
        matrix: Matrix,
        bias: cupy.ndarray | None = None,
        tiles: RowTiles | None = None,
    ) -> cupy.ndarray:
        """x @ W.T + bias: float32 [rows, columns]."""
        out = cupy.empty((tiles.rows if tiles else len(x), matrix.columns), cupy.float32)
        _launch("linear", x, matrix, (bias, out), tiles)
        return out

    def gated(self, x: cupy.ndarray, matrix: Matrix, tiles: RowTiles | None = None) -> cupy.ndarray:
        """silu(x @ w1.T) * (x @ w3.T): [rows, columns], as the products read it."""
        out = cupy.empty((tiles.rows if tiles else len(x), matrix.columns), cupy.float32)
        _launch("gated", x, matrix, (out,), tiles)
        return out


def packed_bytes(shape: tuple[int, ...]) -> int:
    """Of one packed [out, in] matrix."""
    return 4 * -(-shape[0] // WIDTH) * WIDTH * shape[1]


def best_tile_rows(rows: int, width: int) -> int:
    """The rows of a tile for which the busiest multiprocessor has the least to do."""

    def cycles(tile_rows: int) -> float:
        columns, cycles_per_k = MENU[tile_rows]
        blocks = -(-rows // tile_rows) * (width // columns)
        per_processor = -(-blocks // processors())
        alone = 1.5 if per_processor == 1 else 1.0  # one block cannot fill a multiprocessor
        return alone * per_processor * cycles_per_k

    return min(reversed(MENU), key=cycles)


def _launch(
    name: str, x: cupy.ndarray, matrix: Matrix, outputs: tuple[Any, ...], tiles: RowTiles | None
) -> None:
    column_tiles = matrix.width // TILE_N
    if tiles is not None:
        grid = (column_tiles, len(tiles.tiles))
        listed = (tiles.tiles, tiles.count, TILE_ROWS, tiles.rows)
        source = tiles.source
    else:
        rows = best_tile_rows(len(x), matrix.width)
        grid = (column_tiles, -(-len(x) // rows))
        listed, source = (None, None, rows, len(x)), None
    _kernel(name)(
        grid, THREADS, x, source, matrix.packed, *outputs, *listed,
        matrix.inputs, matrix.width, matrix.columns,
    )  # fmt: skip


def _kernel(name: str) -> Kernel:
    stages = 4 if compute_capability() >= (8, 0) else 3
    widest = max(rows + 4 + columns for rows, (columns, _) in MENU.items())
    shared_bytes = 4 * stages * TILE_K * widest
    return load_kernel("gemm", name, shared_bytes, STAGES=stages, TILE_K=TILE_K)


def _panels(groups: int, inputs: int, columns: int) -> cupy.ndarray:
    return cupy.zeros((groups, inputs, -(-columns // WIDTH) * WIDTH), cupy.float32)


def _transpose(matrix: Tensor, panel: cupy.ndarray, run: int, stride: int, offset: int) -> None:
    out, inputs = matrix.shape
    kernel = load_kernel("packing", f"transpose_{matrix.dtype}")
    grid = (-(-out // 32), -(-inputs // 32))
    kernel(grid, 256, upload(matrix.data), panel, out, inputs, panel.shape[1], run, stride, offset)
