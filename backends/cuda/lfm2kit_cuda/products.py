"""What the matrix products of every precision share: packed matrices, row tiles, sizes.

A dense layer is a product of one group; experts bring a list of row tiles made on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import cupy

from lfm2kit.backend import BF16, F16, F32, Format, Tensor
from lfm2kit_cuda.device import sm_count

READ = (F32, F16, BF16)  # what packing.cu and the embedding's kernel have names for


@dataclass(frozen=True, slots=True)
class Matrix:
    """Packed matrices, one per group; results have `columns` columns."""

    packed: cupy.ndarray
    inputs: int  # length of the sums, padding included
    columns: int
    width: int  # columns with padding, and w1's and w3's both


class Tiling(NamedTuple):
    """A way to cut the rows of a group into tiles."""

    rows: int  # of a tile at most: a multiple of the step
    step: int  # by which tiles of a group may differ: even_tiles.cuh
    by_height: bool = False  # the highest are listed first: see experts.cu


class Listed(NamedTuple):
    """What is known of a list of tiles before the device makes it."""

    tiling: Tiling
    most: int  # tiles


@dataclass(frozen=True, slots=True)
class RowTiles:
    """The rows of each group, as `group_by_expert` lists them."""

    rows: int  # with those that belong to none, between the groups
    tiling: Tiling
    tiles: cupy.ndarray  # int32 [most, 4]
    count: cupy.ndarray  # int32 [1]
    source: cupy.ndarray | None  # int32 [rows]: the row of x that each is, < 0: none; None: its own
    are_older: bool = False  # than the kernel ahead of a product, which then need not wait for them

    def in_place(self) -> RowTiles:
        """Return the tiles for a product whose x is the result of a product of these tiles.

        That product, or a kernel after it, runs ahead of the next one.  So the list is older.
        """
        return replace(self, source=None, are_older=True)


class Activations(NamedTuple):
    """The input of a block inside a layer."""

    x: cupy.ndarray | None  # float32 [tokens, hidden_size], for routers
    rounded: Any  # as products read it


class Arithmetic(Protocol):
    """A precision's way to pack and multiply.

    What its products read (`Any` here) comes from its own `empty`, `rounded` and `gated`.  It has a
    length.  What `empty` returns also has an `array` and an `extent`, for the kernels that fill it
    (activations.py).
    """

    activation: str  # the type that products read, and of what blocks store: F32, BF16 or F16
    run: int  # rows of w1 before the same number of w3, in a packed matrix

    def flops_per_second(self) -> float:
        """Measure what the unit that multiplies does at best, of what a product has to do."""
        ...

    def tiling(self, pairs: int, groups: int) -> Tiling:
        """Return the tiling of `pairs` rows in groups whose sizes only the device knows."""
        ...

    def pack(self, matrices: Sequence[Tensor]) -> Matrix:
        """Pack the [out, in] matrix of each group.

        Products may read a matrix before the kernel ahead of theirs has ended, so another kernel or
        copy must come between packing and the first product, or a wait for the device.
        """
        ...

    def pack_gated(self, gates: Sequence[Tensor], ups: Sequence[Tensor]) -> Matrix:
        """Pack w1 and w3 of each group as one matrix, for `gated`."""
        ...

    def pack_down(self, matrices: Sequence[Tensor]) -> Matrix:
        """Pack w2 of each group, which multiplies the result of `gated`."""
        ...

    packed_format: Format  # of the values of packed matrices

    def packed_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of one packed [out, in] matrix."""
        ...

    def empty(self, rows: int, columns: int) -> Any:
        """Return uninitialised activations; `activation_at` in slabs.cuh says where each lies."""
        ...

    def rounded(self, x: cupy.ndarray) -> Any:
        """Return activations as products read them: of float32, or rounded to 16 bits already."""
        ...

    def empty_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes that `empty` allocates."""
        ...

    def rounded_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes that `rounded` allocates."""
        ...

    def arranged_bytes(
        self, rows: int, inputs: int, width: int, tiles: Listed | None = None
    ) -> int:
        """Return the bytes that a product takes to arrange its input, only while it runs.

        `width` is the packed rows of the matrix.
        """
        ...

    def gated_bytes(self, rows: int, columns: int, tiles: Listed | None = None) -> int:
        """Return the bytes of what `gated` returns."""
        ...

    def linear(
        self,
        x: Any,
        matrix: Matrix,
        bias: cupy.ndarray | None = None,
        tiles: RowTiles | None = None,
    ) -> cupy.ndarray:
        """Return x @ W.T + bias: float32 [rows, columns]."""
        ...

    def linear_rounded(
        self,
        x: Any,
        matrix: Matrix,
        bias: cupy.ndarray | None = None,
        tiles: RowTiles | None = None,
    ) -> cupy.ndarray:
        """Return `linear` in the type `activation`, for the same block's kernels; not padded."""
        ...

    def gated(self, x: Any, matrix: Matrix, tiles: RowTiles | None = None) -> Any:
        """Return silu(x @ w1.T) * (x @ w3.T), as products read it."""
        ...

    def down(self, x: Any, matrix: Matrix, tiles: RowTiles) -> cupy.ndarray:
        """Return `linear` of the result of `gated` for these tiles, in 16 bits if they hold it."""
        ...


def read_format(tensor: Tensor) -> Format:
    """Return the format in which kernels read a tensor: its own, if they know it, or F32."""
    return tensor.format if tensor.format in READ else F32


def readable(tensor: Tensor) -> Tensor:
    """Return a tensor in its `read_format`: itself, or its values in F32."""
    is_read = read_format(tensor) == tensor.format
    return tensor if is_read else Tensor.of_array(tensor.name, tensor.float32())


@dataclass(frozen=True, slots=True)
class Ctas:
    """The CTAs of a kernel: their threads, and what they cost.

    `menu` has the rows and columns of a CTA, and its time on a full SM, in a unit of its own;
    `sharing[i]` is how many such times i + 1 CTAs take together.
    """

    threads: int
    sharing: tuple[float, ...]
    menu: Mapping[tuple[int, int], float]

    def best(self, rows: int, width: int) -> tuple[int, int]:
        """Return the entry with which the busiest SM is done first."""

        def time(entry: tuple[int, int]) -> float:
            ctas = -(-rows // entry[0]) * (width // entry[1])
            full, rest = divmod(-(-ctas // sm_count()), len(self.sharing))
            return (full * self.sharing[-1] + (0, *self.sharing)[rest]) * self.menu[entry]

        return min(self.menu, key=time)


def listed(tiles: RowTiles | None) -> tuple[cupy.ndarray | None, cupy.ndarray | None]:
    """Return the arguments for a list of tiles: the list and its length, or None for both."""
    return (tiles.tiles, tiles.count) if tiles else (None, None)


def are_known(tiles: RowTiles | None) -> bool:
    """Return whether a product knows its weights before the kernel ahead of it has ended."""
    return tiles is None or tiles.are_older


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
