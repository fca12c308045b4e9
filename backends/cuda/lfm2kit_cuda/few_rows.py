"""Products in float32 of so few rows that reading the weights takes longest (few_rows.cu)."""

from __future__ import annotations

import cupy

from lfm2kit_cuda.activations import Rows
from lfm2kit_cuda.constants import GEMM
from lfm2kit_cuda.device import compute_capability, most_shared_bytes, sm_count
from lfm2kit_cuda.kernels import load_kernel
from lfm2kit_cuda.products import Matrix, RowTiles, Tiling, are_known, listed, padded

COPIES_ALONE = (8, 0)  # from here on copies into shared memory run beside the arithmetic
MOST_ROWS, ROWS_OF_WARP = 16, 8  # of a tile
COLUMNS = 32  # of a warp
MOST_STAGES = 6  # of a team
RESERVED = 1024  # bytes of shared memory that a CTA has beside its own
TOGETHER = 2  # CTAs of an SM: with more, each would have too few stages

# All measured on an H200: the rows of a tile that is fastest up to a mean of an expert's rows; and
# up to how many rows this is faster with any matrix, or with how many CTAs for each SM.
TILES = {2: 4, 4: 8}
FEW_ANYWHERE, MOST_CTAS = 8, 1.5


def are_few(rows: int, width: int) -> bool:
    """Return whether this many rows are multiplied here by a matrix of `width` packed columns."""
    if compute_capability() < COPIES_ALONE:
        return False
    ctas = -(-rows // MOST_ROWS) * width // COLUMNS
    return rows <= FEW_ANYWHERE or ctas <= MOST_CTAS * sm_count()


def tiling(pairs: int, groups: int) -> Tiling | None:
    """Return the tiling of `pairs` rows in groups, or None if groups have too many on average."""
    if compute_capability() < COPIES_ALONE:
        return None
    tilings = (Tiling(rows, step=1) for mean, rows in TILES.items() if pairs <= mean * groups)
    return next(tilings, None)


def linear(
    x: Rows, matrix: Matrix, bias: cupy.ndarray | None, tiles: RowTiles | None
) -> cupy.ndarray:
    """Return x @ W.T + bias: float32 [rows, columns]."""
    out = cupy.empty((tiles.rows if tiles else len(x), matrix.columns), cupy.float32)
    _launch("linear_few", 1, x, matrix, (bias, out), out.shape[1], tiles)
    return out


def gated(x: Rows, matrix: Matrix, tiles: RowTiles | None) -> Rows:
    """Return silu(x @ w1.T) * (x @ w3.T), with columns of zeros up to a multiple of STEP."""
    columns = padded(matrix.columns, GEMM.STEP)
    out = cupy.empty((tiles.rows if tiles else len(x), columns), cupy.float32)
    _launch("gated_few", 2, x, matrix, (out,), columns, tiles)
    return Rows(out)


def _launch(
    name: str,
    units: int,
    x: Rows,
    matrix: Matrix,
    outputs: tuple[cupy.ndarray | None, ...],
    columns: int,
    tiles: RowTiles | None,
) -> None:
    """Launch CTAs of `units` times 32 columns of the matrix."""
    rows = tiles.tiling.rows if tiles else min(MOST_ROWS, 1 << (len(x) - 1).bit_length())
    grid = matrix.width // (units * COLUMNS), len(tiles.tiles) if tiles else -(-len(x) // rows)
    team, teams = max(1, rows // ROWS_OF_WARP), units * GEMM.GROUPS
    stages, nbytes = stages_of(grid[0] * grid[1], teams * 4 * GEMM.STEP * (COLUMNS + rows))
    vector = 4 if x.extent % 4 == 0 else 1
    load_kernel("few_rows", name, nbytes, ROWS=rows, TEAM=team, STAGES=stages, VECTOR=vector)(
        grid, 32 * team * teams, x.array, tiles.source if tiles else None, matrix.packed, *outputs,
        *listed(tiles), are_known(tiles), len(x), x.extent, matrix.inputs, matrix.width, columns,
    )  # fmt: skip


def stages_of(ctas: int, stage_bytes: int) -> tuple[int, int]:
    """Return the stages of each team of a CTA, as many as fit beside other CTAs, and their bytes.

    `stage_bytes` is what a stage of all teams takes.
    """
    together = max(1, min(TOGETHER, -(-ctas // sm_count())))
    fit = (most_shared_bytes() // together - RESERVED) // stage_bytes
    stages = max(1, min(MOST_STAGES, fit))
    return stages, stages * stage_bytes
