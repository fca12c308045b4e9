"""Matrix products in float32: the arithmetic of precision fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import cupy

from lfm2kit.backend import F32, Tensor
from lfm2kit_cuda import few_rows
from lfm2kit_cuda.activations import Rows
from lfm2kit_cuda.ceilings import float32_flops
from lfm2kit_cuda.constants import GEMM, HEIGHTS, PANELS
from lfm2kit_cuda.device import current_device, most_shared_bytes, sm_count
from lfm2kit_cuda.kernels import Kernel, load_kernel
from lfm2kit_cuda.launching import in_layers
from lfm2kit_cuda.products import Listed, Matrix, RowTiles, Tiling, listed, padded, readable
from lfm2kit_cuda.upload import upload

WIDTH, RUN, STEP = GEMM.WIDTH, GEMM.RUN, GEMM.STEP
THREADS = 32 * GEMM.STAGES * GEMM.GROUPS
TALLEST, LOWEST, HEIGHT_STEP = HEIGHTS.TALLEST, HEIGHTS.LOWEST, HEIGHTS.HEIGHT_STEP

# The time that a tile of each height takes, in a unit of its own: measured on an H200.
TIMES = {48: 100, 40: 86, 32: 71, 24: 56, 16: 44}


@dataclass(frozen=True, slots=True)
class Panels:
    """Activations as gemm.cu reads them: a panel for each tile of rows."""

    array: cupy.ndarray  # float32 [most tiles, k, TALLEST], filled as panels.cuh says
    rows: int


class Gemm:
    activation, packed_format, run = "F32", F32, RUN

    def flops_per_second(self) -> float:
        return float32_flops()

    def tiling(self, pairs: int, groups: int) -> Tiling:
        return few_rows.tiling(pairs, groups) or Tiling(TALLEST, HEIGHT_STEP, by_height=True)

    def pack(self, matrices: Sequence[Tensor]) -> Matrix:
        columns, inputs = matrices[0].shape
        packed = _packed(len(matrices), inputs, columns)
        for panels, matrix in zip(packed, matrices, strict=True):
            _transpose(matrix, panels, run=columns, stride=0, offset=0)
        return _matrix(packed, columns)

    def pack_gated(self, gates: Sequence[Tensor], ups: Sequence[Tensor]) -> Matrix:
        """Return one matrix of both: RUN columns of w1, then RUN of w3, and so on."""
        columns, inputs = gates[0].shape
        packed = _packed(len(gates), inputs, 2 * padded(columns, RUN))
        for panels, gate, up in zip(packed, gates, ups, strict=True):
            _transpose(gate, panels, run=RUN, stride=2 * RUN, offset=0)
            _transpose(up, panels, run=RUN, stride=2 * RUN, offset=RUN)
        return _matrix(packed, columns)

    pack_down = pack

    def packed_bytes(self, shape: tuple[int, ...]) -> int:
        return 4 * padded(shape[0], WIDTH) * padded(shape[1], STEP)

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
        if _are_few(rows, padded(width, WIDTH), tiles):
            return 0
        return _panels_bytes(rows, inputs, width, tiles)

    def gated_bytes(self, rows: int, columns: int, tiles: Listed | None = None) -> int:
        width = padded(2 * padded(columns, RUN), WIDTH)
        if _are_few(rows, width, tiles):
            return 4 * rows * padded(columns, STEP)
        return _panels_bytes(rows, columns, width, tiles)

    def linear(
        self,
        x: Rows | Panels,
        matrix: Matrix,
        bias: cupy.ndarray | None = None,
        tiles: RowTiles | None = None,
    ) -> cupy.ndarray:
        if isinstance(x, Rows) and _are_few(len(x), matrix.width, tiles):
            return few_rows.linear(x, matrix, bias, tiles)
        panels = x if isinstance(x, Panels) else _arranged(x, matrix, tiles)
        out = cupy.empty((panels.rows, matrix.columns), cupy.float32)
        _launch("linear", panels, matrix, (bias, out), tiles, matrix.columns)
        return out

    linear_rounded = linear

    def gated(self, x: Rows, matrix: Matrix, tiles: RowTiles | None = None) -> Rows | Panels:
        if _are_few(len(x), matrix.width, tiles):
            return few_rows.gated(x, matrix, tiles)
        panels, columns = _arranged(x, matrix, tiles), padded(matrix.columns, STEP)
        shape = (len(panels.array), columns, TALLEST)
        out = replace(panels, array=cupy.empty(shape, cupy.float32))
        _launch("gated", panels, matrix, (out.array,), tiles, columns)
        return out

    def down(self, x: Rows | Panels, matrix: Matrix, tiles: RowTiles) -> cupy.ndarray:
        return self.linear(x, matrix, tiles=tiles.in_place())


def _are_few(rows: int, width: int, tiles: RowTiles | Listed | None) -> bool:
    """Return whether rows, or those of tiles, are multiplied as they are, by few_rows.cu."""
    if tiles is not None:
        return not tiles.tiling.by_height
    return few_rows.are_few(rows, width)


def _panels_bytes(rows: int, inputs: int, width: int, tiles: Listed | None) -> int:
    most = tiles.most if tiles else _dense_tiles(rows, padded(width, WIDTH), sm_count())
    return 4 * most * padded(inputs, STEP) * TALLEST


def _arranged(x: Rows, matrix: Matrix, tiles: RowTiles | None) -> Panels:
    """Return the panels of `tiles`, or of as many tiles as `_dense_tiles` says."""
    rows = tiles.rows if tiles else len(x)
    most = len(tiles.tiles) if tiles else _dense_tiles(rows, matrix.width, sm_count())
    panels = cupy.empty((most, matrix.inputs, TALLEST), cupy.float32)
    load_kernel("panels", "arrange")(
        (-(-matrix.inputs // PANELS.PART), *in_layers(most)), PANELS.ARRANGE_THREADS, x.array,
        tiles.source if tiles else None, panels, *listed(tiles), rows, most, x.extent,
        matrix.inputs,
    )  # fmt: skip
    return Panels(panels, rows)


def _launch(
    name: str,
    panels: Panels,
    matrix: Matrix,
    outputs: tuple[cupy.ndarray | None, ...],
    tiles: RowTiles | None,
    columns: int,
) -> None:
    most = len(panels.array)
    _kernel(name, current_device())(
        (min(most * (matrix.width // WIDTH), sm_count()),), THREADS, panels.array, matrix.packed,
        *outputs, *listed(tiles), panels.rows, most, matrix.inputs, matrix.width, columns,
    )  # fmt: skip


@cache
def _kernel(name: str, device: int) -> Kernel:
    tile_k, rows_at_once = _sizes()
    stages = GEMM.GROUPS * GEMM.STAGES * tile_k * (WIDTH + TALLEST)
    sums = GEMM.GROUPS * 4 * rows_at_once * (WIDTH + 4)
    return load_kernel(
        "gemm", f"{name}_simt", 4 * (stages + sums), TILE_K=tile_k, PASS=rows_at_once
    )


def _sizes() -> tuple[int, int]:
    """Return k of a stage, and rows of a thread that are added at once.

    They are what shared memory can hold: Hopper has 227 KB, Ampere and later from 99 on, Turing 64.
    """
    kilobytes = most_shared_bytes() / 1024
    return (16, 4) if kilobytes >= 200 else (8, 2) if kilobytes >= 96 else (4, 2)


@cache
def _dense_tiles(rows: int, width: int, sm_count: int) -> int:
    """Return the number of tiles with which the busiest SM is done first."""
    columns, steps = width // WIDTH, -(-rows // HEIGHT_STEP)

    def time(count: int) -> int:
        height = -(-steps // count)  # in steps, as in even_tiles.cuh
        low = count * height - steps
        waves, tall_waves = (-(-tiles * columns // sm_count) for tiles in (count, count - low))
        tall, lower = (TIMES[max(LOWEST, HEIGHT_STEP * h)] for h in (height, height - 1))
        return tall_waves * tall + (waves - tall_waves) * lower

    fewest, most = -(-rows // TALLEST), -(-rows // LOWEST)
    return min(range(fewest, most + 1), key=time) if rows else 0


def _packed(groups: int, inputs: int, columns: int) -> cupy.ndarray:
    shape = (groups, padded(columns, WIDTH) // WIDTH, padded(inputs, STEP), WIDTH)
    return cupy.zeros(shape, cupy.float32)


def _matrix(packed: cupy.ndarray, columns: int) -> Matrix:
    _, panels, inputs, width = packed.shape
    return Matrix(packed, inputs, columns, panels * width)


def _transpose(matrix: Tensor, panels: cupy.ndarray, run: int, stride: int, offset: int) -> None:
    out, inputs = matrix.shape
    matrix = readable(matrix)
    kernel = load_kernel("packing", f"transpose_{matrix.format}")
    grid = (padded(out, 32) // 32, padded(inputs, 32) // 32)
    kernel(
        grid, 256, upload(matrix.data), panels, out, inputs, panels.shape[1], WIDTH, run, stride,
        offset,
    )  # fmt: skip
