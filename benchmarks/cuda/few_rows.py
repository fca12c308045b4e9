"""Products of few rows, as they are chosen and by the kernels that are made for many.

    python benchmarks/cuda/few_rows.py --precision fp32,bf16,fp16

Calls are recorded, and replayed with different matrices, more than a cache holds.  Prints Markdown:
us of a call, and the share of the measured reading bandwidth that the chosen kernels reach.  For
experts, each token chooses four of 32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import cupy
import numpy as np
from lfm2kit_cuda import few_rows
from lfm2kit_cuda.arithmetic import arithmetic
from lfm2kit_cuda.blocks.grouping import grouped_by_expert
from lfm2kit_cuda.gemm90 import HopperGemm

from lfm2kit.backend import BF16, Backend, Captures, Context, Measures, Tensor
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.measuring.together import Stopwatch
from lfm2kit.memory import own_stream
from lfm2kit.specs import LMHead

DENSE = ((6144, 2048), (3072, 2048), (2048, 2048), (2048, 7168), (65536, 2048))  # out, in
ROWS, TOKENS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16, 32, 64)
EXPERTS, HIDDEN, INTERMEDIATE, TAKEN = 32, 2048, 1792, 4
UNCACHED_BYTES = 512 * 2**20
RNG = np.random.default_rng(0)


def tensors(count: int, *shape: int) -> list[Tensor]:
    random = 0.02 * RNG.standard_normal(shape, dtype=np.float32)
    return [Tensor.of_array("w", random).stored_as(BF16)] * count


def by_many(call: Callable[[], float]) -> float:
    """Return what `call` measures where all products are those of many rows."""
    with ExitStack() as patched:
        none = patch.multiple(few_rows, are_few=lambda *of: False, tiling=lambda *of: None)
        patched.enter_context(none)
        patched.enter_context(patch.object(HopperGemm, "few_rows", 0))
        return call()


class Table:
    """The rows of a precision; `read` is the reading bandwidth, in bytes a second."""

    def __init__(self, precision: str, watch: Stopwatch, backend: Captures, read: float) -> None:
        self.precision, self.read = precision, read
        self.gemm: Any = arithmetic(precision)
        self.seconds = partial(watch.seconds_recorded, backend)

    def row(self, name: str, rows: int, nbytes: float, call: Callable[[], float]) -> None:
        least, many, ours = (
            1e6 * seconds for seconds in (nbytes / self.read, by_many(call), call())
        )
        cells = f"{many:.1f} | {ours:.1f} | {least:.1f} | {least / ours:.2f}"
        print(f"| {self.precision} | {name} | {rows} | {cells} |", flush=True)

    def activations(self, rows: int, columns: int) -> Any:
        x = RNG.standard_normal((rows, columns), dtype=np.float32)
        return self.gemm.rounded(cupy.asarray(x))

    def dense(self) -> None:
        for out, inputs in DENSE:
            nbytes = self.gemm.packed_bytes((out, inputs))
            copies = -(-UNCACHED_BYTES // nbytes)
            matrices = [self.gemm.pack(tensors(1, out, inputs)) for _ in range(copies)]
            for rows in ROWS:
                x = self.activations(rows, inputs)
                calls = [partial(self.gemm.linear, x, one) for one in matrices]
                self.row(f"{out} x {inputs}", rows, nbytes, partial(self.seconds, *calls))

    def experts(self) -> None:
        w13 = self.gemm.pack_gated(*[tensors(EXPERTS, INTERMEDIATE, HIDDEN)] * 2)
        w2 = self.gemm.pack_down(tensors(EXPERTS, HIDDEN, INTERMEDIATE))
        everyone = cupy.arange(EXPERTS, dtype=cupy.int32)

        def seconds(x: Any, chosen: Sequence[Any]) -> float:
            """Return the time of a call, for tiles that are listed before."""
            ours = (grouped_by_expert(ids, everyone, EXPERTS, self.gemm)[0] for ids in chosen)
            calls = [partial(multiplied, self.gemm, x, w13, w2, tiles) for tiles in ours]
            return self.seconds(*calls)

        of_one = 2 * self.gemm.packed_bytes((INTERMEDIATE, HIDDEN))
        of_one += self.gemm.packed_bytes((HIDDEN, INTERMEDIATE))
        for tokens in TOKENS:
            chosen = [chosen_by(tokens) for _ in range(8)]  # other experts in each call
            used = float(np.mean([len(np.unique(ids)) for ids in chosen]))
            there = [cupy.asarray(ids) for ids in chosen]
            call = partial(seconds, self.activations(tokens, HIDDEN), there)
            self.row("experts", tokens, of_one * used, call)


def chosen_by(tokens: int) -> np.ndarray:
    order = RNG.random((tokens, EXPERTS)).argsort(axis=1)
    return np.ascontiguousarray(order[:, :TAKEN], np.int32)


def multiplied(gemm: Any, x: Any, w13: Any, w2: Any, tiles: Any) -> object:
    return gemm.down(gemm.gated(x, w13, tiles), w2, tiles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="fp32,bf16")
    precisions = parser.parse_args().precision.split(",")
    backend: Backend = installed_plugins().creator(Context())("cuda")
    assert isinstance(backend, Captures)
    assert isinstance(backend, Measures)
    read, memory = backend.ceilings().bytes, backend.memory(LMHead(64, 64))
    print(f"reading: {read / 1e12:.2f} TB/s\n")
    print("| precision | | rows or tokens | by many, us | as chosen, us | reading, us | share |")
    print("|---|---|---|---|---|---|---|")
    with own_stream(memory):
        for precision in precisions:
            table = Table(precision, Stopwatch(memory), backend, read)
            table.dense()
            table.experts()


if __name__ == "__main__":
    main()
