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

TILE_N, TILE_K, TILE_ROWS, THREADS = 128, 16, 128, 256
RUN = 32  # columns of w1 before as many of w3


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
    return 4 * -(-shape[0] // TILE_N) * TILE_N * shape[1]


def best_tile_rows(rows: int, column_tiles: int) -> int:
    """The rows of a tile that leave the fewest idle multiprocessors and little padding.

    A model of the time: the busiest multiprocessor's blocks, each as long as its rows plus what
    reading the weights costs; one block alone cannot fill a multiprocessor.
    """

    def cost(sixteens: int) -> float:
        blocks = -(-rows // (16 * sixteens)) * column_tiles
        per_processor = -(-blocks // processors())
        return per_processor * (sixteens + 0.7) * (1.3 if per_processor == 1 else 1)

    return 16 * min(range(TILE_ROWS // 16, 0, -1), key=cost)


def _launch(
    name: str, x: cupy.ndarray, matrix: Matrix, outputs: tuple[Any, ...], tiles: RowTiles | None
) -> None:
    column_tiles = matrix.width // TILE_N
    if tiles is not None:
        grid = (column_tiles, len(tiles.tiles))
        listed = (tiles.tiles, tiles.count, TILE_ROWS, tiles.rows)
        source = tiles.source
    else:
        rows = best_tile_rows(len(x), column_tiles)
        grid = (column_tiles, -(-len(x) // rows))
        listed, source = (None, None, rows, len(x)), None
    _kernel(name, matrix.inputs)(
        grid, THREADS, x, source, matrix.packed, *outputs, *listed,
        matrix.inputs, matrix.width, matrix.columns,
    )  # fmt: skip


def _kernel(name: str, inputs: int) -> Kernel:
    stages = 4 if compute_capability() >= (8, 0) else 3
    shared_bytes = 4 * stages * (TILE_ROWS * (TILE_K + 4) + TILE_K * TILE_N)
    vector = 4 if inputs % 4 == 0 else 1
    return load_kernel("gemm", name, shared_bytes, VECTOR=vector, STAGES=stages, TILE_K=TILE_K)


def _panels(groups: int, inputs: int, columns: int) -> cupy.ndarray:
    return cupy.zeros((groups, inputs, -(-columns // TILE_N) * TILE_N), cupy.float32)


def _transpose(matrix: Tensor, panel: cupy.ndarray, run: int, stride: int, offset: int) -> None:
    out, inputs = matrix.shape
    kernel = load_kernel("packing", f"transpose_{matrix.dtype}")
    grid = (-(-out // 32), -(-inputs // 32))
    kernel(grid, 256, upload(matrix.data), panel, out, inputs, panel.shape[1], run, stride, offset)
