"""The register tile: m rows of x times one panel of weights, as LLVM vector code.

    out[i, j] = sum_k x[i, k] * panel[k, j]        i < m <= MR, j < NR, k in order

A panel holds NR = NV * VL columns of a weight matrix's transpose, k by k: row k of it is NV vector
loads, and one broadcast of x[i, k] feeds NV fused multiply-adds.  The m * NV accumulators stay in
registers: 12 of AVX2's 16, 24 of AVX-512's 32.  Row-major x needs no packing at 6 rows.

Each out[i, j] is one chain of fused multiply-adds, the same for every m: its bits depend neither
on the number of rows nor on a row's place.  `llvm.fmuladd` and not `llvm.fma`, which becomes a
library call per lane on a CPU without FMA.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

MR = 6  # rows of a tile


def _vector_shape() -> tuple[int, int]:
    """(VL, NV): float32 lanes of a vector, vectors of a panel's row."""
    features = numba.config.CPU_FEATURES
    has = (
        features.split(",")
        if features
        else [f"+{name}" for name, there in llvm.get_host_cpu_features().items() if there]
    )
    if "+avx512f" in has:
        return 16, 4
    return (8, 2) if "+avx2" in has else (4, 4)


VL, NV = _vector_shape()
NR = NV * VL  # columns of a panel
UNROLL = 4  # steps of k per turn of the loop


@intrinsic(prefer_literal=True)
def _multiply(typingctx: Any, m: Any, x: Any, stride: Any, panel: Any, k: Any, out: Any) -> Any:
    """Addresses x [m, k] (rows `stride` floats apart), panel [k, NR], out [m, NR]; m is literal."""
    signature = types.void(m, types.intp, types.intp, types.intp, types.intp, types.intp)
    rows = m.literal_value

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, x_at, stride, panel_at, k, out_at = args
        _Emitter(builder, rows).emit(x_at, stride, panel_at, k, out_at)
        return context.get_dummy_value()

    return signature, codegen


class _Emitter:
    """Emits the tile's code at the builder's place."""

    def __init__(self, builder: Any, rows: int) -> None:
        self.builder = builder
        self.rows = rows
        self.float = ir.FloatType()
        self.vector = ir.VectorType(self.float, VL)
        self.index = ir.IntType(64)
        self.fmuladd = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(self.vector, [self.vector] * 3),
            f"llvm.fmuladd.v{VL}f32",
        )

    def emit(self, x_at: Any, stride: Any, panel_at: Any, k: Any, out_at: Any) -> None:
        b = self.builder
        x = [self._offset(x_at, b.mul(stride, self._constant(4 * i))) for i in range(self.rows)]
        unrolled = b.and_(k, self._constant(-UNROLL))
        zero = [ir.Constant(self.vector, None)] * (self.rows * NV)
        sums = self._loop(self._constant(0), unrolled, UNROLL, x, panel_at, zero)
        sums = self._loop(unrolled, k, 1, x, panel_at, sums)
        for i, value in enumerate(sums):
            b.store(value, self._pointer(out_at, self._constant(4 * VL * i), self.vector), align=4)

    def _loop(
        self, first: Any, last: Any, step: int, x: list[Any], panel_at: Any, sums: list[Any]
    ) -> list[Any]:
        """for k in range(first, last, step), the sums in registers all the way."""
        b = self.builder
        before = b.basic_block
        head, body, after = (b.append_basic_block(name) for name in ("k.head", "k.body", "k.end"))
        b.branch(head)
        b.position_at_end(head)
        k = b.phi(self.index)
        k.add_incoming(first, before)
        phis = [b.phi(self.vector) for _ in sums]
        for phi, value in zip(phis, sums, strict=True):
            phi.add_incoming(value, before)
        b.cbranch(b.icmp_signed("<", k, last), body, after)
        b.position_at_end(body)
        values = list(phis)
        for u in range(step):
            values = self._step(b.add(k, self._constant(u)), x, panel_at, values)
        following = b.add(k, self._constant(step))
        k.add_incoming(following, b.basic_block)
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(value, b.basic_block)
        b.branch(head)
        b.position_at_end(after)
        return phis

    def _step(self, k: Any, x: list[Any], panel_at: Any, sums: list[Any]) -> list[Any]:
        """One k: NV loads of weights, and for each row a broadcast and NV multiply-adds."""
        b = self.builder
        row = b.mul(k, self._constant(4 * NR))
        weights = [
            b.load(
                self._pointer(panel_at, b.add(row, self._constant(4 * VL * v)), self.vector),
                align=4,
            )
            for v in range(NV)
        ]
        values = []
        for i in range(self.rows):
            scalar = b.load(self._pointer(x[i], b.mul(k, self._constant(4)), self.float), align=4)
            splat = self._splat(scalar)
            values += [
                b.call(self.fmuladd, [splat, weights[v], sums[i * NV + v]]) for v in range(NV)
            ]
        return values

    def _splat(self, scalar: Any) -> Any:
        b = self.builder
        lane = b.insert_element(
            ir.Constant(self.vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0)
        )
        mask = ir.Constant(ir.VectorType(ir.IntType(32), VL), None)
        return b.shuffle_vector(lane, ir.Constant(self.vector, ir.Undefined), mask)

    def _constant(self, value: int) -> Any:
        return ir.Constant(self.index, value)

    def _offset(self, address: Any, nbytes: Any) -> Any:
        return self.builder.add(address, nbytes)

    def _pointer(self, address: Any, nbytes: Any, pointee: Any) -> Any:
        return self.builder.inttoptr(self._offset(address, nbytes), pointee.as_pointer())


TILE = types.void(types.intp, types.intp, types.intp, types.intp, types.intp)


def _tile(m: int) -> Any:
    """The compiled tile of m rows, a C function: drivers call it by address, and so compile
    in a second instead of taking it in and optimising it again."""

    @numba.cfunc(TILE, cache=True)
    def tile(x: int, stride: int, panel: int, k: int, out: int) -> None:
        _multiply(m, x, stride, panel, k, out)

    return tile


_TILES = [_tile(m) for m in range(1, MR + 1)]  # kept: their addresses are in TABLE
TABLE = np.array([0, *(tile.address for tile in _TILES)], dtype=np.int64)  # by number of rows


@intrinsic
def call_tile(
    typingctx: Any, address: Any, x: Any, stride: Any, panel: Any, k: Any, out: Any
) -> Any:
    """Calls an entry of TABLE with the tile's five arguments."""
    signature = types.void(*[types.intp] * 6)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        integer = ir.IntType(64)
        function = ir.FunctionType(ir.VoidType(), [integer] * 5)
        builder.call(builder.inttoptr(args[0], function.as_pointer()), args[1:])
        return context.get_dummy_value()

    return signature, codegen
