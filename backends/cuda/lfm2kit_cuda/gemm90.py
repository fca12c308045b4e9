"""Matrix products on Hopper's own tensor instructions: bf16 and fp16 on its chips, and fp32x3.

fp32x3 has the grade of float32: its weights are numbers that BF16 holds, and each activation is
the exact sum of three BF16 terms, which are multiplied by the same weights and added in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

import cupy

from lfm2kit.backend import BF16, Tensor
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit_cuda import few_rows90
from lfm2kit_cuda.activations import Rows, Slabs, slabs_bytes, split
from lfm2kit_cuda.ceilings import hopper_flops
from lfm2kit_cuda.constants import ACTIVATIONS, FEW_ROWS90, GEMM90, SLABS
from lfm2kit_cuda.device import sm_count
from lfm2kit_cuda.gemm16 import TensorCoreGemm
from lfm2kit_cuda.kernels import Kernel, load_kernel
from lfm2kit_cuda.products import Ctas, Listed, Matrix, RowTiles, Tiling, listed, padded, readable
from lfm2kit_cuda.upload import upload

PANEL, STEP = GEMM90.PANEL, GEMM90.STEP
TILE_K, ROW_BYTES = SLABS.SLAB, 2 * SLABS.SLAB  # k of a stage, and its bytes in a row
MOST_ROWS, MOST_ROWS_OF_TERMS = GEMM90.MOST_ROWS, GEMM90.MOST_ROWS_OF_TERMS
SHARED_BYTES = 224 * 1024
PACK_THREADS = 256

# Microseconds of a wave of CTAs at k = 2048, on an H200.  A CTA has a panel, or half of one and up
# to twice the rows.
CTAS = Ctas(
    threads=GEMM90.THREADS,
    sharing=(1.0,),
    menu={(rows, PANEL): max(10.2, 2 + 0.161 * rows) for rows in range(16, MOST_ROWS + 1, 16)}
    | {(rows, PANEL // 2): max(9.2, 2 + 0.08 * rows) for rows in range(32, 257, 32)},
)
CTAS_OF_TERMS = Ctas(
    threads=GEMM90.THREADS,
    sharing=(1.0,),
    menu={
        (rows, PANEL): max(21 + 0.125 * rows, 2 + 0.45 * rows)
        for rows in range(16, MOST_ROWS_OF_TERMS + 1, 8)
    }
    | {(rows, PANEL // 2): 19 + 0.09 * rows for rows in range(32, 129, 32)},
)


class HopperGemm(TensorCoreGemm):
    run, terms, most_rows = 1, 1, MOST_ROWS
    few_rows = FEW_ROWS90.MOST_ROWS  # of a tile, up to which it takes longest to read the weights

    def __init__(self, activation: str) -> None:
        super().__init__(activation)
        self._ctas = CTAS
        self._constants["TERMS"] = self.terms

    def flops_per_second(self) -> float:
        return hopper_flops(str(self._constants["MMA_TYPE"])) / self.terms

    def tiling(self, pairs: int, groups: int) -> Tiling:
        """Return tiles that hold the rows of most experts if routing is even.

        Stages of fewer rows are smaller, so that there are more of them.  Tiles of up to `few_rows`
        are multiplied by kernels of their own.
        """
        mean = pairs // groups
        return Tiling(min(self.most_rows, padded(mean + 4 * isqrt(mean) + 1, STEP)), STEP)

    def pack(self, matrices: Sequence[Tensor], scale: float = 1.0) -> Matrix:
        columns, inputs = matrices[0].shape
        packed = self._panels(len(matrices), inputs, columns)
        for panels, matrix in zip(packed, matrices, strict=True):
            self._panel(matrix, panels, stride=1, offset=0, scale=scale)
        return _matrix(packed, columns)

    def pack_gated(self, gates: Sequence[Tensor], ups: Sequence[Tensor]) -> Matrix:
        """Return one matrix of both: a row of w1, then one of w3, and so on."""
        columns, inputs = gates[0].shape
        packed = self._panels(len(gates), inputs, 2 * columns)
        for panels, gate, up in zip(packed, gates, ups, strict=True):
            self._panel(gate, panels, stride=2, offset=0)
            self._panel(up, panels, stride=2, offset=1)
        return _matrix(packed, columns)

    def packed_bytes(self, shape: tuple[int, ...]) -> int:
        return 2 * padded(shape[0], PANEL) * padded(shape[1], TILE_K)

    def _looks_up(self, tiles: RowTiles | Listed) -> bool:
        return tiles.tiling.rows <= self.few_rows

    def _launch(
        self,
        name: str,
        x: Slabs,
        matrix: Matrix,
        outputs: tuple[cupy.ndarray | None, ...],
        tiles: RowTiles | None,
        columns: int,
    ) -> None:
        if 0 < (tiles.tiling.rows if tiles else len(x)) <= self.few_rows:
            few_rows90.launch(name, x, matrix, outputs, tiles, columns, self._constants)
            return
        if tiles is None:
            tile_rows, tile_columns = self._ctas.best(len(x), matrix.width)
            count = -(-len(x) // tile_rows)
        else:
            tile_rows, tile_columns = tiles.tiling.rows, PANEL
            count = len(tiles.tiles)
        term_rows = padded(tile_rows, STEP)
        stage_bytes = ROW_BYTES * (tile_columns + self.terms * term_rows)
        self._kernel(name)(
            (min(sm_count(), count * (matrix.width // tile_columns)),), self._ctas.threads,
            x.array, matrix.packed, *outputs, *listed(tiles), tile_rows, tile_columns, len(x),
            x.extent, matrix.inputs // TILE_K, matrix.width, columns,
            min(GEMM90.MOST_STAGES, SHARED_BYTES // stage_bytes), stage_bytes, term_rows,
        )  # fmt: skip

    def _kernel(self, name: str) -> Kernel:
        return load_kernel("gemm90", f"{name}_wgmma", SHARED_BYTES, **self._constants)

    def _panels(self, groups: int, inputs: int, columns: int) -> cupy.ndarray:
        panels, steps = padded(columns, PANEL) // PANEL, padded(inputs, TILE_K) // TILE_K
        return cupy.zeros((groups, panels, steps, PANEL, TILE_K), cupy.uint16)

    def _panel(
        self, matrix: Tensor, panels: cupy.ndarray, stride: int, offset: int, scale: float = 1.0
    ) -> None:
        out, inputs = matrix.shape
        matrix = readable(matrix)
        kernel = load_kernel("packing", f"panel_{matrix.format}_{self._constants['HALF']}")
        weights, steps = self._uploaded(matrix), panels.shape[1]
        kernel((out,), PACK_THREADS, weights, panels, inputs, steps, stride, offset, scale)

    def _uploaded(self, matrix: Tensor) -> cupy.ndarray:
        return upload(matrix.data)


class ThreeTermGemm(HopperGemm):
    """A product whose activations are handed on in float32 and split when they are read.

    `rounded` leaves them as they are; what `gated` returns is split already.
    """

    terms, most_rows, few_rows = ACTIVATIONS.TERMS, MOST_ROWS_OF_TERMS, 0

    def __init__(self) -> None:
        super().__init__("BF16")
        self._ctas = CTAS_OF_TERMS
        self.activation = "F32"

    def empty(self, rows: int, columns: int) -> Rows:
        return Rows(cupy.empty((rows, columns), cupy.float32))

    def rounded(self, x: cupy.ndarray) -> Rows:
        return Rows(x)

    def empty_bytes(self, rows: int, columns: int) -> int:
        return 4 * rows * columns

    def rounded_bytes(self, rows: int, columns: int) -> int:
        return 0

    def arranged_bytes(
        self, rows: int, inputs: int, width: int, tiles: Listed | None = None
    ) -> int:
        return slabs_bytes(rows, inputs, self.terms)

    linear_rounded = TensorCoreGemm.linear

    def _slabs(self, x: Any, tiles: RowTiles | None) -> Slabs:
        """Return activations in terms, in the order of the tiles; what is split stays as it is."""
        if isinstance(x, Slabs):
            return x
        return split(x.array, tiles.source if tiles else None)

    def _uploaded(self, matrix: Tensor) -> cupy.ndarray:
        """Return the matrix on the device.

        Raise Lfm2kitError if BF16 does not hold its values.
        """
        weights = upload(matrix.data)
        if matrix.format == BF16:
            return weights
        found = cupy.zeros(1, cupy.int32)
        kernel = load_kernel("packing", f"find_inexact_{matrix.format}")
        kernel((matrix.shape[0],), PACK_THREADS, weights, matrix.shape[1], found)
        if int(found[0]):
            raise Lfm2kitError(
                f"precision fp32x3 takes weights that BF16 holds exactly, and '{matrix.name}' has "
                "others; try ",
                Option("precision", "fp32"),
            )
        return weights


def _matrix(packed: cupy.ndarray, columns: int) -> Matrix:
    return Matrix(packed, packed.shape[2] * TILE_K, columns, packed.shape[1] * PANEL)
