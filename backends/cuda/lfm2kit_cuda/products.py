"""What the matrix products of every precision share: packed matrices, row tiles, the launch.

A dense layer is a product of one group; experts bring a list of row tiles made on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import cupy

from lfm2kit.backend import Tensor
from lfm2kit_cuda.device import processors
from lfm2kit_cuda.kernels import Kernel

TILE_ROWS = 128  # of the largest tile
GRID_COLUMNS = 128  # of the matrix, per block of a grid's first dimension


@dataclass(frozen=True, slots=True)
class Matrix:
    """Packed matrices, one per group; results have `columns` columns."""

    packed: cupy.ndarray
    inputs: int  # length of the sums, padding included
    columns: int
    width: int  # columns with padding, and w1's and w3's both


@dataclass(frozen=True, slots=True)
class RowTiles:
    """Which rows belong to which group, as `group_by_expert` lists them."""

    rows: int
    tiles: cupy.ndarray  # int32 [most, 4]
    count: cupy.ndarray  # int32 [1]
    source: cupy.ndarray | None  # int32 [rows]: the row of x that each reads; None: its own

    def in_place(self) -> RowTiles:
        """The same rows of an x that is sorted already."""
        return replace(self, source=None)


class Arithmetic(Protocol):
    """How one precision packs and multiplies."""

    activation: str  # the type that products read: F32, BF16 or F16

    def pack(self, matrices: Sequence[Tensor]) -> Matrix:
        """[out, in] of each group."""
        ...

    def pack_gated(self, gates: Sequence[Tensor], ups: Sequence[Tensor]) -> Matrix:
        """w1 and w3 of each group."""
        ...

    def pack_down(self, matrices: Sequence[Tensor]) -> Matrix:
        """w2 of each group: what multiplies the result of `gated`."""
        ...

    def packed_bytes(self, shape: tuple[int, ...]) -> int:
        """Of one packed [out, in] matrix."""
        ...

    def empty(self, rows: int, columns: int) -> cupy.ndarray:
        """Room for activations that products read: rows may be padded, with zeros."""
        ...

    def rounded(self, x: cupy.ndarray) -> cupy.ndarray:
        """float32 activations as products read them."""
        ...

    def linear(
        self,
        x: cupy.ndarray,
        matrix: Matrix,
        bias: cupy.ndarray | None = None,
        tiles: RowTiles | None = None,
    ) -> cupy.ndarray:
        """x @ W.T + bias: float32 [rows, columns]."""
        ...

    def gated(self, x: cupy.ndarray, matrix: Matrix, tiles: RowTiles | None = None) -> cupy.ndarray:
        """silu(x @ w1.T) * (x @ w3.T), as products read it."""
        ...


@dataclass(frozen=True, slots=True)
class TileCost:
    """What a kernel makes of a tile of some rows."""

    columns: int  # of a block
    cycles: int  # per k, on a multiprocessor that other blocks share


def launch(
    kernel: Kernel,
    threads: int,
    menu: Mapping[int, TileCost],
    x: cupy.ndarray,
    matrix: Matrix,
    outputs: tuple[Any, ...],
    tiles: RowTiles | None,
    columns: int,
) -> None:
    """Starts the product of all tiles; without a list, of tiles of the best size from `menu`."""
    source, listed = None, (None, None)
    if tiles is not None:
        source, listed = tiles.source, (tiles.tiles, tiles.count)
        count, tile_rows, rows = len(tiles.tiles), TILE_ROWS, tiles.rows
    else:
        rows = len(x)
        tile_rows = best_tile_rows(rows, matrix.width, menu)
        count = -(-rows // tile_rows)
    kernel(
        (matrix.width // GRID_COLUMNS, count), threads, x, source, matrix.packed, *outputs,
        *listed, tile_rows, rows, matrix.inputs, matrix.width, columns,
    )  # fmt: skip


def best_tile_rows(rows: int, width: int, menu: Mapping[int, TileCost]) -> int:
    """The rows of a tile for which the busiest multiprocessor has the least to do."""

    def cycles(tile_rows: int) -> float:
        blocks = -(-rows // tile_rows) * (width // menu[tile_rows].columns)
        per_processor = -(-blocks // processors())
        alone = 1.5 if per_processor == 1 else 1.0  # one block cannot fill a multiprocessor
        return alone * per_processor * menu[tile_rows].cycles

    return min(reversed(menu), key=cycles)


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
