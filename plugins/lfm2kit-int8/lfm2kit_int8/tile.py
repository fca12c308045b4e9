"""The register tile: m rows of x times the 4 rows of a panel of int8 weights, as LLVM vector code.

    sums[i, j] = sum_k x[i, k] * panel[j, k]       i < m <= MOST_ROWS, j < 4

Weights are widened to float32 in registers, and multiplied with float32: nothing but their rounding
makes a product less exact than one of float32 weights.  Scales come later (products.py).

Each sum has the lanes of one vector, which takes every VL-th k in order.  At the end its halves are
added until one lane is left, and the k beyond the last whole vector are added one by one.  That is
the same for every m, so the bits of a row do not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from lfm2kit_cpu_simd.compiling import c_function
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lfm2kit_int8.packing import BLOCK, LINE, PANELS, ROWS


def _sizes() -> tuple[int, int]:
    """Return the lanes of a vector and the most rows of a tile, which fill 3/4 of the registers."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 6
    return (8, 3) if features.get("avx2") else (4, 6 if features.get("neon") else 3)


VL, MOST_ROWS = _sizes()
# While it computes, a tile fetches what is 16 lines of each row ahead.  Where only the CPU does so,
# products of few rows take 1.1 to 1.3 times as long (docs/decisions/0055-int8-kernels.md).
AHEAD = 16 * LINE * ROWS

INDEX, WORD, BYTE, FLOAT = ir.IntType(64), ir.IntType(32), ir.IntType(8), ir.FloatType()
ARGUMENTS = [types.intp] * 4
Sums = Sequence[Any]


class Emitter:
    """Emits a tile of `rows` rows at a builder's place, in vectors of `vl` floats."""

    def __init__(self, builder: Any, rows: int, vl: int, xs_at: Any, panel_at: Any) -> None:
        self.builder, self.panel_at, self.vl = builder, panel_at, vl
        self.floats, self.bytes = ir.VectorType(FLOAT, vl), ir.VectorType(BYTE, vl)
        self.xs = [self._load(xs_at, INDEX, 8 * i) for i in range(rows)]

    def emit(self, k: Any, sums_at: Any) -> None:
        b = self.builder
        in_lines, in_vectors = (b.and_(k, INDEX(-size)) for size in (LINE, self.vl))
        sums: Sums = [ir.Constant(self.floats, None)] * (len(self.xs) * ROWS)
        sums = self._loop(INDEX(0), in_lines, LINE, self._line, sums)
        sums = self._loop(in_lines, in_vectors, self.vl, self._vector, sums)
        lanes = [self._added_up(vector) for vector in sums]
        for i, lane in enumerate(self._loop(in_vectors, k, 1, self._single, lanes)):
            place = 4 * (i // ROWS * BLOCK + i % ROWS * PANELS)
            b.store(lane, self._pointer(sums_at, FLOAT, place), align=4)

    def _line(self, k: Any, sums: Sums) -> Sums:
        for row in range(ROWS):
            self._fetch(self._weights_at(k, row), AHEAD)
        for step in range(0, LINE, self.vl):
            sums = self._vector(self.builder.add(k, INDEX(step)), sums)
        return sums

    def _vector(self, k: Any, sums: Sums) -> Sums:
        return self._multiply_add(k, sums, self.floats, self.bytes)

    def _single(self, k: Any, sums: Sums) -> Sums:
        return self._multiply_add(k, sums, FLOAT, BYTE)

    def _multiply_add(self, k: Any, sums: Sums, floats: Any, stored: Any) -> Sums:
        """Add a vector of terms, or one, to each sum: those of x row by row."""
        b = self.builder
        weights = [
            b.sitofp(self._load(self._weights_at(k, row), stored), floats) for row in range(ROWS)
        ]
        xs = [self._load(b.add(x, b.mul(k, INDEX(4))), floats) for x in self.xs]
        kind = ir.FunctionType(floats, [floats] * 3)
        name = f"llvm.fmuladd.{'f32' if floats == FLOAT else f'v{self.vl}f32'}"
        multiply_add = cgutils.get_or_insert_function(b.module, kind, name)
        terms = [(x, weight) for x in xs for weight in weights]
        return [b.call(multiply_add, [*term, sum]) for term, sum in zip(terms, sums, strict=True)]

    def _weights_at(self, k: Any, row: int) -> Any:
        """Return the address of a panel's weight: [lines, ROWS, LINE]."""
        b = self.builder
        line, rest = b.and_(k, INDEX(-LINE)), b.and_(k, INDEX(LINE - 1))
        offset = b.add(b.mul(line, INDEX(ROWS)), b.add(rest, INDEX(row * LINE)))
        return b.add(self.panel_at, offset)

    def _added_up(self, vector: Any) -> Any:
        """Add the upper half of a vector to its lower half, until there is one lane."""
        b, lanes = self.builder, self.vl
        while lanes > 1:
            lanes //= 2
            order = ir.VectorType(WORD, lanes)
            halves = [
                b.shuffle_vector(
                    vector,
                    ir.Constant(vector.type, ir.Undefined),
                    ir.Constant(order, list(range(first, first + lanes))),
                )
                for first in (0, lanes)
            ]
            vector = b.fadd(*halves)
        return b.extract_element(vector, WORD(0))

    def _loop(
        self, begin: Any, end: Any, step: int, body: Callable[[Any, Sums], Sums], sums: Sums
    ) -> Sums:
        """Emit a loop over k, which takes the sums along in registers."""
        b = self.builder
        before = b.basic_block
        head, inside, after = (b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        k, carried = b.phi(INDEX), [b.phi(value.type) for value in sums]
        b.cbranch(b.icmp_signed("<", k, end), inside, after)
        b.position_at_end(inside)
        following = [b.add(k, INDEX(step)), *body(k, carried)]
        for phi, first, next_one in zip([k, *carried], [begin, *sums], following, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(next_one, inside)
        b.branch(head)
        b.position_at_end(after)
        return carried

    def _fetch(self, at: Any, ahead: int) -> None:
        """Have the second-level cache fetch a line."""
        pointer, read, level, data = BYTE.as_pointer(), WORD(0), WORD(2), WORD(1)
        kind = ir.FunctionType(ir.VoidType(), [pointer, WORD, WORD, WORD])
        fetch = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch")
        self.builder.call(fetch, [self._pointer(at, BYTE, ahead), read, level, data])

    def _load(self, at: Any, kind: Any, offset: int = 0) -> Any:
        return self.builder.load(self._pointer(at, kind, offset), align=1)

    def _pointer(self, at: Any, kind: Any, offset: int) -> Any:
        b = self.builder
        return b.inttoptr(b.add(at, INDEX(offset)), kind.as_pointer())


@intrinsic(prefer_literal=True)
def _multiply(typingctx: Any, m: Any, vl: Any, xs: Any, panel: Any, k: Any, sums: Any) -> Any:
    """Multiply at addresses: m rows of x, whose addresses are at `xs`, and a panel.

    Sum (i, j) is left at sums[i * BLOCK + j * PANELS].  m and vl are literals.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        xs_at, panel_at, k, sums_at = args[2:]
        rows, lanes = m.literal_value, vl.literal_value
        Emitter(builder, rows, lanes, xs_at, panel_at).emit(k, sums_at)
        return context.get_dummy_value()

    return types.void(m, vl, *ARGUMENTS), codegen


def compiled_tile(m: int, vl: int) -> Any:
    """Return the tile of m rows, in vectors of `vl` floats, as a C function.

    It is called by its address.  Else each kernel that calls it would compile it once more.
    """

    @c_function(types.void(*ARGUMENTS))
    def tile(xs: int, panel: int, k: int, sums: int) -> None:
        _multiply(m, vl, xs, panel, k, sums)

    return tile


_TILES = [
    compiled_tile(m, VL) for m in range(1, MOST_ROWS + 1)
]  # kept, because TILES has their addresses
TILES = np.array([0, *(tile.address for tile in _TILES)])  # by number of rows


@intrinsic
def call_tile(typingctx: Any, address: Any, xs: Any, panel: Any, k: Any, sums: Any) -> Any:
    """Call an entry of TILES."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [INDEX] * len(ARGUMENTS))
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.intp, *ARGUMENTS), codegen
