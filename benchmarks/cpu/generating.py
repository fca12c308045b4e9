"""What it costs to generate text, beside the bare steps that `lfm2kit bench --decode` measures.

    python benchmarks/cpu/generating.py --model FOLDER -n 1,16 -r 9
    python benchmarks/cpu/generating.py --model FOLDER -n 1,16 -r 9 --backend cuda --precision bf16

In one process, the bare steps, those of an engine and those of a writer of text take turns, each
with prompts of 16 random tokens.  Tokens are drawn with LFM2's settings.  Ratios are medians over
the rounds, in each of which all contenders ran one after the other.  The sampler is timed in an
engine that reads each step's tokens before it begins the next.
"""

from __future__ import annotations

import argparse
import io
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from lfm2kit.building.loading import load_model
from lfm2kit.engine.drawing import Sampler
from lfm2kit.engine.engine import Engine
from lfm2kit.engine.requests import Request
from lfm2kit.engine.sampling import Sampling
from lfm2kit.generating.language import Language
from lfm2kit.generating.options import Generation
from lfm2kit.generating.writer import Writer
from lfm2kit.measuring.decoding import Decoder
from lfm2kit.model import LFM2
from lfm2kit.state import Room

PROMPT = 16  # tokens
SETTINGS = Sampling(temperature=0.3, min_p=0.15, repetition_penalty=1.05)  # LFM2's
HEAD = (
    "n",
    "bare, ms",
    "engine, ms",
    "text, ms",
    "bare / engine",
    "bare / text",
    "text - bare, ms",
    "sampler, of engine",
    "first tokens, ms",
)


class Round(NamedTuple):
    """Seconds of a step of each contender, and until a first token."""

    bare: float
    engine: float
    sampler: float  # its share of a step
    first: float
    text: float


class TimedSampler:
    """A sampler that counts the seconds that another one takes, once the logits are there."""

    def __init__(self, model: LFM2) -> None:
        self._sampler: Sampler = model.new_sampler()
        self._memory = model.home
        self.seconds = 0.0

    def draw(self, logits: Any, rows: Any) -> Any:
        self._memory.to_host(logits[:1])  # which waits for all of them
        start = perf_counter()
        drawn = self._sampler.draw(logits, rows)
        self.seconds += perf_counter() - start
        return drawn


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a folder with a tokenizer")
    add("--backend", default="cpu_simd")
    add("--precision", default="fp32")
    add("-n", default="1,16", help="sequences in a step, as a list")
    add("-r", "--repetitions", type=int, default=9)
    add("--steps", type=int, default=64, help="of each contender in a round")
    options = parser.parse_args()
    model = load_model(options.model, backend=options.backend, precision=options.precision)
    print(_row(HEAD), _row(["---"] * len(HEAD)), sep="\n")
    for n in map(int, options.n.split(",")):
        rounds = _rounds(model, n, options.steps)
        next(rounds)  # warms up
        print(_line(n, [next(rounds) for _ in range(options.repetitions)]), flush=True)


def _rounds(model: LFM2, n: int, steps: int) -> Iterator[Round]:
    """Yield rounds of `n` sequences."""
    assert model.folder is not None
    language, rng = Language(model.folder, model.spec), np.random.default_rng(0)
    room = Room.of_sequences(n, PROMPT + steps + 1)
    sampler = TimedSampler(model)
    engine, timed = Engine(model, room), Engine(model, room, sampler=sampler)
    writer = Writer(model, language, context=PROMPT + steps + 1, sequences=n)

    def requests() -> list[Request]:
        vocab_size = model.spec.embed_tokens.vocab_size
        prompts = rng.integers(vocab_size, size=(n, PROMPT), dtype=np.int32)
        return [Request(ids, SETTINGS, max_tokens=steps + 1) for ids in prompts]

    while True:
        bare = _seconds(Decoder(model, n, PROMPT, steps, seed=0).step, steps)
        first = _seconds(partial(_begin, engine, requests()), 1)
        of_engine = _seconds(engine.step, steps)
        _begin(timed, requests())
        sampler.seconds = 0.0
        of_timed = _seconds(timed.step, steps)
        share = sampler.seconds / steps / of_timed
        step = _stepping(writer, requests())
        step()
        yield Round(bare, of_engine, share, first, _seconds(step, steps))
        assert not engine.is_busy, "each sequence has as many tokens as steps were made"


def _begin(engine: Engine, requests: Sequence[Request]) -> None:
    for request in requests:
        engine.add(request)
    engine.step()


def _stepping(writer: Writer, requests: Sequence[Request]) -> Callable[[], None]:
    """Return what makes a step of a writer's answers, and writes their texts."""
    options, out = Generation(), io.StringIO()
    answers = [answer for request in requests for answer in writer.begin(request, options)]

    def step() -> None:
        writer.step()
        for answer in answers:
            for part in answer.take():
                out.write(part.text)

    return step


def _seconds(call: Callable[[], object], times: int) -> float:
    start = perf_counter()
    for _ in range(times):
        call()
    return (perf_counter() - start) / times


def _line(n: int, rounds: Sequence[Round]) -> str:
    def median(value: Callable[[Round], float]) -> float:
        return statistics.median(map(value, rounds))

    return _row(
        [
            str(n),
            *(f"{1e3 * median(attrgetter(name)):.4g}" for name in ("bare", "engine", "text")),
            f"{median(lambda one: one.bare / one.engine):.3f}",
            f"{median(lambda one: one.bare / one.text):.3f}",
            f"{1e3 * median(lambda one: one.text - one.bare):.3f}",
            f"{100 * median(lambda one: one.sampler):.1f} %",
            f"{1e3 * median(lambda one: one.first):.4g}",
        ]
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
