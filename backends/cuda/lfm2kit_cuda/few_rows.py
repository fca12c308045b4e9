"""Products in float32 of so few rows that reading the weights takes longest (few_rows.cu)."""

from __future__ import annotations

from functools import cache

import cupy

from lfm2kit_cuda.activations import Rows
from lfm2kit_cuda.constants import FEW_ROWS, GEMM
from lfm2kit_cuda.device import compute_capability, current_device, sm_count
from lfm2kit_cuda.kernels import Kernel, load_kernel
from lfm2kit_cuda.products import Matrix, RowTiles, Tiling, listed, padded

COPIES_ALONE = (8, 0)  # from here on copies into shared memory run beside the arithmetic
TILING = Tiling(FEW_ROWS.MOST_ROWS, step=1)
# Stages of a warp by the columns of a CTA: with 16, there are fewer warps, and each asks for more.
STAGES = {16: 16, 32: 8}


def are_few(rows: int) -> bool:
    """Return whether a tile of this many rows is multiplied here."""
    return rows <= FEW_ROWS.MOST_ROWS and compute_capability() >= COPIES_ALONE


def linear(
    x: Rows, matrix: Matrix, bias: cupy.ndarray | None, tiles: RowTiles | None
) -> cupy.ndarray:
    """Return x @ W.T + bias: float32 [rows, columns]."""
    out = cupy.empty((tiles.rows if tiles else len(x), matrix.columns), cupy.float32)
    _launch("linear_few", x, matrix, (bias,), out, tiles)
    return out


def gated(x: Rows, matrix: Matrix, tiles: RowTiles | None) -> Rows:
    """Return silu(x @ w1.T) * (x @ w3.T), with columns of zeros up to a multiple of STEP."""
    columns = padded(matrix.columns, GEMM.STEP)
    out = cupy.empty((tiles.rows if tiles else len(x), columns), cupy.float32)
    _launch("gated_few", x, matrix, (), out, tiles)
    return Rows(out)


def _launch(
    name: str,
    x: Rows,
    matrix: Matrix,
    bias: tuple[cupy.ndarray | None, ...],
    out: cupy.ndarray,
    tiles: RowTiles | None,
) -> None:
    most, source = (len(tiles.tiles), tiles.source) if tiles else (1, None)
    columns = columns_of_a_cta(matrix.width, most, sm_count())
    _kernel(name, columns, 4 if x.extent % 4 == 0 else 1, current_device())(
        (matrix.width // columns, most), GEMM.GROUPS * columns, x.array, source, matrix.packed,
        *bias, out, *listed(tiles), len(x), x.extent, x.extent, matrix.inputs, matrix.width,
        out.shape[1],
    )  # fmt: skip


def columns_of_a_cta(width: int, tiles: int, sm_count: int) -> int:
    """Return 32, or 16 where there would be fewer CTAs than multiprocessors."""
    return 32 if width // 32 * tiles >= sm_count else 16


@cache
def _kernel(name: str, columns: int, vector: int, device: int) -> Kernel:
    stages, warps = STAGES[columns], GEMM.GROUPS * columns // 32
    of_a_range = FEW_ROWS.MOST_ROWS * FEW_ROWS.STAGE_K + 4
    stage = 32 * FEW_ROWS.STAGE_K + 32 // columns * of_a_range
    sums = GEMM.GROUPS * FEW_ROWS.MOST_ROWS * columns
    return load_kernel(
        "few_rows", name, 4 * (warps * stages * stage + sums),
        COLUMNS=columns, STAGES=stages, VECTOR=vector,
    )  # fmt: skip
