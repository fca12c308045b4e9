"""Prompts with full-size LFM2-8B-A1B and random weights: tokens/s of one sequence with a state.

    python benchmarks/cuda/prompts.py --precision fp32,bf16 --tokens 512,4096,32768

A prompt is one forward, token ids in to the last token's logits on the host.  Prints a Markdown
table of medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import cupy
import numpy as np
from full_size import build

from lfm2kit.backend import BF16, Room
from lfm2kit.batch import Batch
from lfm2kit.building.plan import Plan
from lfm2kit.model import LFM2


def seconds(model: LFM2, tokens: int, repetitions: int) -> float:
    """Return the median time of a prompt, after one that is not counted."""
    room = Room.of_sequences(1, tokens)
    pages = np.arange(room.pages, dtype=np.int32)[None]
    ids = np.random.default_rng(tokens).integers(model.spec.embed_tokens.vocab_size, size=tokens)
    times = []
    for _ in range(1 + repetitions):
        state = model.new_state(room)
        start = time.perf_counter()
        model.logits(Batch.of_sequences([ids], pages=pages), state)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("--tokens", default="512,4096,32768")
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    options = parser.parse_args()
    print("| precision | tokens | ms | tokens/s |\n|---|---|---|---|")
    for precision in options.precision.split(","):
        model = build(Plan.parse("cuda"), precision, BF16)
        for tokens in map(int, options.tokens.split(",")):
            took = seconds(model, tokens, options.repetitions)
            cells = f"{precision} | {tokens} | {1e3 * took:.1f} | {tokens / took:.0f}"
            print(f"| {cells} |", flush=True)
        del model
        cupy.get_default_memory_pool().free_all_blocks()


if __name__ == "__main__":
    main()
