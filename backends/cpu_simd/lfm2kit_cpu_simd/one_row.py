"""One row of x times one panel, with all chains of the product side by side.

One row has NV sums at a time in the tile.  Where NV is 2, that is too few: each multiply-add waits
for the one before it.  Here, the product's chains (chains.py) are computed at the same time, and
need as many registers as the rows of a whole tile.  Each chain adds its own terms in their order,
and the chains' sums are added in theirs, so the bits are the tile's.

Nothing is fetched ahead: the CPU recognises a stream of reads for each chain, and fetches them
faster by itself than beside a program's prefetches (docs/decisions/0002-cpu-simd.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from itertools import pairwise
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lfm2kit.backend import Format
from lfm2kit_cpu_simd.chains import CHAINS
from lfm2kit_cpu_simd.compiling import c_function
from lfm2kit_cpu_simd.machine import NV, STORAGES, VL
from lfm2kit_cpu_simd.tile import Emitter, call_address

ARGUMENTS = [types.intp] * 4
PRODUCT = types.void(*ARGUMENTS)
# Sums of a row that hide half of a multiply-add's latency: 4 cycles, and two begin in each.
ENOUGH = 4


class OneRow(Emitter):
    """An emitter of a whole product of one row, of at least CHAINS chains."""

    def __init__(self, storage: Format, vl: int = VL, nv: int = NV) -> None:
        super().__init__(storage, 1, vl, nv)

    def emit_product(self, b: Any, x_at: Any, panel_at: Any, out_at: Any, bounds: Any) -> None:
        self.begin(b)
        edges = [self._load(bounds, self.index, 8 * i) for i in range(CHAINS + 1)]
        lengths = [b.sub(end, begin) for begin, end in pairwise(edges)]
        xs = [b.add(x_at, b.mul(begin, self._constant(4))) for begin in edges[:-1]]
        panels = [
            b.add(panel_at, b.mul(begin, self._constant(self.row_bytes))) for begin in edges[:-1]
        ]

        def step(chain: int, k: Any, sums: Sequence[Any]) -> list[Any]:
            return self._multiply_add(k, [xs[chain]], self._row(panels[chain], k), sums)

        def step_of_all(k: Any, sums: Sequence[Any]) -> list[Any]:
            parts = enumerate(self._by_chain(sums))
            return [value for chain, part in parts for value in step(chain, k, part)]

        together = reduce(self._least, lengths)
        zeros = [ir.Constant(self.vector, None)] * (CHAINS * self.nv)
        sums = self._loop(self._constant(0), together, 1, step_of_all, zeros)
        for chain, part in enumerate(self._by_chain(sums)):
            rest = self._loop(together, lengths[chain], 1, partial(step, chain), part)
            self._add_to(rest, out_at)

    def _by_chain(self, sums: Sequence[Any]) -> list[Sequence[Any]]:
        return [sums[i : i + self.nv] for i in range(0, len(sums), self.nv)]

    def _least(self, a: Any, b: Any) -> Any:
        return self.builder.select(self.builder.icmp_signed("<", a, b), a, b)


@intrinsic(prefer_literal=True)
def _multiply(typingctx: Any, storage: Any, x: Any, panel: Any, out: Any, bounds: Any) -> Any:
    """Multiply at addresses: x [k], panel [k, NR], out += [NR]; `bounds` int64 [CHAINS + 1].

    `storage` (an index of STORAGES) is a literal.
    """
    emitter = OneRow(STORAGES[storage.literal_value])

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        emitter.emit_product(builder, *args[1:])
        return context.get_dummy_value()

    return types.void(storage, *ARGUMENTS), codegen


def _product(storage: int) -> Any:
    """Return the compiled product of one row as a C function."""

    @c_function(PRODUCT)
    def one_row(x: int, panel: int, out: int, bounds: int) -> None:
        _multiply(storage, x, panel, out, bounds)

    return one_row


# Compiled only where a row has too few sums in the tile: a row of four vectors has enough.
_FUNCTIONS = {storage: _product(s) for s, storage in enumerate(STORAGES) if NV < ENOUGH}
# By storage, the address of its product; 0 where the tile is used instead.
ONE_ROW = {s: _FUNCTIONS[s].address if s in _FUNCTIONS else 0 for s in STORAGES}


@intrinsic
def call_one_row(typingctx: Any, address: Any, x: Any, panel: Any, out: Any, bounds: Any) -> Any:
    """Call an entry of ONE_ROW."""
    signature = types.void(types.intp, *ARGUMENTS)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        call_address(builder, args[0], args[1:])
        return context.get_dummy_value()

    return signature, codegen
