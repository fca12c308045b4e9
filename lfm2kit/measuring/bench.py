"""Measures forwards and single blocks: medians over repetitions, contenders interleaved.

Interleaved, because machines drift: what is to be compared takes turns within one run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import Ceilings, Measures
from lfm2kit.batch import Batch
from lfm2kit.building.answers import Answers
from lfm2kit.building.loading import Setup
from lfm2kit.building.placement import Placed
from lfm2kit.engine.room import context_of
from lfm2kit.errors import Lfm2kitError
from lfm2kit.measuring.decoding import Decoder
from lfm2kit.measuring.given_texts import NONE, most_rows
from lfm2kit.measuring.timing import Repeated, Timing, timed
from lfm2kit.model import LFM2
from lfm2kit.specs import Spec, Work
from lfm2kit.state import STEP_BACK, Room

WARM_UPS = 2  # calls of each contender before it is timed: the second one captures


class Limit(NamedTuple):
    """The least seconds that work takes, and the unit that limits it."""

    unit: str
    seconds: float

    @classmethod
    def of(cls, work: Work, ceilings: Ceilings) -> Limit:
        computing, reading = work.flops / ceilings.flops, work.bytes / ceilings.bytes
        unit = "computing" if computing > reading else "reading memory"
        return cls(unit, max(computing, reading))


def roofline(work: Work, seconds: float, ceilings: Ceilings | None) -> float | None:
    """Return the share of what the ceilings allow for work that took so long; 1 is the limit."""
    if ceilings is None or seconds == 0:
        return None
    return Limit.of(work, ceilings).seconds / seconds


@dataclass(frozen=True, slots=True)
class Contender:
    """A call to time, made once per repetition; `work` is the least that a call must do."""

    backend: str
    precision: str
    test: str
    samples: int
    tokens: int
    work: Work
    call: Callable[[], Any]  # returns what it has computed: an array, or a tuple
    speculate: str | None = None  # what guesses the tokens that are decoded, if any are


@dataclass(frozen=True, slots=True)
class Measured(Repeated):
    """The timings of each repetition of one contender, and what they amount to."""

    contender: Contender
    timings: Sequence[Timing]
    ceilings: Ceilings | None
    is_finite: bool = True  # whether the warm-up's result had neither NaN nor infinities

    @property
    def seconds(self) -> list[float]:
        return [timing.seconds for timing in self.timings]

    @property
    def waiting(self) -> float | None:
        """Return the median share of a call that a thread waited for a core; None: unknown."""
        shares = [t.waited / t.seconds for t in self.timings if t.waited is not None]
        return statistics.median(shares) if shares else None

    @property
    def roofline(self) -> float | None:
        """Return the share of what the measured ceilings allow; 1 is the machine's limit."""
        return roofline(self.contender.work, self.median, self.ceilings)

    @property
    def memory_share(self) -> float | None:
        """Return the share of the measured reading bandwidth that the bytes of a call take."""
        if self.ceilings is None:
            return None
        return self.contender.work.bytes / self.ceilings.bytes / self.median


def measure(
    contenders: Sequence[Contender],
    repetitions: int,
    ceilings: dict[str, Ceilings],
    done: Callable[[], None] = lambda: None,
) -> list[Measured]:
    """Time every contender `repetitions` times, one after the other, after `WARM_UPS` calls."""
    are_finite = []
    for contender in contenders:
        for _ in range(WARM_UPS):
            result = contender.call()
            done()
        arrays = result if isinstance(result, tuple) else (result,)
        are_finite.append(all(np.isfinite(array).all() for array in arrays))
    taken: list[list[Timing]] = [[] for _ in contenders]
    for _ in range(repetitions):
        for contender, timings in zip(contenders, taken, strict=True):
            timings.append(timed(contender.call))
            done()
    return [
        Measured(contender, timings, ceilings.get(contender.backend), is_finite)
        for contender, timings, is_finite in zip(contenders, taken, are_finite, strict=True)
    ]


def measured_ceilings(setup: Setup) -> Ceilings | None:
    """Return the machine's ceilings, if the plan's default backend can measure them."""
    backend = setup.create(setup.plan.default)
    if not isinstance(backend, Measures):
        return None
    return Answers(backend, setup.plan.default).ceilings()


def random_batch(samples: int, seq_len: int, vocab_size: int, seed: int) -> Batch:
    ids = np.random.default_rng(seed).integers(0, vocab_size, (samples, seq_len), dtype=np.int32)
    return Batch.of_sequences(list(ids))


def forwards(
    setup: Setup, model: LFM2, samples: Sequence[int], lengths: Sequence[int], seed: int
) -> Iterator[Contender]:
    """Yield the whole model, ids in to logits out on the host, at each number of samples."""
    name = "+".join(["model", *(rewrite.name for rewrite in setup.rewrites)])
    for n, seq_len in product(samples, lengths):
        batch = random_batch(n, seq_len, model.spec.embed_tokens.vocab_size, seed)
        yield Contender(
            backend=str(setup.plan),
            precision=setup.precision_of(model.placed),
            test=f"{name} {n}x{seq_len}",
            samples=n,
            tokens=n * seq_len,
            work=model.spec.work(batch, itemsize(setup, model.placed)),
            call=lambda batch=batch: model.logits(batch),  # type: ignore[misc]
        )


def decodings(
    setup: Setup,
    model: LFM2,
    sequences: Sequence[int],
    contexts: Sequence[int],
    guesses: Sequence[str],
    steps: int,
    seed: int,
) -> Iterator[Contender]:
    """Yield the decoding of each number of sequences, from each length on, for `steps` calls.

    It is done with each of `guesses`, which are names of `GUESSES`.
    """
    steps += 1  # the one that shows how many tokens a step computes
    _check_room(model, max(sequences), max(contexts) + steps * max(map(most_rows, guesses)))
    for n, context, speculate in product(sequences, contexts, guesses):
        decoder = Decoder(model, n, context, steps, seed, speculate)
        weights = model.spec.work(decoder.next_batch(), itemsize(setup, model.placed))
        decoder.step()
        yield Contender(
            backend=str(setup.plan),
            precision=setup.precision_of(model.placed),
            test=f"decode {n} @ {context}" + (speculate != NONE) * f" {speculate}",
            samples=n,
            tokens=decoder.tokens - n * context,
            work=weights + Work(0, n * _state_read(setup, model.placed, context)),
            call=decoder.step,
            speculate=speculate,
        )


def _check_room(model: LFM2, sequences: int, tokens: int) -> None:
    """Raise `Lfm2kitError` if the model's context, or any state, has too little room."""
    if tokens > (most := context_of(model.spec)):
        raise Lfm2kitError(f"sequences grow to {tokens} tokens, but the model's context has {most}")
    try:
        Room.of_sequences(sequences, tokens)
    except ValueError as error:
        raise Lfm2kitError(f"{sequences} sequences of {tokens} tokens: {error}") from None


def _state_read(setup: Setup, placed: Placed, context: int) -> float:
    """Return the bytes of its state that a step of a sequence with `context` tokens reads.

    They are those of the keys and values of all tokens, and of the rows to which convolutions look
    back, as backends keep them.
    """
    room = Room(pages=1)
    return sum(
        setup.sizes.state(leaf, room) * _pages_read(leaf.spec, context, room)
        for leaf in placed.leaves()
    )


def _pages_read(spec: Spec, context: int, room: Room) -> float:
    """Return as how many pages of its state a block reads, at the least."""
    for one in specs.leaves(spec):
        if isinstance(one, specs.Attention):
            return context / room.page_tokens
        if isinstance(one, specs.ShortConv):
            return (one.kernel_size - 1) / (one.kernel_size - 1 + STEP_BACK)
    return 0.0


def itemsize(setup: Setup, placed: Placed) -> float:
    """Return the bytes per weight element as stored."""
    return setup.stored_bytes(placed) / max(placed.spec.weight_elements(), 1)
