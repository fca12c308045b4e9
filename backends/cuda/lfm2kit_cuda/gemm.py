"""Matrix products in float32: the arithmetic of precision fp32."""

from __future__ import annotations

from collections.abc import Sequence

import cupy

from lfm2kit.backend import Tensor
from lfm2kit_cuda.kernels import Kernel, load_kernel
from lfm2kit_cuda.products import Blocks, Matrix, RowTiles, launch, padded
from lfm2kit_cuda.upload import upload

TILE_K, STAGES, TILE_ROWS = 8, 4, 48
WIDTH = 256  # columns of a panel, which a block multiplies by
RUN = 32  # columns of w1 before as many of w3
BLOCKS = Blocks(
    threads=128,
    sharing=(1.45, 2.1, 3.0),
    menu={(48, WIDTH): 100, (32, WIDTH): 71, (16, WIDTH): 47},
)


class Gemm:
    activation = "F32"
    tile_rows = TILE_ROWS
    tile_step = 8

    def pack(self, matrices: Sequence[Tensor]) -> Matrix:
        columns, inputs = matrices[0].shape
        packed = _panels(len(matrices), inputs, columns)
        for panel, matrix in zip(packed, matrices, strict=True):
            _transpose(matrix, panel, run=columns, stride=0, offset=0)
        return Matrix(packed, inputs, columns, packed.shape[1] * WIDTH)

    def pack_gated(self, gates: Sequence[Tensor], ups: Sequence[Tensor]) -> Matrix:
        """w1 and w3 in turns of RUN columns."""
        columns, inputs = gates[0].shape
        packed = _panels(len(gates), inputs, 2 * padded(columns, RUN))
        for panel, gate, up in zip(packed, gates, ups, strict=True):
            _transpose(gate, panel, run=RUN, stride=2 * RUN, offset=0)
            _transpose(up, panel, run=RUN, stride=2 * RUN, offset=RUN)
        return Matrix(packed, inputs, columns, packed.shape[1] * WIDTH)

    pack_down = pack

    def packed_bytes(self, shape: tuple[int, ...]) -> int:
        return 4 * padded(shape[0], WIDTH) * shape[1]

    def empty(self, rows: int, columns: int) -> cupy.ndarray:
        return cupy.empty((rows, columns), cupy.float32)

    def rounded(self, x: cupy.ndarray) -> cupy.ndarray:
        return x

    def linear(
        self,
        x: cupy.ndarray,
        matrix: Matrix,
        bias: cupy.ndarray | None = None,
        tiles: RowTiles | None = None,
    ) -> cupy.ndarray:
        out = self.empty(tiles.rows if tiles else len(x), matrix.columns)
        self._launch("linear", x, matrix, (bias, out), tiles)
        return out

    def gated(self, x: cupy.ndarray, matrix: Matrix, tiles: RowTiles | None = None) -> cupy.ndarray:
        out = self.empty(tiles.rows if tiles else len(x), matrix.columns)
        self._launch("gated", x, matrix, (out,), tiles)
        return out

    def _launch(
        self,
        name: str,
        x: cupy.ndarray,
        matrix: Matrix,
        outputs: tuple[cupy.ndarray | None, ...],
        tiles: RowTiles | None,
    ) -> None:
        launch(_kernel(name), BLOCKS, x, matrix, outputs, tiles, matrix.columns)


def _kernel(name: str) -> Kernel:
    shared_bytes = 4 * STAGES * TILE_K * (TILE_ROWS + 4 + WIDTH)
    return load_kernel("gemm", name, shared_bytes, STAGES=STAGES, TILE_K=TILE_K)


def _panels(groups: int, inputs: int, columns: int) -> cupy.ndarray:
    return cupy.zeros((groups, padded(columns, WIDTH) // WIDTH, inputs, WIDTH), cupy.float32)


def _transpose(matrix: Tensor, panel: cupy.ndarray, run: int, stride: int, offset: int) -> None:
    out, inputs = matrix.shape
    kernel = load_kernel("packing", f"transpose_{matrix.dtype}")
    grid = (padded(out, 32) // 32, padded(inputs, 32) // 32)
    kernel(grid, 256, upload(matrix.data), panel, out, inputs, WIDTH, run, stride, offset)
