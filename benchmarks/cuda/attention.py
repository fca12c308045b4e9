"""One layer's attention of LFM2-8B-A1B between its projections, one new token for each sequence.

    python benchmarks/cuda/attention.py --precision bf16,fp32 -n 1,16 --context 128,8192,32768

Prints a Markdown table: microseconds of norm, rotation and attention (a graph replayed, medians),
and of reading the keys and values once at `--bandwidth`, without which it cannot be done.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
from full_size import RandomTensors

from lfm2kit import specs
from lfm2kit.backend import BF16, Context, Room, Weights
from lfm2kit.batch import Batch
from lfm2kit.building.plugins import installed_plugins

SPEC = specs.Attention(2048, 32, 8, 64, 1e6, 1e-5)
REPEATED, REPETITIONS = 20, 9  # times in a graph, and replays of it
MOST_BYTES = 64 << 30  # of a state
HEADINGS = ("precision", "sequences", "context", "us", "us to read", "times")


def microseconds(call: Callable[[], object]) -> float:
    """Return the median time of a call on the device, from replays of a graph of several."""
    pool, stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.get_current_stream().synchronize()  # it has made the inputs
    with stream, cupy.cuda.using_allocator(pool.malloc):
        call()
        stream.synchronize()
        stream.begin_capture(mode=cupy.cuda.runtime.streamCaptureModeRelaxed)
        kept = [call() for _ in range(REPEATED)]
        graph = stream.end_capture()
        times = [elapsed(graph, stream) for _ in range(REPETITIONS + 1)][1:]
    del kept
    return statistics.median(times) / REPEATED


def elapsed(graph: Any, stream: Any) -> float:
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    begin.record(stream)
    graph.launch(stream)
    end.record(stream)
    end.synchronize()
    return 1000 * float(cupy.cuda.get_elapsed_time(begin, end))


class Layer:
    """The attention of a layer, and what it is given in a step."""

    def __init__(self, precision: str) -> None:
        backend: Any = installed_plugins().creator(Context(precision=precision))("cuda")
        built = backend.build(SPEC, Weights(RandomTensors(SPEC.parameters(), BF16)))
        self.block, self.backend = built._block, backend
        self.memory = backend.memory(SPEC)

    def step(self, sequences: int, context: int) -> Callable[[], object]:
        """Return a call that attends to the newest row of each sequence."""
        room = Room.of_sequences(sequences, context)
        state = self.block.new_state(room)
        for array in state[:2]:
            array.fill(0)
        pages = np.arange(room.pages, dtype=np.int32).reshape(sequences, -1)
        ids, starts = [np.zeros(1, np.int32)] * sequences, [context - 1] * sequences
        batch = Batch.of_sequences(ids, starts=starts, pages=pages).on(self.memory)
        width = SPEC.num_attention_heads + 2 * SPEC.num_key_value_heads
        qkv = cupy.zeros((sequences, width * SPEC.head_dim), self.block.dtype)
        return lambda: self.block.between(qkv, batch, state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="bf16,fp32")
    parser.add_argument("-n", default="1,16")
    parser.add_argument("--context", default="128,256,512,2048,8192,32768,131072")
    parser.add_argument("--bandwidth", type=float, default=4.4, help="TB/s of the device's memory")
    options = parser.parse_args()
    print("| " + " | ".join(HEADINGS) + " |\n" + "|---" * len(HEADINGS) + "|")
    for precision in options.precision.split(","):
        layer = Layer(precision)
        for n in map(int, options.n.split(",")):
            for context in map(int, options.context.split(",")):
                heads = 2 * SPEC.num_key_value_heads * SPEC.head_dim
                nbytes = n * context * heads * layer.block.dtype.itemsize
                if nbytes > MOST_BYTES:
                    continue
                us, least = microseconds(layer.step(n, context)), 1e-6 * nbytes / options.bandwidth
                row = precision, n, context, f"{us:.1f}", f"{least:.1f}", f"{us / least:.2f}"
                print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
