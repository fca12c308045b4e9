"""Single blocks of LFM2-8B-A1B as the assignment times them: host array in, host array out.

    python benchmarks/cuda/blocks.py --precision fp32 -n 1,16,64,128

Tokens per second, medians: with the copies, and on the device alone (a graph replayed).  The MoE
runs on normal activations and on the assignment's, uniform in [0, 1], where every score is 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
from full_size import RandomTensors

from lfm2kit import specs
from lfm2kit.backend import F32, Context, Weights
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.checkpoint.config import LFM2_8B_A1B, model_spec
from lfm2kit.measuring.bench import random_batch

REPETITIONS = 10


def first_blocks() -> dict[str, specs.Spec]:
    conv, _, attn, *_ = model_spec(LFM2_8B_A1B, tied=True).layers
    assert isinstance(conv, specs.Layer)
    assert isinstance(attn, specs.Layer)
    return {"conv": conv.operator, "attn": attn.operator, "moe": attn.feed_forward}


def median_seconds(call: Callable[[], object]) -> float:
    times = []
    for repetition in range(REPETITIONS + 2):
        start = time.perf_counter()
        call()
        if repetition >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def device_seconds(call: Callable[[], object]) -> float:
    """Return the seconds of one call, from ten replays of its graph."""
    pool, stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.get_current_stream().synchronize()  # it has made the inputs
    with stream, cupy.cuda.using_allocator(pool.malloc):
        call()
        stream.synchronize()
        stream.begin_capture(mode=cupy.cuda.runtime.streamCaptureModeRelaxed)
        kept = call()
        graph = stream.end_capture()

    def replays() -> None:
        for _ in range(REPETITIONS):
            graph.launch(stream)
        stream.synchronize()

    seconds = median_seconds(replays) / REPETITIONS
    del kept
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("-n", default="1,16,64,128")
    options = parser.parse_args()
    backend = installed_plugins().creator(Context(precision=options.precision))("cuda")
    rng = np.random.default_rng(0)
    print("| block | samples | tok/s, host to host | tok/s, device |\n|---|---|---|---|")
    for kind, spec in first_blocks().items():
        memory = backend.memory(spec)
        block: Any = backend.build(spec, Weights(RandomTensors(spec.parameters(), F32)))
        for n in map(int, options.n.split(",")):
            batch = random_batch(n, 16, 10, seed=n).on(memory)
            rest = () if kind == "moe" else (batch, None)
            inputs = {kind: rng.standard_normal((16 * n, 2048), dtype=np.float32)}
            if kind == "moe":
                inputs["moe, saturated"] = rng.random((16 * n, 2048), dtype=np.float32)
            for name, x in inputs.items():
                there = memory.from_host(x)
                host = median_seconds(
                    lambda: memory.to_host(block(memory.from_host(x), *rest))  # noqa: B023
                )
                device = device_seconds(lambda: block(there, *rest))  # noqa: B023
                print(f"| {name} | {n} | {16 * n / host:,.0f} | {16 * n / device:,.0f} |")


if __name__ == "__main__":
    main()
