"""Our matrix products beside cuBLAS (through torch) at the model's shapes, on one GPU.

    python benchmarks/cuda/products.py --precision fp32

The calls of a pair alternate, on random numbers; medians of device time, in TFLOP/s of useful work.
Ours store what the model's do: in_proj (6144 columns), q, k and v (3072) and experts' results as
what lies inside a block, the others in float32.  cuBLAS runs the experts as one product each.
Needs torch.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import cupy
import numpy as np
import torch
from lfm2kit_cuda.arithmetic import arithmetic
from lfm2kit_cuda.blocks.grouping import grouped_by_expert

from lfm2kit.backend import BF16, Tensor

SHAPES = (  # rows, out, in
    (256, 6144, 2048),
    (256, 2048, 2048),
    (512, 6144, 2048),
    (512, 2048, 2048),
    (1024, 6144, 2048),
    (1024, 3072, 2048),
    (1024, 2048, 2048),
    (1024, 14336, 2048),
    (1024, 2048, 7168),
    (2048, 6144, 2048),
    (2048, 3072, 2048),
    (2048, 2048, 2048),
    (2048, 14336, 2048),
    (2048, 2048, 7168),
    (16, 65536, 2048),
    (128, 65536, 2048),
)
INSIDE = (6144, 3072)  # columns of products whose results stay in a block
EXPERTS, HIDDEN, INTERMEDIATE, TAKEN = 32, 2048, 1792, 4
DTYPES = {  # of cuBLAS's product
    "fp32": torch.float32,
    "fp32x3": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
SLEEP_CYCLES = 3_000_000  # 1.5 ms


def seconds(calls: list[Callable[[], object]], repetitions: int = 15) -> list[float]:
    """Return the median device time of each call; the calls alternate, after two warm-ups.

    The device sleeps while the host starts a call, so that only the device's time is seen.
    """
    times: list[list[float]] = [[] for _ in calls]
    for repetition in range(repetitions + 2):
        for call, taken in zip(calls, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(SLEEP_CYCLES)
            begin.record()
            call()
            end.record()
            end.synchronize()
            if repetition >= 2:
                taken.append(begin.elapsed_time(end) / 1e3)
    return [statistics.median(taken) for taken in times]


def random_matrix(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return 0.02 * rng.standard_normal((rows, columns), dtype=np.float32)


def dense(precision: str, dtype: torch.dtype) -> None:
    ours, rng = arithmetic(precision), np.random.default_rng(0)
    print("| rows x out x in | ours | cuBLAS | ratio |\n|---|---|---|---|")
    for rows, out, inputs in SHAPES:
        weight = random_matrix(rng, out, inputs)
        matrix = ours.pack([Tensor.of_array("w", weight).stored_as(BF16)])
        x = ours.rounded(cupy.asarray(random_matrix(rng, rows, inputs)))
        a = torch.randn(rows, inputs, device="cuda", dtype=dtype)
        w = torch.tensor(weight, device="cuda", dtype=dtype)
        linear = ours.linear_rounded if out in INSIDE else ours.linear
        mine, theirs = seconds([lambda: linear(x, matrix), lambda: a @ w.T])  # noqa: B023
        work = 2e-12 * rows * out * inputs
        ratio = theirs / mine
        print(f"| {rows} x {out} x {inputs} | {work / mine:.1f} | {work / theirs:.1f} "
              f"| {ratio:.2f} |", flush=True)  # fmt: skip


def experts(precision: str, dtype: torch.dtype) -> None:
    ours, rng = arithmetic(precision), np.random.default_rng(0)
    w1, w3, w2 = (
        [Tensor.of_array("w", random_matrix(rng, *shape)).stored_as(BF16) for _ in range(EXPERTS)]
        for shape in ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    )
    w13, down = ours.pack_gated(w1, w3), ours.pack_down(w2)
    torch_w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, device="cuda", dtype=dtype)
    torch_w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, device="cuda", dtype=dtype)
    print("\n| rows each | gated | down | cuBLAS gated | cuBLAS down |\n|---|---|---|---|---|")
    for n in (16, 32, 64, 128):
        tokens = 16 * n
        ids = rng.random((tokens, EXPERTS)).argsort(axis=1)[:, :TAKEN].astype(np.int32)
        everyone = cupy.arange(EXPERTS, dtype=cupy.int32)
        tiles, _ = grouped_by_expert(cupy.asarray(ids), everyone, EXPERTS, ours)
        x = ours.rounded(cupy.asarray(rng.standard_normal((tokens, HIDDEN), dtype=np.float32)))
        inner = ours.gated(x, w13, tiles)
        counts = np.bincount(ids.ravel(), minlength=EXPERTS)
        rows = [torch.randn(int(c), HIDDEN, device="cuda", dtype=dtype) for c in counts]
        inners = [torch.randn(int(c), INTERMEDIATE, device="cuda", dtype=dtype) for c in counts]
        times = seconds([
            lambda: ours.gated(x, w13, tiles),  # noqa: B023
            lambda: ours.down(inner, down, tiles),  # noqa: B023
            lambda: [r @ w.T for r, w in zip(rows, torch_w13, strict=True)],  # noqa: B023
            lambda: [r @ w.T for r, w in zip(inners, torch_w2, strict=True)],  # noqa: B023
        ])  # fmt: skip
        work = 2e-12 * tokens * TAKEN * HIDDEN * INTERMEDIATE
        rates = [scale * work / t for scale, t in zip((2, 1, 2, 1), times, strict=True)]
        print(f"| {tokens * TAKEN // EXPERTS} | " + " | ".join(f"{r:.1f}" for r in rates) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="fp32", choices=tuple(DTYPES))
    precision = parser.parse_args().precision
    torch.backends.cuda.matmul.allow_tf32 = False
    with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
        print(f"{torch.cuda.get_device_name()}, {precision}, TFLOP/s\n")
        dense(precision, DTYPES[precision])
        experts(precision, DTYPES[precision])


if __name__ == "__main__":
    main()
