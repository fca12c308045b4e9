"""Matrix products on Hopper's own tensor instructions: precisions bf16 and fp16 on its chips."""

from __future__ import annotations

from collections.abc import Sequence

import cupy

from lfm2kit.backend import Tensor
from lfm2kit_cuda.device import processors
from lfm2kit_cuda.gemm16 import CHUNK, TensorCoreGemm
from lfm2kit_cuda.kernels import Kernel, load_kernel
from lfm2kit_cuda.products import Blocks, Matrix, RowTiles, padded
from lfm2kit_cuda.upload import upload

PANEL, TILE_K, ROW_BYTES = 256, 64, 128  # of packed weights: columns, k, bytes of a row of k
STEP, MOST_ROWS = 16, 192  # of activations, in a tile of PANEL columns
SHARED_BYTES, MOST_STAGES = 224 * 1024, 8
PACK_THREADS = 256

# Microseconds at k = 2048 on an H200: half a panel's columns with up to twice the rows too.
BLOCKS = Blocks(
    threads=384,
    sharing=(1.0,),
    menu={(rows, PANEL): max(17.5, 10.5 + 0.175 * rows) for rows in range(16, MOST_ROWS + 1, 16)}
    | {(rows, PANEL // 2): max(18.0, 13.0 + 0.083 * rows) for rows in range(32, 257, 32)},
)


class HopperGemm(TensorCoreGemm):
    def row_tiles(self, pairs: int, groups: int) -> tuple[int, int]:
        return MOST_ROWS, STEP

    def pack(self, matrices: Sequence[Tensor], scale: float = 1.0) -> Matrix:
        columns, inputs = matrices[0].shape
        packed = self._panels(len(matrices), inputs, columns)
        for panels, matrix in zip(packed, matrices, strict=True):
            self._panel(matrix, panels, stride=1, offset=0, scale=scale)
        return _matrix(packed, inputs, columns)

    def pack_gated(self, gates: Sequence[Tensor], ups: Sequence[Tensor]) -> Matrix:
        """Rows of w1 and of w3 in turns."""
        columns, inputs = gates[0].shape
        packed = self._panels(len(gates), inputs, 2 * columns)
        for panels, gate, up in zip(packed, gates, ups, strict=True):
            self._panel(gate, panels, stride=2, offset=0)
            self._panel(up, panels, stride=2, offset=1)
        return _matrix(packed, inputs, columns)

    def packed_bytes(self, shape: tuple[int, ...]) -> int:
        return 2 * padded(shape[0], PANEL) * padded(shape[1], TILE_K)

    def _launch(
        self,
        name: str,
        x: cupy.ndarray,
        matrix: Matrix,
        outputs: tuple[cupy.ndarray | None, ...],
        tiles: RowTiles | None,
        columns: int,
    ) -> None:
        if tiles is None:
            rows, source, listed = len(x), None, (None, None)
            tile_rows, tile_columns = BLOCKS.best(rows, matrix.width)
            count = -(-rows // tile_rows)
        else:
            rows, source, listed = tiles.rows, tiles.source, (tiles.tiles, tiles.count)
            tile_rows, tile_columns = tiles.tile_rows, PANEL
            count = len(tiles.tiles)
        stage_bytes = ROW_BYTES * (tile_columns + tile_rows)
        self._kernel(name)(
            (min(processors(), count * (matrix.width // tile_columns)),), BLOCKS.threads, x,
            source, matrix.packed, *outputs, *listed, tile_rows, tile_columns, rows,
            matrix.inputs, matrix.width, columns, min(MOST_STAGES, SHARED_BYTES // stage_bytes),
            stage_bytes,
        )  # fmt: skip

    def _kernel(self, name: str) -> Kernel:
        return load_kernel("gemm90", name, SHARED_BYTES, **self._constants)

    def _panels(self, groups: int, inputs: int, columns: int) -> cupy.ndarray:
        panels, steps = padded(columns, PANEL) // PANEL, padded(inputs, TILE_K) // TILE_K
        return cupy.zeros((groups, panels, steps, PANEL, TILE_K), cupy.uint16)

    def _panel(
        self, matrix: Tensor, panels: cupy.ndarray, stride: int, offset: int, scale: float = 1.0
    ) -> None:
        out, inputs = matrix.shape
        kernel = load_kernel("packing", f"panel_{matrix.dtype}_{self.activation}")
        weights, steps = upload(matrix.data), panels.shape[1]
        kernel((out,), PACK_THREADS, weights, panels, inputs, steps, stride, offset, scale)


def _matrix(packed: cupy.ndarray, inputs: int, columns: int) -> Matrix:
    return Matrix(packed, padded(inputs, CHUNK), columns, packed.shape[1] * PANEL)
