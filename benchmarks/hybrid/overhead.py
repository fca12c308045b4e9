"""What the choice of experts on the CPU costs: `hybrid` beside `cuda`, full-size LFM2-8B-A1B.

    python benchmarks/hybrid/overhead.py --precision fp32,bf16 -n 16,32,64,128 --decode 1,16,64

Both models have the same random weights and run alternately, forward by forward, so that clocks and
neighbours are the same for both.  Their logits must have the same bits.  Prints Markdown tables of
medians: samples/s of prompts of 16 tokens, and tokens/s of decoding steps at 256 tokens of context.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cupy
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))
from full_size import build

from lfm2kit.backend import BF16, Room
from lfm2kit.batch import Batch
from lfm2kit.building.plan import Plan
from lfm2kit.measuring.bench import random_batch
from lfm2kit.model import LFM2

# At least this share of `cuda`, by precision: prompts by their number, steps by sequences.
TARGETS = {
    "fp32": ({16: 0.97, 32: 0.98, 64: 0.99, 128: 0.99}, {1: 0.92}),
    "bf16": ({16: 0.92, 32: 0.92, 64: 0.93, 128: 0.94}, {1: 0.85}),
    "fp16": ({16: 0.92, 32: 0.92, 64: 0.93, 128: 0.94}, {1: 0.85}),
}
CONTEXT = 256
WARM_UP = 3  # the first forward of a form compiles, the second is captured
HEADINGS = ("precision", "what", "n", "cuda ms", "hybrid ms", "cuda /s", "hybrid /s",
            "hybrid / cuda", "quartiles", "at least", "us a layer")  # fmt: skip

Forward = Callable[[int], np.ndarray]


def seconds_of_each(forwards: Sequence[Forward], repetitions: int) -> list[list[float]]:
    """Return each one's times; which goes first changes with every turn."""
    times: list[list[float]] = [[] for _ in forwards]
    for turn in range(WARM_UP + repetitions):
        logits = []
        for i in sorted(range(len(forwards)), reverse=turn % 2 == 1):
            start = time.perf_counter()
            got = forwards[i](turn)
            if turn >= WARM_UP:
                times[i].append(time.perf_counter() - start)
            logits.append(got)
        assert all(np.array_equal(logits[0], other) for other in logits), "other bits"
    return times


def prompts(model: LFM2, n: int) -> Forward:
    batch = random_batch(n, 16, model.spec.embed_tokens.vocab_size, seed=n)
    return lambda turn: model.logits(batch)


def steps(model: LFM2, n: int, repetitions: int) -> Forward:
    """Return decoding steps of n sequences, after prompts of CONTEXT tokens."""
    room = Room.of_sequences(n, CONTEXT + WARM_UP + repetitions)
    pages = np.arange(room.pages, dtype=np.int32).reshape(n, -1)
    state, rng = model.new_state(room), np.random.default_rng(n)

    def batch(start: int, tokens: int) -> Batch:
        shape = n, tokens
        ids = rng.integers(model.spec.embed_tokens.vocab_size, size=shape, dtype=np.int32)
        return Batch.of_sequences(list(ids), starts=[start] * n, pages=pages)

    model.logits(batch(0, CONTEXT), state)
    return lambda turn: model.logits(batch(CONTEXT + turn, 1), state)


def row(
    precision: str, what: str, n: int, times: Sequence[Sequence[float]], layers: int
) -> tuple[object, ...]:
    cuda, hybrid = map(statistics.median, times)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    target = TARGETS[precision][what == "step"].get(n, "")
    return (
        precision, what, n, f"{1e3 * cuda:.3f}", f"{1e3 * hybrid:.3f}", f"{n / cuda:.0f}",
        f"{n / hybrid:.0f}", f"{statistics.median(ratios):.3f}", f"{low:.3f}-{high:.3f}", target,
        f"{1e6 * (hybrid - cuda) / layers:.1f}",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("-n", default="16,32,64,128")
    parser.add_argument("--decode", default="1,16,64")
    parser.add_argument("-r", "--repetitions", type=int, default=20)
    options = parser.parse_args()
    print("| " + " | ".join(HEADINGS) + " |\n" + "|---" * len(HEADINGS) + "|", flush=True)
    for precision in options.precision.split(","):
        models = [build(Plan.parse(name), precision, BF16) for name in ("cuda", "hybrid")]
        routed = sum("choice" in leaf.name for leaf in models[1].placed.leaves())
        cupy.get_default_memory_pool().free_all_blocks()
        for what, counts in (("prompt", options.n), ("step", options.decode)):
            for n in map(int, filter(None, counts.split(","))):
                of = prompts if what == "prompt" else None
                repetitions = options.repetitions * (1 if of else 3)
                forwards = [of(m, n) if of else steps(m, n, repetitions) for m in models]
                times = seconds_of_each(forwards, repetitions)
                print("| " + " | ".join(map(str, row(precision, what, n, times, routed))) + " |",
                      flush=True)  # fmt: skip
        del models, forwards
        cupy.get_default_memory_pool().free_all_blocks()


if __name__ == "__main__":
    main()
