"""What the matrix products of every precision share: packed matrices, row tiles, sizes.

A dense layer is a product of one group; experts bring a list of row tiles made on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import cupy

from lfm2kit.backend import BF16, F16, F32, Format, Tensor
from lfm2kit_cuda.device import processors

READ = (F32, F16, BF16)  # what packing.cu and the embedding's kernel have names for


@dataclass(frozen=True, slots=True)
class Matrix:
    """Packed matrices, one per group; results have `columns` columns."""

    packed: cupy.ndarray
    inputs: int  # length of the sums, padding included
    columns: int
    width: int  # columns with padding, and w1's and w3's both


class Tiling(NamedTuple):
    """How the rows of a group are cut into tiles."""

    rows: int  # of a tile at most: a multiple of the step
    step: int  # by which tiles of a group may differ: even_tiles.cuh
    by_height: bool = False  # the highest are listed first, for blocks that take tiles in turns


@dataclass(frozen=True, slots=True)
class RowTiles:
    """Which rows belong to which group, as `group_by_expert` lists them."""

    rows: int  # with those that belong to none, between the groups
    tiling: Tiling
    tiles: cupy.ndarray  # int32 [most, 4]
    count: cupy.ndarray  # int32 [1]
    source: cupy.ndarray | None  # int32 [rows]: the row of x that each is, < 0: none; None: its own

    def in_place(self) -> RowTiles:
        """The same rows of an x that is sorted already."""
        return replace(self, source=None)


class Activations(NamedTuple):
    """The input of a block inside a layer."""

    x: cupy.ndarray | None  # float32 [tokens, hidden_size], for routers
    rounded: Any  # as products read it


class Arithmetic(Protocol):
    """How one precision packs and multiplies.

    What its products read (`Any` here) comes from its own `empty`, `rounded` and `gated`: it has a
    length, and if from `empty` an `array` and an `extent` for the kernels that fill it
    (activations.py).
    """

    activation: str  # the type that products read, and of what blocks store: F32, BF16 or F16
    run: int  # rows of w1 before as many of w3 in a packed matrix

    def tiling(self, pairs: int, groups: int) -> Tiling:
        """For so many rows of so many groups, of which the device knows which have how many."""
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

    packed_format: Format  # of the values of packed matrices

    def packed_bytes(self, shape: tuple[int, ...]) -> int:
        """Of one packed [out, in] matrix."""
        ...

    def empty(self, rows: int, columns: int) -> Any:
        """Room for activations that products read: `activation_at` in slabs.cuh says where."""
        ...

    def rounded(self, x: cupy.ndarray) -> Any:
        """float32 activations as products read them."""
        ...

    def empty_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes that `empty` allocates."""
        ...

    def rounded_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes that `rounded` allocates."""
        ...

    def arranged_bytes(self, rows: int, inputs: int, width: int, tiles: int | None = None) -> int:
        """Return the bytes that a product takes to arrange its input, only while it runs.

        `width` is the packed rows of the matrix, `tiles` the length of a list of tiles.
        """
        ...

    def gated_bytes(self, rows: int, columns: int, tiles: int | None = None) -> int:
        """Return the bytes of what `gated` returns."""
        ...

    def linear(
        self,
        x: Any,
        matrix: Matrix,
        bias: cupy.ndarray | None = None,
        tiles: RowTiles | None = None,
    ) -> cupy.ndarray:
        """x @ W.T + bias: float32 [rows, columns]."""
        ...

    def linear_rounded(
        self,
        x: Any,
        matrix: Matrix,
        bias: cupy.ndarray | None = None,
        tiles: RowTiles | None = None,
    ) -> cupy.ndarray:
        """`linear` as `activation`, for kernels of the same block: [rows, columns], not padded."""
        ...

    def gated(self, x: Any, matrix: Matrix, tiles: RowTiles | None = None) -> Any:
        """silu(x @ w1.T) * (x @ w3.T), as products read it."""
        ...

    def down(self, x: Any, matrix: Matrix, tiles: RowTiles) -> cupy.ndarray:
        """`linear` of what `gated` returned for the same tiles, in 16 bits if they hold it."""
        ...


def read_format(tensor: Tensor) -> Format:
    """Returns the format in which kernels read a tensor: its own, if they know it, or F32."""
    return tensor.format if tensor.format in READ else F32


def readable(tensor: Tensor) -> Tensor:
    """Returns a tensor in its `read_format`: itself, or its values in F32."""
    is_read = read_format(tensor) == tensor.format
    return tensor if is_read else Tensor.of_array(tensor.name, tensor.float32())


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a kernel: their threads, and what they cost.

    `menu` has the rows and columns of a block, and its time in a unit of its own where a
    multiprocessor is full; `sharing[i]` is how many such times i + 1 blocks take together.
    """

    threads: int
    sharing: tuple[float, ...]
    menu: Mapping[tuple[int, int], float]

    def best(self, rows: int, width: int) -> tuple[int, int]:
        """The entry with which the busiest multiprocessor is done first."""

        def time(entry: tuple[int, int]) -> float:
            blocks = -(-rows // entry[0]) * (width // entry[1])
            full, rest = divmod(-(-blocks // processors()), len(self.sharing))
            return (full * self.sharing[-1] + (0, *self.sharing)[rest]) * self.menu[entry]

        return min(self.menu, key=time)


def listed(tiles: RowTiles | None) -> tuple[cupy.ndarray | None, cupy.ndarray | None]:
    """What kernels are told of a list of tiles, or of there being none."""
    return (tiles.tiles, tiles.count) if tiles else (None, None)


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
