"""Matrix products on tensor cores (mma.sync): precisions bf16 and fp16.

Weights and the activations that products read have 16 bits, as has what `linear_rounded` stores;
sums, and all that is handed from block to block, have 32.
"""

from __future__ import annotations

from collections.abc import Sequence

import cupy

from lfm2kit.backend import Tensor
from lfm2kit_cuda.device import compute_capability
from lfm2kit_cuda.kernels import Kernel, load_kernel
from lfm2kit_cuda.products import Blocks, Matrix, RowTiles, launch, padded
from lfm2kit_cuda.upload import upload

THREADS = 256
TILE_ROWS = 128  # at most
WIDTH = 256  # packed matrices have a multiple of so many rows
CHUNK = 8  # elements that are copied at once: rows have a multiple of them
RUN = 8  # rows of w1 before as many of w3

MMA = Blocks(
    THREADS,
    sharing=(1.3, 2.0),
    menu={
        (128, 128): 128,
        (96, 128): 100,
        (64, 128): 72,
        (48, 128): 64,
        (32, 128): 48,
        (16, 128): 40,
    },
)

# In F16 the products of SwiGLU could pass 65504: they are kept 64 times smaller, w2 larger.
GATED_SCALE = {"BF16": 1.0, "F16": 1 / 64}


class TensorCoreGemm:
    def __init__(self, activation: str) -> None:
        self.activation = activation
        self._scale = GATED_SCALE[activation]
        self._constants: dict[str, int | str] = {
            "HALF": activation,
            "MMA_TYPE": f'"{activation.lower()}"',
            "GATED_SCALE": f"{self._scale}f",
        }

    def row_tiles(self, pairs: int, groups: int) -> tuple[int, int]:
        return TILE_ROWS, TILE_ROWS

    def pack(self, matrices: Sequence[Tensor], scale: float = 1.0) -> Matrix:
        columns, inputs = matrices[0].shape
        packed = self._panels(len(matrices), inputs, columns)
        for panel, matrix in zip(packed, matrices, strict=True):
            self._narrow(matrix, panel, run=columns, stride=0, offset=0, scale=scale)
        return Matrix(packed, packed.shape[2], columns, packed.shape[1])

    def pack_gated(self, gates: Sequence[Tensor], ups: Sequence[Tensor]) -> Matrix:
        """w1 and w3 in turns of RUN rows."""
        columns, inputs = gates[0].shape
        packed = self._panels(len(gates), inputs, 2 * padded(columns, RUN))
        for panel, gate, up in zip(packed, gates, ups, strict=True):
            self._narrow(gate, panel, run=RUN, stride=2 * RUN, offset=0)
            self._narrow(up, panel, run=RUN, stride=2 * RUN, offset=RUN)
        return Matrix(packed, packed.shape[2], columns, packed.shape[1])

    def pack_down(self, matrices: Sequence[Tensor]) -> Matrix:
        return self.pack(matrices, 1 / self._scale)

    def packed_bytes(self, shape: tuple[int, ...]) -> int:
        return 2 * padded(shape[0], WIDTH) * padded(shape[1], CHUNK)

    def empty(self, rows: int, columns: int) -> cupy.ndarray:
        is_padded = columns % CHUNK > 0
        return (cupy.zeros if is_padded else cupy.empty)(
            (rows, padded(columns, CHUNK)), cupy.uint16
        )

    def rounded(self, x: cupy.ndarray) -> cupy.ndarray:
        rows, columns = x.shape
        out = cupy.empty((rows, padded(columns, CHUNK)), cupy.uint16)
        kernel = load_kernel("packing", f"round_{self.activation}")
        kernel((rows,), THREADS, x, out, columns, out.shape[1])
        return out

    def linear(
        self,
        x: cupy.ndarray,
        matrix: Matrix,
        bias: cupy.ndarray | None = None,
        tiles: RowTiles | None = None,
    ) -> cupy.ndarray:
        out = cupy.empty((tiles.rows if tiles else len(x), matrix.columns), cupy.float32)
        self._launch("linear", x, matrix, (bias, out), tiles, matrix.columns)
        return out

    def linear_rounded(
        self,
        x: cupy.ndarray,
        matrix: Matrix,
        bias: cupy.ndarray | None = None,
        tiles: RowTiles | None = None,
    ) -> cupy.ndarray:
        out = cupy.empty((tiles.rows if tiles else len(x), matrix.columns), cupy.uint16)
        self._launch("linear_rounded", x, matrix, (bias, out), tiles, matrix.columns)
        return out

    def gated(self, x: cupy.ndarray, matrix: Matrix, tiles: RowTiles | None = None) -> cupy.ndarray:
        columns = padded(matrix.columns, CHUNK)  # the padding is silu(0) * 0
        out = cupy.empty((tiles.rows if tiles else len(x), columns), cupy.uint16)
        self._launch("gated", x, matrix, (out,), tiles, columns)
        return out

    def _launch(
        self,
        name: str,
        x: cupy.ndarray,
        matrix: Matrix,
        outputs: tuple[cupy.ndarray | None, ...],
        tiles: RowTiles | None,
        columns: int,
    ) -> None:
        launch(self._kernel(name), MMA, x, matrix, outputs, tiles, columns)

    def _kernel(self, name: str) -> Kernel:
        kilobytes = 96 if compute_capability() >= (8, 0) else 64  # two blocks share a processor's
        shared_bytes = 1024 * kilobytes
        constants = {**self._constants, "SHARED_BYTES": shared_bytes}
        return load_kernel("gemm16", name, shared_bytes, **constants)

    def _panels(self, groups: int, inputs: int, columns: int) -> cupy.ndarray:
        shape = groups, padded(columns, WIDTH), padded(inputs, CHUNK)
        return cupy.zeros(shape, cupy.uint16)

    def _narrow(
        self,
        matrix: Tensor,
        panel: cupy.ndarray,
        run: int,
        stride: int,
        offset: int,
        scale: float = 1.0,
    ) -> None:
        out, inputs = matrix.shape
        kernel = load_kernel("packing", f"narrow_{matrix.dtype}_{self.activation}")
        weights = upload(matrix.data)
        kernel((out,), THREADS, weights, panel, inputs, panel.shape[1], run, stride, offset, scale)
