"""The FP32 products of few rows beside those of many, on one GPU: bound by reading the weights.

    python benchmarks/cuda/few_rows.py

Calls are recorded, and replayed with different matrices, more than a cache holds.  Prints Markdown:
us of a call with gemm.cu and with few_rows.cu, and the share of the measured reading bandwidth that
few_rows.cu reaches.  For experts, each token chooses four of 32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import cupy
import numpy as np
from lfm2kit_cuda import few_rows
from lfm2kit_cuda.arithmetic import arithmetic
from lfm2kit_cuda.blocks.feed_forward import grouped_by_expert

from lfm2kit.backend import BF16, Backend, Captures, Context, Measures, Tensor
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.measuring.together import Stopwatch
from lfm2kit.memory import own_stream
from lfm2kit.specs import LMHead

DENSE = ((6144, 2048), (3072, 2048), (2048, 2048), (2048, 7168), (65536, 2048))  # out, in
ROWS, TOKENS = (1, 2, 4, 8), (1, 4, 16, 64)
EXPERTS, HIDDEN, INTERMEDIATE, TAKEN = 32, 2048, 1792, 4
UNCACHED_BYTES = 512 * 2**20
RNG = np.random.default_rng(0)
GEMM: Any = arithmetic("fp32")


class Few:
    """The FP32 product as far as grouping asks it, with tiles of few rows."""

    def tiling(self, pairs: int, groups: int) -> Any:
        return few_rows.TILING


FEW: Any = Few()


def tensors(count: int, *shape: int) -> list[Tensor]:
    random = 0.02 * RNG.standard_normal(shape, dtype=np.float32)
    return [Tensor.of_array("w", random).stored_as(BF16)] * count


def us(watch: Stopwatch, backend: Captures, calls: list[Callable[[], object]]) -> float:
    return 1e6 * watch.seconds_recorded(backend, *calls)


def row(name: str, rows: int, nbytes: float, old: float, new: float, read: float) -> None:
    least = 1e6 * nbytes / read
    print(
        f"| {name} | {rows} | {old:.1f} | {new:.1f} | {least:.1f} | {least / new:.2f} |", flush=True
    )


def dense(watch: Stopwatch, backend: Captures, read: float) -> None:
    for out, inputs in DENSE:
        nbytes = 4 * out * inputs
        copies = -(-UNCACHED_BYTES // nbytes)
        matrices = [GEMM.pack(tensors(1, out, inputs)) for _ in range(copies)]
        for rows in ROWS:
            x = GEMM.rounded(cupy.asarray(RNG.standard_normal((rows, inputs), dtype=np.float32)))
            old = us(watch, backend, [partial(GEMM.linear, x, one) for one in matrices])
            new = us(
                watch, backend, [partial(few_rows.linear, x, one, None, None) for one in matrices]
            )
            row(f"{out} x {inputs}", rows, nbytes, old, new, read)


def experts(watch: Stopwatch, backend: Captures, read: float) -> None:
    w13 = GEMM.pack_gated(
        tensors(EXPERTS, INTERMEDIATE, HIDDEN), tensors(EXPERTS, INTERMEDIATE, HIDDEN)
    )
    w2, everyone = (
        GEMM.pack_down(tensors(EXPERTS, HIDDEN, INTERMEDIATE)),
        cupy.arange(EXPERTS, dtype=cupy.int32),
    )
    for tokens in TOKENS:
        x = GEMM.rounded(cupy.asarray(RNG.standard_normal((tokens, HIDDEN), dtype=np.float32)))
        old, new, used = list[Callable[[], object]](), list[Callable[[], object]](), list[int]()
        for _ in range(8):  # other experts in each call
            ids = RNG.random((tokens, EXPERTS)).argsort(axis=1)[:, :TAKEN].astype(np.int32)
            used.append(len(np.unique(ids)))
            of = partial(grouped_by_expert, cupy.asarray(ids), everyone, EXPERTS)
            (many, _), (few, _) = of(GEMM), of(FEW)
            old.append(partial(_old, x, w13, w2, many))
            new.append(partial(_new, x, w13, w2, few))
        nbytes = 12 * HIDDEN * INTERMEDIATE * float(np.mean(used))
        both = us(watch, backend, old), us(watch, backend, new)
        row("experts", tokens, nbytes, *both, read)


def _old(x: Any, w13: Any, w2: Any, tiles: Any) -> object:
    return GEMM.down(GEMM.gated(x, w13, tiles), w2, tiles)


def _new(x: Any, w13: Any, w2: Any, tiles: Any) -> object:
    return few_rows.linear(few_rows.gated(x, w13, tiles), w2, None, replace(tiles, source=None))


def main() -> None:
    backend: Backend = installed_plugins().creator(Context())("cuda")
    assert isinstance(backend, Captures)
    assert isinstance(backend, Measures)
    read, memory = backend.ceilings().bytes, backend.memory(LMHead(64, 64))
    print(f"reading: {read / 1e12:.2f} TB/s\n")
    print("| | rows or tokens | gemm.cu, us | few_rows.cu, us | reading, us | share |")
    print("|---|---|---|---|---|---|")
    with own_stream(memory):
        dense(Stopwatch(memory), backend, read)
        experts(Stopwatch(memory), backend, read)


if __name__ == "__main__":
    main()
