"""FP32 products of few rows, as they are chosen and by gemm.cu, which is made for many.

    python benchmarks/cuda/few_rows.py

Calls are recorded, and replayed with different matrices, more than a cache holds.  Prints Markdown:
us of a call, and the share of the measured reading bandwidth that the chosen kernels reach.  For
experts, each token chooses four of 32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

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
ROWS, TOKENS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16, 32, 64)
EXPERTS, HIDDEN, INTERMEDIATE, TAKEN = 32, 2048, 1792, 4
UNCACHED_BYTES = 512 * 2**20
RNG = np.random.default_rng(0)
GEMM: Any = arithmetic("fp32")


def tensors(count: int, *shape: int) -> list[Tensor]:
    random = 0.02 * RNG.standard_normal(shape, dtype=np.float32)
    return [Tensor.of_array("w", random).stored_as(BF16)] * count


def activations(rows: int, columns: int) -> Any:
    return GEMM.rounded(cupy.asarray(RNG.standard_normal((rows, columns), dtype=np.float32)))


def us(watch: Stopwatch, backend: Captures, calls: Sequence[Callable[[], object]]) -> float:
    return 1e6 * watch.seconds_recorded(backend, *calls)


def by_many(call: Callable[[], float]) -> float:
    """Return what `call` measures where all products are those of gemm.cu."""
    with patch.multiple(few_rows, are_few=lambda *of: False, tiling=lambda *of: None):
        return call()


def row(name: str, rows: int, nbytes: float, read: float, call: Callable[[], float]) -> None:
    least, many, ours = 1e6 * nbytes / read, by_many(call), call()
    cells = name, rows, f"{many:.1f}", f"{ours:.1f}", f"{least:.1f}", f"{least / ours:.2f}"
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def dense(watch: Stopwatch, backend: Captures, read: float) -> None:
    for out, inputs in DENSE:
        nbytes = 4 * out * inputs
        copies = -(-UNCACHED_BYTES // nbytes)
        matrices = [GEMM.pack(tensors(1, out, inputs)) for _ in range(copies)]
        for rows in ROWS:
            calls = [partial(GEMM.linear, activations(rows, inputs), one) for one in matrices]
            row(f"{out} x {inputs}", rows, nbytes, read, partial(us, watch, backend, calls))


def experts(watch: Stopwatch, backend: Captures, read: float) -> None:
    shape = INTERMEDIATE, HIDDEN
    w13 = GEMM.pack_gated(tensors(EXPERTS, *shape), tensors(EXPERTS, *shape))
    w2 = GEMM.pack_down(tensors(EXPERTS, *shape[::-1]))
    everyone = cupy.arange(EXPERTS, dtype=cupy.int32)

    def of_choices(x: Any, chosen: list[Any]) -> float:
        """Return the us of a call, for tiles that are listed before."""
        listed = [grouped_by_expert(ids, everyone, EXPERTS, GEMM)[0] for ids in chosen]
        return us(watch, backend, [partial(_experts, x, w13, w2, tiles) for tiles in listed])

    for tokens in TOKENS:
        chosen = [_chosen(tokens) for _ in range(8)]  # other experts in each call
        used = np.mean([len(np.unique(ids)) for ids in chosen])
        nbytes = 12 * HIDDEN * INTERMEDIATE * float(used)
        there = [cupy.asarray(ids) for ids in chosen]
        call = partial(of_choices, activations(tokens, HIDDEN), there)
        row("experts", tokens, nbytes, read, call)


def _chosen(tokens: int) -> np.ndarray:
    order = RNG.random((tokens, EXPERTS)).argsort(axis=1)
    return np.ascontiguousarray(order[:, :TAKEN], np.int32)


def _experts(x: Any, w13: Any, w2: Any, tiles: Any) -> object:
    return GEMM.down(GEMM.gated(x, w13, tiles), w2, tiles)


def main() -> None:
    backend: Backend = installed_plugins().creator(Context())("cuda")
    assert isinstance(backend, Captures)
    assert isinstance(backend, Measures)
    read, memory = backend.ceilings().bytes, backend.memory(LMHead(64, 64))
    print(f"reading: {read / 1e12:.2f} TB/s\n")
    print("| | rows or tokens | by gemm.cu, us | as chosen, us | reading, us | share |")
    print("|---|---|---|---|---|---|")
    with own_stream(memory):
        dense(Stopwatch(memory), backend, read)
        experts(Stopwatch(memory), backend, read)


if __name__ == "__main__":
    main()
