"""Matrix products in float32: the arithmetic of precision fp32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import cupy

from lfm2kit.backend import Tensor
from lfm2kit_cuda.activations import Rows
from lfm2kit_cuda.device import most_shared_bytes, processors
from lfm2kit_cuda.kernels import Kernel, load_kernel
from lfm2kit_cuda.products import Matrix, RowTiles, Tiling, listed, padded
from lfm2kit_cuda.upload import upload

# As in gemm.cu.
THREADS, GROUPS, STAGES = 384, 6, 2
WIDTH = 128  # columns of a tile, and of a panel of W
RUN = 32  # columns of w1 before as many of w3
STEP = 16  # panels have a multiple of so many k
PART, ARRANGE_THREADS = 64, 256  # as in panels.cu

ROWS_STEP = 8
# The rows that a tile may have, and its time in a unit of its own: measured on an H200.
HEIGHTS = {48: 100, 40: 85, 32: 69, 24: 56, 16: 44}


@dataclass(frozen=True, slots=True)
class Panels:
    """Activations as gemm.cu reads them: a panel for each tile of rows."""

    array: cupy.ndarray  # float32 [most tiles, k, height]
    rows: int

    @property
    def height(self) -> int:
        return int(self.array.shape[2])


class Gemm:
    activation = "F32"

    def tiling(self, pairs: int, groups: int) -> Tiling:
        return _tiling(pairs, groups)

    def pack(self, matrices: Sequence[Tensor]) -> Matrix:
        columns, inputs = matrices[0].shape
        packed = _packed(len(matrices), inputs, columns)
        for panels, matrix in zip(packed, matrices, strict=True):
            _transpose(matrix, panels, run=columns, stride=0, offset=0)
        return _matrix(packed, columns)

    def pack_gated(self, gates: Sequence[Tensor], ups: Sequence[Tensor]) -> Matrix:
        """w1 and w3 in turns of RUN columns."""
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

    def linear(
        self,
        x: Rows | Panels,
        matrix: Matrix,
        bias: cupy.ndarray | None = None,
        tiles: RowTiles | None = None,
    ) -> cupy.ndarray:
        panels = x if isinstance(x, Panels) else _arranged(x, matrix, tiles)
        out = cupy.empty((panels.rows, matrix.columns), cupy.float32)
        _launch("linear", panels, matrix, (bias, out), tiles, matrix.columns)
        return out

    linear_rounded = linear

    def gated(self, x: Rows, matrix: Matrix, tiles: RowTiles | None = None) -> Panels:
        panels, columns = _arranged(x, matrix, tiles), padded(matrix.columns, STEP)
        shape = (len(panels.array), columns, panels.height)
        out = replace(panels, array=cupy.empty(shape, cupy.float32))
        _launch("gated", panels, matrix, (out.array,), tiles, columns)
        return out

    def down(self, x: Panels, matrix: Matrix, tiles: RowTiles) -> cupy.ndarray:
        return self.linear(x, matrix, tiles=tiles)


def _arranged(x: Rows, matrix: Matrix, tiles: RowTiles | None) -> Panels:
    """Panels for `tiles`; without a list, of the height that suits the product."""
    rows = tiles.rows if tiles else len(x)
    height = tiles.tiling.rows if tiles else _height(rows, matrix.width)
    most = len(tiles.tiles) if tiles else -(-rows // height)
    panels = cupy.empty((most, matrix.inputs, height), cupy.float32)
    load_kernel("panels", "arrange", ROWS=height // 4)(
        (-(-matrix.inputs // PART), most), ARRANGE_THREADS, x.array,
        tiles.source if tiles else None, panels, *listed(tiles), rows, x.extent, matrix.inputs,
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
    most = len(panels.array) * (matrix.width // WIDTH)
    _kernel(name, panels.height, tiles is not None)(
        (min(most, processors()),), THREADS, panels.array, matrix.packed, *outputs, *listed(tiles),
        panels.rows, matrix.inputs, matrix.width, columns,
    )  # fmt: skip


@cache
def _kernel(name: str, height: int, has_low: bool) -> Kernel:
    tile_k, rows_at_once = _sizes()
    stages = GROUPS * STAGES * tile_k * (WIDTH + height)
    sums = GROUPS * 4 * rows_at_once * (WIDTH + 4)
    constants = {"ROWS": height // 4, "TILE_K": tile_k, "PASS": rows_at_once}
    return load_kernel("gemm", name, 4 * (stages + sums), SHORT=int(has_low), **constants)


def _sizes() -> tuple[int, int]:
    """k of a stage, and rows of a thread that are added at once: what shared memory has room for.

    Hopper has 227 KB, Ampere and later from 99 on, Turing 64.
    """
    kilobytes = most_shared_bytes() / 1024
    return (16, 4) if kilobytes >= 200 else (8, 2) if kilobytes >= 96 else (4, 2)


@cache
def _height(rows: int, width: int) -> int:
    """Of the tiles with which the busiest multiprocessor is done first."""

    def time(height: int) -> int:
        tiles = -(-rows // height) * (width // WIDTH)
        return -(-tiles // processors()) * HEIGHTS[height]

    return min(HEIGHTS, key=time)


@cache
def _tiling(pairs: int, groups: int) -> Tiling:
    """What takes the least time if a group's rows are about Poisson distributed: tiles that are
    evenly filled, or full ones and a rest."""
    mean = max(pairs / groups, 1e-3)
    most = math.ceil(mean + 8 * math.sqrt(mean) + 8)
    chances = [math.exp(n * math.log(mean) - mean - math.lgamma(n + 1)) for n in range(most)]

    def time(tiling: Tiling) -> float:
        return sum(p * _time_of_group(rows, tiling) for rows, p in enumerate(chances) if rows)

    # A low tile takes a shorter loop: kShort in gemm.cu.
    low_of = {height: max(16, (height - 1) // 16 * 16) for height in HEIGHTS}
    menu = (Tiling(h, step, low_of[h]) for h in HEIGHTS for step in (ROWS_STEP, h))
    return min(menu, key=time)


def _time_of_group(rows: int, tiling: Tiling) -> int:
    """Of its tiles, as `group_by_expert` lists them."""
    even = -(-rows // -(-rows // tiling.rows))
    each = min(tiling.rows, padded(even, tiling.step))
    full, rest = divmod(rows, each)
    tiles = [each] * full + [rest] * (rest > 0)
    return sum(HEIGHTS[tiling.low if its <= tiling.low else tiling.rows] for its in tiles)


def _packed(groups: int, inputs: int, columns: int) -> cupy.ndarray:
    shape = (groups, padded(columns, WIDTH) // WIDTH, padded(inputs, STEP), WIDTH)
    return cupy.zeros(shape, cupy.float32)


def _matrix(packed: cupy.ndarray, columns: int) -> Matrix:
    _, panels, inputs, width = packed.shape
    return Matrix(packed, inputs, columns, panels * width)


def _transpose(matrix: Tensor, panels: cupy.ndarray, run: int, stride: int, offset: int) -> None:
    out, inputs = matrix.shape
    kernel = load_kernel("packing", f"transpose_{matrix.dtype}")
    grid = (padded(out, 32) // 32, padded(inputs, 32) // 32)
    kernel(
        grid, 256, upload(matrix.data), panels, out, inputs, panels.shape[1], WIDTH, run, stride,
        offset,
    )  # fmt: skip
