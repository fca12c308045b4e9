"""The register tile: m rows of x times one panel of weights, as LLVM vector code.

    out[i, j] += sum_k x[i, k] * panel[k, j]       i < m <= MR, j < NR, k in order

A panel holds NR = NV * VL columns of a weight matrix's transpose, k by k: row k of it is NV
vectors, and one broadcast of x[i, k] feeds NV fused multiply-adds.  The m * NV accumulators stay
in registers: 12 of AVX2's 16, 24 of AVX-512's 32.  Row-major x needs no packing at 6 rows.
Weights of 16 bits are widened in registers; where several tiles use them, the first one leaves them
in float32 for the others.  The arithmetic is the same.

The sum is made of chains of fused multiply-adds (chains.py), the same for every m: its bits depend
neither on the number of rows nor on a row's place.  A call may begin and end within a chain, whose
sum so far lies in memory.  `llvm.fmuladd` and not `llvm.fma`, which becomes a library call per lane
on a CPU without FMA.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lfm2kit.backend import BF16, F16, F32, Format
from lfm2kit_cpu_simd.compiling import c_function
from lfm2kit_cpu_simd.machine import NR, NV, STORAGES, VL

MR = 6  # rows of a tile
UNROLL = 4  # steps of k per iteration of the loop
CACHE_LINE = 64
# Of a panel's sums.  For x of 2048 floats: 576 KB.
ROWS_AT_ONCE = 12 * MR
# The first four are handed over in registers.  The tile looks at `lines` all the time: from memory,
# it took up to a tenth longer where memory limits the speed.
ARGUMENTS = [types.intp] * 10
# The number of tiles from which on it is faster if one widens for all.  BF16 takes less work.
SHARED_FROM: dict[Format, int] = {F32: sys.maxsize, BF16: 4, F16: 3}


def lane_order(storage: Format) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return where in a row of a panel each of its NR columns lies.

    BF16 columns j and j + VL share 32 bits, because a shift and a mask widen both of them.
    """
    columns = np.arange(NR)
    if storage != BF16:
        return columns
    pair, half, lane = columns // (2 * VL), columns // VL % 2, columns % VL
    return pair * 2 * VL + 2 * lane + half


@intrinsic(prefer_literal=True)
def _multiply(
    typingctx: Any,
    storage: Any,
    m: Any,
    leaves: Any,
    x: Any,
    panel: Any,
    out: Any,
    lines: Any,
    stride: Any,
    first: Any,
    last: Any,
    bounds: Any,
    ahead: Any,
    wide: Any,
) -> Any:
    """Multiply at addresses: x [m, k] (rows `stride` floats apart), panel [k, NR], out [m, NR].

    `storage` (an index of STORAGES), m and `leaves` are literals.  The k are those from `first` to
    `last` of a product.  `bounds` int64 are where the chain of `first` begins, where it ends, where
    the next one ends, and so on.  ROWS_AT_ONCE rows after `out` lie the sums [m, NR] of a chain
    that began in an earlier call, and afterwards of one that ends in a later call.

    While it computes, the tile fetches memory from `ahead` on: `lines` cache lines with every
    UNROLL steps of k.  If it `leaves` its weights, they are in float32 at `wide` [k, NR]
    afterwards.
    """
    signature = types.void(storage, m, leaves, *ARGUMENTS)
    format, rows = STORAGES[storage.literal_value], m.literal_value
    emitter = Emitter(format, rows, leaves=bool(leaves.literal_value))

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        emitter.emit(builder, *args[3:])
        return context.get_dummy_value()

    return signature, codegen


class Emitter:
    """An emitter of the tile's vector code at a builder's place, for vectors of `vl` floats."""

    def __init__(
        self, storage: Format, rows: int, vl: int = VL, nv: int = NV, *, leaves: bool = False
    ) -> None:
        self.storage = storage
        self.rows = rows
        self.leaves = leaves
        self.vl, self.nv = vl, nv
        self.row_bytes = nv * vl * storage.block_bytes
        self.float = ir.FloatType()
        self.vector = ir.VectorType(self.float, vl)
        self.words = ir.VectorType(ir.IntType(32), vl)
        self.halves = ir.VectorType(ir.HalfType(), vl)
        self.index = ir.IntType(64)

    def emit(
        self,
        b: Any,
        x_at: Any,
        panel_at: Any,
        out_at: Any,
        lines: Any,
        stride: Any,
        first: Any,
        last: Any,
        bounds: Any,
        ahead: Any,
        wide: Any,
    ) -> None:
        self.begin(b)
        depth = b.sub(last, first)
        chain = b.add(out_at, self._constant(4 * ROWS_AT_ONCE * self.nv * self.vl))
        row_bytes = b.mul(stride, self._constant(4))
        x = [b.add(x_at, b.mul(row_bytes, self._constant(i))) for i in range(self.rows)]

        def step(k: Any, sums: Sequence[Any]) -> Sequence[Any]:
            weights = self._row(panel_at, k)
            if self.leaves:
                self._leave(weights, wide, k)
            return self._multiply_add(k, x, weights, sums)

        def iteration(k: Any, sums: Sequence[Any]) -> Sequence[Any]:
            fetched = b.mul(b.mul(k, lines), self._constant(CACHE_LINE // UNROLL))
            self._prefetch(b.add(ahead, fetched), lines)
            for u in range(UNROLL):
                sums = step(b.add(k, self._constant(u)), sums)
            return sums

        def piece(begin: Any, bound: Any) -> tuple[Any, Any]:
            """Emit the k from `begin` on, to the end of their chain or of the call."""
            following = b.add(bound, self._constant(8))
            chain_begin, chain_end = (
                b.sub(self._load(at, self.index), first) for at in (bound, following)
            )
            end = b.select(b.icmp_signed("<", depth, chain_end), depth, chain_end)
            unrolled = b.add(begin, b.and_(b.sub(end, begin), self._constant(-UNROLL)))
            sums = self._begun(b.icmp_signed("<", chain_begin, begin), chain)
            sums = self._loop(begin, unrolled, UNROLL, iteration, sums)
            sums = self._loop(unrolled, end, 1, step, sums)
            with b.if_else(b.icmp_signed("==", end, chain_end)) as (is_over, goes_on):
                with is_over:
                    self._add_to(sums, out_at)
                with goes_on:
                    self._store(sums, chain)
            return end, following

        self._pieces(depth, bounds, piece)

    def begin(self, b: Any) -> None:
        self.builder = b
        fma = ir.FunctionType(self.vector, [self.vector] * 3)
        self.fmuladd = cgutils.get_or_insert_function(b.module, fma, f"llvm.fmuladd.v{self.vl}f32")

    def _pieces(self, depth: Any, bounds: Any, piece: Any) -> None:
        """Emit `k = 0; while k < depth: k, bounds = piece(k, bounds)`."""
        b = self.builder
        before = b.basic_block
        head, body, after = map(b.append_basic_block, ("piece.head", "piece.body", "piece.end"))
        b.branch(head)
        b.position_at_end(head)
        phis = [b.phi(self.index) for _ in range(2)]
        for phi, value in zip(phis, (self._constant(0), bounds), strict=True):
            phi.add_incoming(value, before)
        b.cbranch(b.icmp_signed("<", phis[0], depth), body, after)
        b.position_at_end(body)
        for phi, value in zip(phis, piece(*phis), strict=True):
            phi.add_incoming(value, b.basic_block)
        b.branch(head)
        b.position_at_end(after)

    def _begun(self, is_begun: Any, chain: Any) -> list[Any]:
        """Emit the sums that a chain begins with here: those at `chain`, or zeros."""
        b, count = self.builder, self.rows * self.nv
        with b.if_else(is_begun) as (then, otherwise):
            with then:
                loaded = self._vectors(chain, count)
                loading = b.basic_block
            with otherwise:
                starting = b.basic_block
        phis = [b.phi(self.vector) for _ in range(count)]
        for phi, value in zip(phis, loaded, strict=True):
            phi.add_incoming(value, loading)
            phi.add_incoming(ir.Constant(self.vector, None), starting)
        return phis

    def _loop(self, first: Any, last: Any, stride: int, iteration: Any, sums: Sequence[Any]) -> Any:
        """Emit `for k in range(first, last, stride)`, whose sums stay in registers."""
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
        values = iteration(k, phis)
        k.add_incoming(b.add(k, self._constant(stride)), b.basic_block)
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(value, b.basic_block)
        b.branch(head)
        b.position_at_end(after)
        return phis

    def _multiply_add(
        self, k: Any, x: Sequence[Any], weights: Sequence[Any], sums: Sequence[Any]
    ) -> list[Any]:
        """Emit the work of one k: a broadcast and self.nv multiply-adds for each row."""
        b = self.builder
        values = []
        for i in range(self.rows):
            at = b.add(x[i], b.mul(k, self._constant(4)))
            splat = self._splat(self._load(at, self.float))
            values += [
                b.call(self.fmuladd, [splat, weights[v], sums[i * self.nv + v]])
                for v in range(self.nv)
            ]
        return values

    def _row(self, panel_at: Any, k: Any) -> list[Any]:
        """Emit the loads of row k of the panel, and return it as self.nv vectors of float32."""
        b = self.builder
        at = b.add(panel_at, b.mul(k, self._constant(self.row_bytes)))
        if self.storage == BF16:
            pairs = [self._load(at, self.words, 4 * self.vl * v) for v in range(self.nv // 2)]
            return [half for pair in pairs for half in self._widened_pair(pair)]
        if self.storage == F16:
            halves = [self._load(at, self.halves, 2 * self.vl * v) for v in range(self.nv)]
            return [b.fpext(half, self.vector) for half in halves]
        return self._vectors(at, self.nv)

    def _widened_pair(self, pair: Any) -> list[Any]:
        """Return the lower and the upper BF16 of each word as float32, by a shift and a mask."""
        b = self.builder
        low = b.shl(pair, ir.Constant(self.words, [16] * self.vl))
        high = b.and_(pair, ir.Constant(self.words, [0xFFFF0000] * self.vl))
        return [b.bitcast(low, self.vector), b.bitcast(high, self.vector)]

    def _leave(self, weights: Sequence[Any], wide: Any, k: Any) -> None:
        """Emit the stores of row k of the panel, as `_row` returns it."""
        b = self.builder
        at = b.add(wide, b.mul(k, self._constant(4 * self.vl * self.nv)))
        self._store(weights, at)

    def _prefetch(self, at: Any, lines: Any) -> None:
        """Emit the fetches of `lines` cache lines into the second-level cache."""
        b = self.builder
        pointer = ir.IntType(8).as_pointer()
        word = ir.IntType(32)
        prefetch = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(ir.VoidType(), [pointer, word, word, word]), "llvm.prefetch"
        )
        read, into_second_level, data = word(0), word(2), word(1)

        def fetch(line: Any, sums: Sequence[Any]) -> Sequence[Any]:
            target = b.inttoptr(b.add(at, b.mul(line, self._constant(CACHE_LINE))), pointer)
            b.call(prefetch, [target, read, into_second_level, data])
            return sums

        self._loop(self._constant(0), lines, 1, fetch, [])

    def _splat(self, scalar: Any) -> Any:
        b = self.builder
        lane = b.insert_element(
            ir.Constant(self.vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0)
        )
        mask = ir.Constant(self.words, None)
        return b.shuffle_vector(lane, ir.Constant(self.vector, ir.Undefined), mask)

    def _load(self, at: Any, kind: Any, offset: int = 0) -> Any:
        at = self.builder.add(at, self._constant(offset))
        return self.builder.load(self.builder.inttoptr(at, kind.as_pointer()), align=2)

    def _vectors(self, at: Any, count: int) -> list[Any]:
        return [self._load(at, self.vector, 4 * self.vl * i) for i in range(count)]

    def _add_to(self, values: Sequence[Any], at: Any) -> None:
        b = self.builder
        before = self._vectors(at, len(values))
        self._store([b.fadd(a, value) for a, value in zip(before, values, strict=True)], at)

    def _store(self, values: Sequence[Any], at: Any) -> None:
        b = self.builder
        for i, value in enumerate(values):
            place = b.add(at, self._constant(4 * self.vl * i))
            b.store(value, b.inttoptr(place, self.vector.as_pointer()), align=4)

    def _constant(self, value: int) -> Any:
        return ir.Constant(self.index, value)


TILE = types.void(*ARGUMENTS)


def _tile(storage: int, m: int, leaves: int) -> Any:
    """Return the compiled tile of m rows as a C function.

    Drivers call it by its address.  So they compile in a second; otherwise each would optimise the
    tile again.
    """

    @c_function(TILE)
    def tile(
        x: int, panel: int, out: int, lines: int, stride: int, first: int, last: int, bounds: int,
        ahead: int, wide: int,
    ) -> None:  # fmt: skip
        _multiply(
            storage, m, leaves, x, panel, out, lines, stride, first, last, bounds, ahead, wide
        )

    return tile


# By storage, whether they leave their weights, and rows.  Kept because TABLES has their addresses.
_FUNCTIONS = {
    (storage, leaves): [_tile(s, m, leaves) for m in range(1, MR + 1)]
    for s, storage in enumerate(STORAGES)
    for leaves in ((0,) if storage == F32 else (0, 1))
}


def _addresses(storage: Format, leaves: int) -> list[int]:
    return [0, *(function.address for function in _FUNCTIONS[storage, leaves])]


# The addresses of tiles, [3, MR + 1] for each storage: those that use a panel ALONE, the FIRST of
# several, which leaves it in float32, and LATER ones, which take it from there; by number of rows.
ALONE, FIRST, LATER = 0, 1, 2
TABLES = {
    storage: np.array(
        [_addresses(storage, 0), _addresses(storage, int(storage != F32)), _addresses(F32, 0)]
    )
    for storage in STORAGES
}


@intrinsic
def call_tile(
    typingctx: Any,
    address: Any,
    x: Any,
    panel: Any,
    out: Any,
    lines: Any,
    stride: Any,
    first: Any,
    last: Any,
    bounds: Any,
    ahead: Any,
    wide: Any,
) -> Any:
    """Call an entry of a table with the tile's arguments."""
    signature = types.void(types.intp, *ARGUMENTS)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        call_address(builder, args[0], args[1:])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def call_tile_of_one_chain(
    typingctx: Any,
    address: Any,
    x: Any,
    stride: Any,
    panel: Any,
    k: Any,
    out: Any,
    lines: Any,
    ahead: Any,
) -> Any:
    """Call an entry of a table for a product of k terms in one chain."""
    signature = types.void(*[types.intp] * 8)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address, x, stride, panel, k, out, lines, ahead = args
        zero = ir.Constant(k.type, 0)
        memory = cgutils.alloca_once(builder, k.type, 2)
        builder.store(zero, memory)
        builder.store(k, builder.gep(memory, [ir.Constant(k.type, 1)]))
        bounds = builder.ptrtoint(memory, k.type)
        unused = zero
        arguments = [x, panel, out, lines, stride, zero, k, bounds, ahead, unused]
        call_address(builder, address, arguments)
        return context.get_dummy_value()

    return signature, codegen


def call_address(builder: Any, address: Any, arguments: Sequence[Any]) -> None:
    """Emit the call of a function whose address is kept."""
    function = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(builder.inttoptr(address, function.as_pointer()), arguments)
