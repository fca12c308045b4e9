"""Products on Hopper of so few rows that reading the weights takes longest (few_rows90.cu)."""

from __future__ import annotations

import cupy

from lfm2kit_cuda.activations import Slabs
from lfm2kit_cuda.constants import FEW_ROWS90, GEMM90, SLABS
from lfm2kit_cuda.device import sm_count
from lfm2kit_cuda.kernels import load_kernel
from lfm2kit_cuda.products import Matrix, RowTiles, are_known, listed, padded

BLOCK, MOST_BLOCKS, COPYING_WARPS = (
    FEW_ROWS90.BLOCK, FEW_ROWS90.MOST_BLOCKS, FEW_ROWS90.COPYING_WARPS,
)  # fmt: skip
STEP = GEMM90.STEP  # the rows that an instruction multiplies are a multiple of it
ROW_BYTES = 2 * SLABS.SLAB  # of a row in a stage
BESIDE = 3  # blocks: what a tile takes beside its own
# Of a CTA: the next kernel's fit beside this one's, or it has its SM to itself.
BESIDE_OTHERS, ALONE = 110 * 1024, 220 * 1024
EVEN_TILES = 4  # of a list, up to which all CTAs end together: those of one token


def launch(
    name: str,
    x: Slabs,
    matrix: Matrix,
    outputs: tuple[cupy.ndarray | None, ...],
    tiles: RowTiles | None,
    columns: int,
    constants: dict[str, int | str],
) -> None:
    """Do what a launch of gemm90.cu does, for tiles of up to MOST_ROWS rows: the same bits.

    Of tiles with a source, x has the rows that it says.
    """
    most = len(tiles.tiles) if tiles else 1
    blocks = blocks_of_a_cta(matrix.width // BLOCK, most, sm_count())
    rows = padded(tiles.tiling.rows if tiles else len(x), STEP)
    ctas, threads = most * -(-matrix.width // (BLOCK * blocks)), 32 * (COPYING_WARPS + blocks)
    source = tiles.source if tiles else None
    extents = [out.shape[-2] for out in outputs if name == "gated" and out is not None]
    shared = shared_bytes(ctas, most, sm_count())
    load_kernel("few_rows90", f"{name}_few_mma", shared, **constants)(
        (min(sm_count(), ctas),), threads, x.array, source, matrix.packed, *outputs,
        *listed(tiles), are_known(tiles), most, len(x), x.extent, matrix.inputs // SLABS.SLAB,
        matrix.width, columns, blocks, shared == ALONE, *stages(blocks, rows, shared), *extents,
    )  # fmt: skip


def blocks_of_a_cta(blocks: int, tiles: int, sm_count: int) -> int:
    """Return how many blocks of columns a CTA takes at once, so that the busiest SM is done first.

    What a tile takes beside its blocks is as long as some of these.
    """

    def busiest(each: int) -> int:
        ctas = tiles * -(-blocks // each)
        return (each + BESIDE) * -(-ctas // sm_count)

    return min(range(1, MOST_BLOCKS + 1), key=busiest)


def shared_bytes(ctas: int, tiles: int, sm_count: int) -> int:
    """Return the bytes of shared memory of a CTA of a product of `tiles` tiles.

    Where CTAs end at different times, the next kernel's, two of which fit on an SM, would crowd on
    the first SMs that are left, and share one SM's reading until the end.  So each takes an SM if
    it has several tiles, or follows a kernel that may have had: that of w1 and w3, with its list.
    """
    return BESIDE_OTHERS if ctas <= sm_count and tiles <= EVEN_TILES else ALONE


def stages(blocks: int, rows: int, shared_bytes: int) -> tuple[int, int]:
    """Return the number of stages, and the bytes of one, that fit into this many bytes.

    There are no fewer than COPYING_WARPS.
    """
    stage = ROW_BYTES * (BLOCK * blocks + rows)
    return min(FEW_ROWS90.MOST_STAGES, shared_bytes // stage), stage
