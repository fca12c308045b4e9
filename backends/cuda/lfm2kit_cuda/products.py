"""What the matrix products of every precision share: packed matrices, row tiles, the launch.

A dense layer is a product of one group; experts bring a list of row tiles made on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import cupy

from lfm2kit.backend import Tensor
from lfm2kit_cuda.device import processors
from lfm2kit_cuda.kernels import Kernel


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
    tile_rows: int  # at most
    tiles: cupy.ndarray  # int32 [most, 4]
    count: cupy.ndarray  # int32 [1]
    source: cupy.ndarray | None  # int32 [rows]: the row of x that each reads; None: its own

    def in_place(self) -> RowTiles:
        """The same rows of an x that is sorted already."""
        return replace(self, source=None)


class Activations(NamedTuple):
    """The input of a block inside a layer."""

    x: cupy.ndarray | None  # float32 [tokens, hidden_size], for routers
    rounded: cupy.ndarray  # as products read it


class Arithmetic(Protocol):
    """How one precision packs and multiplies."""

    activation: str  # the type that products read, and of what blocks store: F32, BF16 or F16

    def row_tiles(self, pairs: int, groups: int) -> tuple[int, int]:
        """Of a list of row tiles: the most rows of one, and what all but the last of a group are
        a multiple of, if they have not the most."""
        ...

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

    def linear_rounded(
        self,
        x: cupy.ndarray,
        matrix: Matrix,
        bias: cupy.ndarray | None = None,
        tiles: RowTiles | None = None,
    ) -> cupy.ndarray:
        """`linear` as `activation`, for kernels of the same block: [rows, columns], not padded."""
        ...

    def gated(self, x: cupy.ndarray, matrix: Matrix, tiles: RowTiles | None = None) -> cupy.ndarray:
        """silu(x @ w1.T) * (x @ w3.T), as products read it."""
        ...


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a kernel: their threads, and what they cost.

    `menu` has the rows and columns of a block, and its time in a unit of its own where a
    multiprocessor is full; `sharing[i]` is how many such times i + 1 blocks take together.
    Listed tiles are made in blocks of the first entry's columns.
    """

    threads: int
    sharing: tuple[float, ...]
    menu: Mapping[tuple[int, int], int]

    def best(self, rows: int, width: int) -> tuple[int, int]:
        """The entry with which the busiest multiprocessor is done first."""

        def time(entry: tuple[int, int]) -> float:
            blocks = -(-rows // entry[0]) * (width // entry[1])
            full, rest = divmod(-(-blocks // processors()), len(self.sharing))
            return (full * self.sharing[-1] + (0, *self.sharing)[rest]) * self.menu[entry]

        return min(self.menu, key=time)


def launch(
    kernel: Kernel,
    blocks: Blocks,
    x: cupy.ndarray,
    matrix: Matrix,
    outputs: tuple[cupy.ndarray | None, ...],
    tiles: RowTiles | None,
    columns: int,
) -> None:
    """Starts the product of all tiles; without a list, of tiles of the best size on the menu."""
    if tiles is None:
        rows, source, listed = len(x), None, (None, None)
        tile_rows, tile_columns = blocks.best(rows, matrix.width)
        count = -(-rows // tile_rows)
    else:
        rows, source, listed = tiles.rows, tiles.source, (tiles.tiles, tiles.count)
        tile_rows, tile_columns = next(iter(blocks.menu))
        count = len(tiles.tiles)
    kernel(
        (matrix.width // tile_columns, count), blocks.threads, x, source, matrix.packed, *outputs,
        *listed, tile_rows, rows, matrix.inputs, matrix.width, columns,
    )  # fmt: skip


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
