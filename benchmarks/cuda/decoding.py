"""Decoding with full-size LFM2-8B-A1B and random weights: tokens/s, captured and not captured.

    python benchmarks/cuda/decoding.py --precision fp32,bf16 -n 1,16,64
    python benchmarks/cuda/decoding.py --precision bf16 -n 1 --context 128,8192,32768

A step is `model.logits(batch, state)`, one token of every sequence in, logits on the host out.
Rounds of captured steps alternate with rounds of the same steps uncaptured, and have their bits.
Prints a Markdown table of medians: of a captured step also its graph on the device, the copy of
the logits, and what is left for Python.  Targets are those that kernels captured by hand have shown
on an H200.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple, TypeVar

import cupy
import numpy as np
from full_size import build

from lfm2kit.backend import BF16, Captures, Room
from lfm2kit.batch import Batch
from lfm2kit.building.plan import Plan
from lfm2kit.model import LFM2
from lfm2kit.state import ModelState

TARGETS = {
    ("fp32", 1): 240, ("fp32", 16): 1560, ("fp32", 64): 5000,
    ("bf16", 1): 500, ("bf16", 16): 3450, ("bf16", 64): 11800,
}  # fmt: skip
Result = TypeVar("Result")

STEPS = 16  # of a round
HEADINGS = (
    "precision", "batch", "context", "tokens/s", "target", "uncaptured", "step us", "spread",
    "graph us", "copy us", "Python us", "batch us",
)  # fmt: skip


@dataclass(frozen=True)
class Sequences:
    """Random sequences with a state of a model."""

    model: LFM2
    count: int
    context: int
    state: ModelState
    pages: np.ndarray
    rng: np.random.Generator

    @classmethod
    def prefilled(cls, model: LFM2, count: int, context: int, steps: int) -> Sequences:
        """Return sequences of `context` tokens each, with room for `steps` more."""
        room = Room.of_sequences(count, context + steps)
        pages = np.arange(room.pages, dtype=np.int32).reshape(count, -1)
        state, rng = model.new_state(room), np.random.default_rng(count)
        sequences = cls(model, count, context, state, pages, rng)
        model.logits(sequences.batch(0, context), state)
        cupy.get_default_memory_pool().free_all_blocks()
        return sequences

    def batch(self, start: int, tokens: int = 1) -> Batch:
        shape = self.count, tokens
        ids = self.rng.integers(self.model.spec.embed_tokens.vocab_size, size=shape, dtype=np.int32)
        return Batch.of_sequences(list(ids), starts=[start] * self.count, pages=self.pages)

    def captured(self, batch: Batch) -> np.ndarray:
        return self.model.logits(batch, self.state)

    def uncaptured(self, batch: Batch) -> np.ndarray:
        home = self.model.home
        return home.to_host(self.model.forward(batch.on(home), self.state.layers))


class Times(NamedTuple):
    """The seconds of one step."""

    batch: float  # to make it
    uncaptured: float
    captured: float


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def round_of_steps(sequences: Sequences, position: int) -> list[Times]:
    """Time STEPS steps of all sequences, first uncaptured, then captured.

    So each kind runs with warm caches, as in a loop of its own.  Writing a token twice changes no
    state, because a state can go back by 16 tokens.
    """
    positions = range(position, position + STEPS)
    made = [timed(partial(sequences.batch, at)) for at in positions]
    plain = [timed(partial(sequences.uncaptured, batch)) for _, batch in made]
    captured = [timed(partial(sequences.captured, batch)) for _, batch in made]
    for (_, want), (_, got) in zip(plain, captured, strict=True):
        assert np.array_equal(got, want), "a captured step has other bits"
    return [Times(a, b, c) for (a, _), (b, _), (c, _) in zip(made, plain, captured, strict=True)]


def median_seconds(call: Callable[[], object], repetitions: int) -> float:
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def parts(sequences: Sequences, position: int, repetitions: int) -> tuple[float, float]:
    """Return the seconds of a step's graph on the device, and of the copy of its logits."""
    model, batch = sequences.model, sequences.batch(position)
    assert isinstance(model.backend, Captures)
    sequences.uncaptured(batch)
    replay = model.backend.capture(partial(model.forward, state=sequences.state.layers), batch)
    logits, stream = replay(batch), cupy.cuda.get_current_stream()

    def launch() -> None:
        replay._graph.launch(stream)  # type: ignore[attr-defined]
        stream.synchronize()

    graph = median_seconds(launch, repetitions)
    copy = median_seconds(lambda: model.home.to_host(logits), repetitions)
    replay.close()
    return graph, copy


def rows(model: LFM2, precision: str, options: argparse.Namespace) -> Iterator[tuple[object, ...]]:
    numbers = (map(int, option.split(",")) for option in (options.n, options.context))
    for n, context in product(*numbers):
        rounds = -(-options.repetitions // STEPS) + 1  # the first one is a warm-up
        steps = rounds * STEPS
        sequences = Sequences.prefilled(model, n, context, steps + 1)
        starts = range(context, context + steps, STEPS)
        times = [t for at in starts for t in round_of_steps(sequences, at)][STEPS:]
        graph, copy = parts(sequences, context + steps, options.repetitions)
        batch, uncaptured, captured = map(statistics.median, zip(*times, strict=True))
        slowest, fastest = (f(t.captured for t in times) for f in (max, min))
        yield (
            precision, n, context, f"{n / captured:.0f}", TARGETS.get((precision, n), ""),
            f"{n / uncaptured:.0f}", f"{1e6 * captured:.0f}",
            f"{100 * (slowest - fastest) / captured:.0f} %",
            *(f"{1e6 * t:.0f}" for t in (graph, copy, captured - graph - copy, batch)),
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("-n", default="1,16,64")
    parser.add_argument("--context", default="256")
    parser.add_argument("-r", "--repetitions", type=int, default=50)
    options = parser.parse_args()
    print("| " + " | ".join(HEADINGS) + " |\n" + "|---" * len(HEADINGS) + "|")
    for precision in options.precision.split(","):
        model = build(Plan.parse("cuda"), precision, BF16)
        for row in rows(model, precision, options):
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
        del model
        cupy.get_default_memory_pool().free_all_blocks()


if __name__ == "__main__":
    main()
