"""How activations lie in memory for the products that read them."""

from __future__ import annotations

from dataclasses import dataclass

import cupy

from lfm2kit_cuda.constants import ACTIVATIONS, SLABS
from lfm2kit_cuda.kernels import load_kernel
from lfm2kit_cuda.products import padded

SLAB = SLABS.SLAB
ALIGNMENT = 16  # the rows of a slab are a multiple of it
THREADS = 256


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows one after the other, of float32 or of the 16 bits that products read."""

    array: cupy.ndarray  # [rows, columns]

    def __len__(self) -> int:
        return len(self.array)

    @property
    def extent(self) -> int:
        """Return the number that kernels need of the layout: here the columns of a row."""
        return int(self.array.shape[1])


@dataclass(frozen=True, slots=True)
class Slabs:
    """Rows of 16 bits as in slabs.cuh; columns are padded with zeros, rows with anything."""

    array: cupy.ndarray  # uint16 [terms, slabs, extent, SLAB]
    rows: int

    def __len__(self) -> int:
        return self.rows

    @property
    def extent(self) -> int:
        """Return the number that kernels need of the layout: here the rows of a slab."""
        return int(self.array.shape[2])

    @property
    def columns(self) -> int:
        """Return the number of columns, padding included."""
        return int(self.array.shape[1]) * SLAB


def empty_slabs(rows: int, columns: int, terms: int = 1) -> Slabs:
    """Return slabs for a kernel that writes all columns, padding included."""
    shape = terms, padded(columns, SLAB) // SLAB, padded(rows, ALIGNMENT), SLAB
    return Slabs(cupy.empty(shape, cupy.uint16), rows)


def slabs_bytes(rows: int, columns: int, terms: int = 1) -> int:
    """Return the bytes that `empty_slabs` allocates."""
    return 2 * terms * padded(columns, SLAB) * padded(rows, ALIGNMENT)


def zero_slabs(rows: int, columns: int) -> Slabs:
    """Return slabs for a kernel that writes `columns`: the padding is zero."""
    slabs = empty_slabs(rows, columns)
    if slabs.columns > columns:
        slabs.array.fill(0)
    return slabs


def rounded(x: cupy.ndarray, dtype: str) -> Slabs:
    """Return float32 [rows, columns] rounded to BF16 or F16."""
    rows, columns = x.shape
    slabs = empty_slabs(rows, columns)
    kernel = load_kernel("activations", f"round_{dtype}")
    kernel((rows,), THREADS, x, slabs.array, columns, slabs.extent)
    return slabs


def placed(x: cupy.ndarray, source: cupy.ndarray | None) -> Slabs:
    """Return rows of 16 bits [rows, columns], which are rounded already.

    With a source, row i is row source[i] of x, as `gathered` has it.
    """
    rows, columns = len(x) if source is None else len(source), x.shape[1]
    slabs = empty_slabs(rows, columns)
    kernel = load_kernel("activations", "place_rows")
    kernel((rows,), THREADS, x, source, slabs.array, columns, slabs.extent)
    return slabs


def gathered(slabs: Slabs, source: cupy.ndarray) -> Slabs:
    """Return slabs whose row i is row source[i] of `slabs`, or anything where that is negative."""
    out = empty_slabs(len(source), slabs.columns)
    kernel = load_kernel("activations", "gather")
    arguments = slabs.array, source, out.array, slabs.columns, slabs.extent, out.extent
    kernel((len(source),), THREADS, *arguments)
    return out


def split(x: cupy.ndarray, source: cupy.ndarray | None) -> Slabs:
    """Return float32 [rows, columns] as three terms.

    With a source, row i is row source[i] of x, as `gathered` has it.
    """
    rows, columns = len(x) if source is None else len(source), x.shape[1]
    slabs = empty_slabs(rows, columns, ACTIVATIONS.TERMS)
    kernel = load_kernel("activations", "split")
    kernel((rows,), THREADS, x, source, slabs.array, columns, slabs.extent)
    return slabs
