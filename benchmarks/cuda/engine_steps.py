"""How long the GPU waits for the host in an engine's steps, with full-size LFM2-8B-A1B.

    python benchmarks/cuda/engine_steps.py --precision fp32,bf16 -n 1,16,64

The weights are random, and tokens are drawn with LFM2's settings.  Rounds of 16 steps take turns:

- engine: steps of an engine, each of which begins before the last one's tokens are read;
- read: steps of an engine that reads the tokens of each step before it begins the next one;
- device: the same steps and draws, all launched ahead of the device, so that it never waits.

Prints a Markdown table of medians; idle is the part of a step in which the device does nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import cupy
import numpy as np
from full_size import build

from lfm2kit.backend import BF16, Room
from lfm2kit.batch import Batch
from lfm2kit.building.plan import Plan
from lfm2kit.engine.drawing import DrawsAhead, Row, Sampler
from lfm2kit.engine.engine import Engine
from lfm2kit.engine.requests import Request
from lfm2kit.engine.sampling import Sampling
from lfm2kit.model import LFM2

SETTINGS = Sampling(temperature=0.3, min_p=0.15, repetition_penalty=1.05)  # LFM2's
STEPS = 16  # of a round
WARM_UP = 4  # the first two steps run and capture a form
HEADINGS = (
    "precision", "batch", "tokens/s", "engine us", "read us", "device us", "idle", "idle, read",
)  # fmt: skip


class Reads:
    """A sampler that does not draw ahead."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def draw(self, logits: Any, rows: Sequence[Row | None]) -> Any:
        return self._sampler.draw(logits, rows)


class OnTheDevice:
    """Steps that the host launches one after the other, and whose tokens it reads at the end."""

    def __init__(self, model: LFM2, count: int, context: int, steps: int) -> None:
        room = Room.of_sequences(count, context + steps)
        sampler = model.new_sampler()
        assert isinstance(sampler, DrawsAhead)
        self._model, self._sampler, self._state = model, sampler, model.new_state(room)
        self._pages = np.arange(room.pages, dtype=np.int32).reshape(count, -1)
        self._prompts = prompts_of(model, count, context)
        self._position = context
        model.logits(Batch.of_sequences(self._prompts, pages=self._pages), self._state)
        self._newest: Any = None

    def step(self) -> Any:
        count = len(self._prompts)
        starts = [self._position] * count
        batch = Batch.of_sequences([[0]] * count, starts=starts, pages=self._pages)
        newest = self._newest if self._model.takes_ids(batch, self._state) else None
        placeholder = np.zeros(1, np.int32)
        rows = [
            Row(SETTINGS, 0, self._position + 1, prompt, placeholder) for prompt in self._prompts
        ]
        with self._model.logits_at_home(batch, self._state, newest) as logits:
            drawing = self._sampler.begin(logits, rows, newest)
        self._newest = drawing.token_ids
        self._position += 1
        return drawing

    def seconds(self, steps: int) -> float:
        """Return the seconds of a step, without what the host takes before the first one."""
        return (self._together(1 + steps) - self._together(1)) / steps

    def _together(self, steps: int) -> float:
        self.step().end()
        start = time.perf_counter()
        drawings = [self.step() for _ in range(steps)]
        drawings[-1].end()
        return time.perf_counter() - start


def prompts_of(model: LFM2, count: int, context: int) -> list[Any]:
    vocab_size = model.spec.embed_tokens.vocab_size
    return list(np.random.default_rng(count).integers(vocab_size, size=(count, context)))


def engine_of(model: LFM2, count: int, context: int, steps: int, sampler: Sampler) -> Engine:
    """Return an engine whose sequences have their prompts, and go on for `steps` steps."""
    engine = Engine(model, Room.of_sequences(count, context + steps), sampler=sampler)
    for seed, prompt in enumerate(prompts_of(model, count, context)):
        engine.add(Request(prompt, replace(SETTINGS, seed=seed)))
    begun: set[int] = set()
    while len(begun) < count:
        begun |= {event.id for event in engine.step()}
    return engine


def seconds_of(step: Callable[[], object], steps: int) -> float:
    """Return the seconds of a step, after one that ends what has begun before."""
    step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def row(model: LFM2, precision: str, n: int, options: argparse.Namespace) -> Iterator[object]:
    steps = (STEPS + 4) * (options.rounds + 1) + 2 * WARM_UP
    steps += n * options.context // 512 + 1  # of prompts, meanwhile others go on
    sampler = model.new_sampler()
    ahead = engine_of(model, n, options.context, steps, sampler)
    read = engine_of(model, n, options.context, steps, Reads(sampler))
    device = OnTheDevice(model, n, options.context, steps)
    for one in (ahead.step, read.step, lambda: device.step().end()):
        seconds_of(one, WARM_UP)
    times = [
        (seconds_of(ahead.step, STEPS), seconds_of(read.step, STEPS), device.seconds(STEPS))
        for _ in range(options.rounds)
    ]
    of_ahead, of_read, of_device = map(statistics.median, zip(*times, strict=True))
    yield from (precision, n, f"{n / of_ahead:.0f}")
    yield from (f"{1e6 * seconds:.0f}" for seconds in (of_ahead, of_read, of_device))
    yield from (f"{1 - of_device / seconds:.1%}" for seconds in (of_ahead, of_read))
    ahead.close()
    read.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("-n", default="1,16,64")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("-r", "--rounds", type=int, default=9)
    options = parser.parse_args()
    print("| " + " | ".join(HEADINGS) + " |\n" + "|---" * len(HEADINGS) + "|")
    for precision in options.precision.split(","):
        model = build(Plan.parse("cuda"), precision, BF16)
        for n in map(int, options.n.split(",")):
            print("| " + " | ".join(map(str, row(model, precision, n, options))) + " |", flush=True)
        del model
        cupy.get_default_memory_pool().free_all_blocks()


if __name__ == "__main__":
    main()
