"""Matrix products on tensor cores (mma.sync): precisions bf16 and fp16.

Weights and the activations that products read have 16 bits, as has what `linear_rounded` stores;
sums, and the inputs and results of blocks, have 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy

from lfm2kit.backend import BF16, F16, Tensor
from lfm2kit_cuda.activations import (
    Rows,
    Slabs,
    empty_slabs,
    gathered,
    placed,
    rounded,
    slabs_bytes,
    zero_slabs,
)
from lfm2kit_cuda.ceilings import tensor_core_flops
from lfm2kit_cuda.constants import GEMM16, SLABS
from lfm2kit_cuda.device import compute_capability
from lfm2kit_cuda.kernels import Kernel, load_kernel
from lfm2kit_cuda.launching import in_layers
from lfm2kit_cuda.products import Ctas, Listed, Matrix, RowTiles, Tiling, listed, padded, readable
from lfm2kit_cuda.upload import upload

THREADS, TILE_COLUMNS = GEMM16.THREADS, GEMM16.TILE_COLUMNS
TILE_ROWS = 128  # at most
WIDTH = 256  # the rows of packed matrices are a multiple of it
CHUNK = SLABS.CHUNK  # the elements of packed rows are a multiple of it
RUN = 8  # rows of w1 before 8 of w3

MMA = Ctas(
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

HALVES = {format.name: format for format in (BF16, F16)}

# In F16 the products of SwiGLU could pass 65504: they are kept 64 times smaller, w2 larger.
GATED_SCALE = {"BF16": 1.0, "F16": 1 / 64}


class TensorCoreGemm:
    run, terms = RUN, 1

    def __init__(self, activation: str) -> None:
        self.activation = activation
        self.packed_format = HALVES[activation]
        self._scale = GATED_SCALE[activation]
        self._constants: dict[str, int | str] = {
            "HALF": activation,
            "MMA_TYPE": f'"{activation.lower()}"',
            "GATED_SCALE": f"{self._scale}f",
        }

    def flops_per_second(self) -> float:
        return tensor_core_flops(str(self._constants["MMA_TYPE"]))

    def tiling(self, pairs: int, groups: int) -> Tiling:
        return Tiling(TILE_ROWS, step=TILE_ROWS)

    def pack(self, matrices: Sequence[Tensor], scale: float = 1.0) -> Matrix:
        columns, inputs = matrices[0].shape
        packed = self._panels(len(matrices), inputs, columns)
        for panel, matrix in zip(packed, matrices, strict=True):
            self._narrow(matrix, panel, run=columns, stride=0, offset=0, scale=scale)
        return Matrix(packed, packed.shape[2], columns, packed.shape[1])

    def pack_gated(self, gates: Sequence[Tensor], ups: Sequence[Tensor]) -> Matrix:
        """Return one matrix of both: RUN rows of w1, then RUN of w3, and so on."""
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

    def empty(self, rows: int, columns: int) -> Any:
        return zero_slabs(rows, columns)

    def rounded(self, x: cupy.ndarray) -> Any:
        """Return what products read: of rows that another rank has rounded, as they are."""
        if x.dtype == self.packed_format.block:
            return Rows(x)
        return rounded(x, self.activation)

    def empty_bytes(self, rows: int, columns: int) -> int:
        return slabs_bytes(rows, columns)

    def rounded_bytes(self, rows: int, columns: int) -> int:
        return slabs_bytes(rows, columns)

    def arranged_bytes(
        self, rows: int, inputs: int, width: int, tiles: Listed | None = None
    ) -> int:
        return 0 if tiles is None or self._looks_up(tiles) else slabs_bytes(rows, inputs)

    def gated_bytes(self, rows: int, columns: int, tiles: Listed | None = None) -> int:
        return slabs_bytes(rows, columns, self.terms)

    def linear(
        self,
        x: Any,
        matrix: Matrix,
        bias: cupy.ndarray | None = None,
        tiles: RowTiles | None = None,
    ) -> cupy.ndarray:
        return self._linear("linear", cupy.float32, x, matrix, bias, tiles)

    def linear_rounded(
        self,
        x: Any,
        matrix: Matrix,
        bias: cupy.ndarray | None = None,
        tiles: RowTiles | None = None,
    ) -> cupy.ndarray:
        return self._linear("linear_rounded", cupy.uint16, x, matrix, bias, tiles)

    def gated(self, x: Any, matrix: Matrix, tiles: RowTiles | None = None) -> Slabs:
        slabs = self._slabs(x, tiles)
        rows = tiles.rows if tiles else len(slabs)
        out = empty_slabs(rows, matrix.columns, len(slabs.array))
        # The kernel makes the padding too: silu(0) * 0.
        self._launch("gated", slabs, matrix, (out.array,), tiles, out.columns)
        return out

    def down(self, x: Any, matrix: Matrix, tiles: RowTiles) -> cupy.ndarray:
        """Return `linear` in BF16, or in float32 for F16, which cannot hold more than 65504."""
        linear = self.linear if self.activation == "F16" else self.linear_rounded
        return linear(x, matrix, tiles=tiles.in_place())

    def _linear(
        self,
        name: str,
        dtype: Any,
        x: Any,
        matrix: Matrix,
        bias: cupy.ndarray | None,
        tiles: RowTiles | None,
    ) -> cupy.ndarray:
        slabs = self._slabs(x, tiles)
        out = cupy.empty((tiles.rows if tiles else len(slabs), matrix.columns), dtype)
        self._launch(name, slabs, matrix, (bias, out), tiles, matrix.columns)
        return out

    def _slabs(self, x: Any, tiles: RowTiles | None) -> Slabs:
        """Return the activations in the order of the tiles, unless kernels look them up."""
        source = None if tiles is None or self._looks_up(tiles) else tiles.source
        if isinstance(x, Rows):
            return placed(x.array, source)
        slabs: Slabs = x
        return slabs if source is None else gathered(slabs, source)

    def _looks_up(self, tiles: RowTiles | Listed) -> bool:
        """Return whether kernels take the rows of tiles from where their source says."""
        return False

    def _launch(
        self,
        name: str,
        x: Slabs,
        matrix: Matrix,
        outputs: tuple[cupy.ndarray | None, ...],
        tiles: RowTiles | None,
        columns: int,
    ) -> None:
        if tiles is None:
            tile_rows, tile_columns = MMA.best(len(x), matrix.width)
            count = -(-len(x) // tile_rows)
        else:
            tile_rows, tile_columns = TILE_ROWS, TILE_COLUMNS
            count = len(tiles.tiles)
        self._kernel(name)(
            (matrix.width // tile_columns, *in_layers(count)), MMA.threads, x.array, matrix.packed,
            *outputs, *listed(tiles), tile_rows, len(x), x.extent, matrix.inputs, matrix.width,
            columns,
        )  # fmt: skip

    def _kernel(self, name: str) -> Kernel:
        kilobytes = 96 if compute_capability() >= (8, 0) else 64  # two CTAs share an SM's
        shared_bytes = 1024 * kilobytes
        constants = {**self._constants, "SHARED_BYTES": shared_bytes}
        return load_kernel("gemm16", f"{name}_mma", shared_bytes, **constants)

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
        matrix = readable(matrix)
        kernel = load_kernel("packing", f"narrow_{matrix.format}_{self.activation}")
        weights = upload(matrix.data)
        kernel((out,), THREADS, weights, panel, inputs, panel.shape[1], run, stride, offset, scale)
