"""The choice of experts for VL rows at once, as LLVM vector code: each lane has a row of its own.

Scores are loaded row by row and transposed in registers, so that a vector has one expert's score of
every row.  The experts come one after the other, and each lane keeps a list of the best k so far,
sorted by biased score:

    above[j] = biased > list[j]          for all j; if above[j], then above[j + 1] as well
    list[j]  = above[j] ? (above[j - 1] ? list[j - 1] : biased) : list[j]

An expert goes before those that it exceeds, and they move on by one.  Among equal ones the first
that came, which has the lowest id, stays in front.  A list begins with NaN: all numbers, even -inf,
count as above it.  So NaN among the biased scores itself has no place here, and is left to others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lfm2kit_cpu_simd.compiling import c_function
from lfm2kit_cpu_simd.machine import VL

MOST_TAKEN = 8  # more would not stay in registers


@intrinsic(prefer_literal=True)
def _choose(
    typingctx: Any,
    taken: Any,
    rows: Any,
    scores: Any,
    num_experts: Any,
    bias: Any,
    normalise: Any,
    scaling: Any,
    expert_ids: Any,
    expert_weights: Any,
) -> Any:
    """Choose for 1 to VL rows of scores [rows, num_experts].

    Results are ids and weights [rows, taken]; arrays are addresses, `taken` is a literal.
    Returns False if a biased score is NaN; the results mean nothing then.
    """
    signature = types.boolean(taken, *ARGUMENTS)
    emitter = Emitter(taken.literal_value)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return emitter.emit(builder, *args[1:])

    return signature, codegen


class Emitter:
    """Emits the vector code at a builder's place, for vectors of `vl` floats."""

    def __init__(self, taken: int, vl: int = VL) -> None:
        self.taken, self.vl = taken, vl
        self.float, self.word, self.index = ir.FloatType(), ir.IntType(32), ir.IntType(64)
        self.floats, self.words = (ir.VectorType(kind, vl) for kind in (self.float, self.word))

    def emit(
        self,
        b: Any,
        count: Any,
        scores: Any,
        num_experts: Any,
        bias: Any,
        normalise: Any,
        scaling: Any,
        expert_ids: Any,
        expert_weights: Any,
    ) -> Any:
        self.builder = b
        nothing = ir.Constant(self.floats, [float("nan")] * self.vl)
        zero = ir.Constant(self.words, None)
        self.best = [cgutils.alloca_once_value(b, nothing) for _ in range(self.taken)]
        self.ids = [cgutils.alloca_once_value(b, zero) for _ in range(self.taken)]
        self.is_nan = cgutils.alloca_once_value(b, zero)
        row_bytes = b.mul(num_experts, self.index(4))
        rows = [b.add(scores, b.mul(row_bytes, i)) for i in self._lanes_rows(count)]
        whole = b.and_(num_experts, self.index(-self.vl))
        with cgutils.for_range_slice(b, self.index(0), whole, self.index(self.vl)) as (e, _):
            self._take(self._transposed([self._load(row, e, self.floats) for row in rows]), bias, e)
        with cgutils.for_range_slice(b, whole, num_experts, self.index(1)) as (e, _):
            self._take([self._vector([self._load(row, e, self.float) for row in rows])], bias, e)
        ids = [b.load(place) for place in self.ids]
        self._store(ids, expert_ids, count)
        self._store(self._weights(ids, rows, normalise, scaling), expert_weights, count)
        lost = b.icmp_signed("!=", b.load(self.is_nan), zero)
        return b.icmp_signed("==", b.bitcast(lost, ir.IntType(self.vl)), ir.IntType(self.vl)(0))

    def _lanes_rows(self, count: Any) -> Sequence[Any]:
        """Return each lane's row.  Lanes without one of their own repeat the last."""
        b, last = self.builder, self.builder.sub(count, self.index(1))
        numbers = [self.index(i) for i in range(self.vl)]
        return [b.select(b.icmp_signed("<", i, last), i, last) for i in numbers]

    def _transposed(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Return the columns.  Each step interleaves the first half of the vectors with the second.

        Seen as bits of the places, it moves the highest bit of a vector's number to the lowest of
        the lanes; after as many steps as there are bits, numbers and lanes have changed places.
        """
        half = self.vl // 2
        for _ in range(self.vl.bit_length() - 1):
            rows = [
                self._shuffled(rows[i], rows[i + half], self._interleaving(start))
                for i in range(half)
                for start in (0, half)
            ]
        return rows

    def _interleaving(self, start: int) -> list[int]:
        return [start + lane // 2 + lane % 2 * self.vl for lane in range(self.vl)]

    def _take(self, columns: Sequence[Any], bias: Any, first: Any) -> None:
        """Emit the insertion of the experts from `first` on into the lists."""
        b = self.builder
        first_id = self._splat(b.trunc(first, self.word), self.vl)
        biased, ids = [], []
        for i, column in enumerate(columns):
            its_bias = self._load(bias, b.add(first, self.index(i)), self.float)
            biased.append(b.fadd(column, self._splat(its_bias, self.vl)))
            ids.append(b.add(first_id, ir.Constant(self.words, [i] * self.vl)))
        self._look_for_nan(biased)
        for value, expert in zip(biased, ids, strict=True):
            self._insert(value, expert)

    def _look_for_nan(self, biased: Sequence[Any]) -> None:
        """Emit the check, by a comparison that is true if one of two numbers is NaN."""
        b = self.builder
        is_nan = b.load(self.is_nan)
        for one, other in zip(biased[::2], biased[1::2] or biased, strict=True):
            is_nan = b.or_(is_nan, b.sext(b.fcmp_unordered("uno", one, other), self.words))
        b.store(is_nan, self.is_nan)

    def _insert(self, biased: Any, expert: Any) -> None:
        b = self.builder
        best = [b.load(place) for place in self.best]
        above = [b.fcmp_unordered(">", biased, value) for value in best]
        for places, new in ((self.best, biased), (self.ids, expert)):
            old = [b.load(place) for place in places]
            for j, place in enumerate(places):
                moved = b.select(above[j - 1], old[j - 1], new) if j else new
                b.store(b.select(above[j], moved, old[j]), place)

    def _weights(
        self, ids: Sequence[Any], rows: Sequence[Any], normalise: Any, scaling: Any
    ) -> Sequence[Any]:
        """Return the weights of what was chosen: its scores, added in the order of choice."""
        b, at = self.builder, self._vector(rows)
        word_bytes = ir.Constant(at.type, [4] * self.vl)
        scores = [self._gather(b.add(at, b.mul(b.sext(i, at.type), word_bytes))) for i in ids]
        total = ir.Constant(self.floats, None)
        for score in scores:
            total = b.fadd(total, score)
        divisor = b.fadd(total, ir.Constant(self.floats, [float(np.float32(1e-6))] * self.vl))
        one = ir.Constant(self.floats, [1.0] * self.vl)
        divisor = b.select(b.icmp_signed("!=", normalise, self.index(0)), divisor, one)
        scaling = self._splat(scaling, self.vl)
        return [b.fmul(b.fdiv(score, divisor), scaling) for score in scores]

    def _store(self, vectors: Sequence[Any], at: Any, count: Any) -> None:
        """Emit the store of k vectors' first `count` lanes, row by row."""
        b = self.builder
        joined = list(vectors)
        while len(joined) > 1:
            joined += joined[-1:] * (len(joined) % 2)
            everything = list(range(2 * joined[0].type.count))
            joined = [
                self._shuffled(one, other, everything)
                for one, other in zip(joined[::2], joined[1::2], strict=True)
            ]
        by_rows = [j * self.vl + lane for lane in range(self.vl) for j in range(self.taken)]
        result = self._shuffled(joined[0], joined[0], by_rows)
        kind = "i32" if vectors[0].type == self.words else "f32"
        name = f"llvm.masked.store.v{len(by_rows)}{kind}.p0"
        pointer = b.inttoptr(at, result.type.as_pointer())
        mask = self._first(b.mul(count, self.index(self.taken)), len(by_rows))
        self._call(name, ir.VoidType(), result, pointer, self.word(4), mask)

    def _first(self, count: Any, size: int) -> Any:
        """Return a mask of the first `count` of `size` lanes."""
        lanes = ir.Constant(ir.VectorType(self.word, size), list(range(size)))
        counts = self._splat(self.builder.trunc(count, self.word), size)
        return self.builder.icmp_signed("<", lanes, counts)

    def _shuffled(self, one: Any, other: Any, places: Sequence[int]) -> Any:
        mask = ir.Constant(ir.VectorType(self.word, len(places)), list(places))
        return self.builder.shuffle_vector(one, other, mask)

    def _vector(self, scalars: Sequence[Any]) -> Any:
        vector = ir.Constant(ir.VectorType(scalars[0].type, self.vl), ir.Undefined)
        for i, scalar in enumerate(scalars):
            vector = self.builder.insert_element(vector, scalar, self.word(i))
        return vector

    def _splat(self, scalar: Any, size: int) -> Any:
        vector = ir.Constant(ir.VectorType(scalar.type, 1), ir.Undefined)
        vector = self.builder.insert_element(vector, scalar, self.word(0))
        return self._shuffled(vector, vector, [0] * size)

    def _gather(self, addresses: Any) -> Any:
        at = self.builder.inttoptr(addresses, ir.VectorType(self.float.as_pointer(), self.vl))
        everywhere = ir.Constant(ir.VectorType(ir.IntType(1), self.vl), [1] * self.vl)
        nothing = ir.Constant(self.floats, None)
        name = f"llvm.masked.gather.v{self.vl}f32.v{self.vl}p0"
        return self._call(name, self.floats, at, self.word(4), everywhere, nothing)

    def _call(self, name: str, result: Any, *values: Any) -> Any:
        """Emit the call of one of LLVM's functions."""
        function = ir.FunctionType(result, [value.type for value in values])
        return self.builder.call(
            cgutils.get_or_insert_function(self.builder.module, function, name), values
        )

    def _load(self, array: Any, i: Any, kind: Any) -> Any:
        at = self.builder.add(array, self.builder.mul(i, self.index(4)))
        return self.builder.load(self.builder.inttoptr(at, kind.as_pointer()), align=4)


ARGUMENTS = (*[types.intp] * 5, types.float32, *[types.intp] * 2)
CHOOSER = types.boolean(*ARGUMENTS)


def _chooser(taken: int) -> Any:
    """Return the code that takes this many as a C function, which kernels call by its address.

    So they need not be compiled for each number.
    """

    @c_function(CHOOSER)
    def chooser(
        rows: int,
        scores: int,
        num_experts: int,
        bias: int,
        normalise: int,
        scaling: float,
        expert_ids: int,
        expert_weights: int,
    ) -> Any:
        return _choose(
            taken, rows, scores, num_experts, bias, normalise, scaling, expert_ids, expert_weights
        )

    return chooser


_FUNCTIONS = [_chooser(taken) for taken in range(1, MOST_TAKEN + 1)]  # kept: others use addresses


def address_of_chooser(taken: int) -> int:
    """Return the address of the code that takes this many; 0 if there is none."""
    return _FUNCTIONS[taken - 1].address if taken <= MOST_TAKEN else 0


@intrinsic
def call_chooser(
    typingctx: Any,
    address: Any,
    rows: Any,
    scores: Any,
    num_experts: Any,
    bias: Any,
    normalise: Any,
    scaling: Any,
    expert_ids: Any,
    expert_weights: Any,
) -> Any:
    """Call such an address; see `_choose` for the rest."""
    signature = types.boolean(types.intp, *ARGUMENTS)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        integer = ir.IntType(64)
        arguments = [*[integer] * 5, ir.FloatType(), *[integer] * 2]
        function = ir.FunctionType(ir.IntType(8), arguments)
        called = builder.inttoptr(args[0], function.as_pointer())
        return builder.trunc(builder.call(called, args[1:]), ir.IntType(1))

    return signature, codegen


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Have a cache line fetched, which may lie behind any array."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        called = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch")
        read, into_first_level, data = word(0), word(3), word(1)
        at = builder.inttoptr(args[0], pointer)
        builder.call(called, [at, read, into_first_level, data])
        return context.get_dummy_value()

    return types.void(types.intp), codegen
