"""Measures how long the blocks of a model take that compute no experts, by rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import Block, Captures
from lfm2kit.batch import Batch
from lfm2kit.building.answers import Answers
from lfm2kit.building.curves import Curve
from lfm2kit.building.loading import Setup
from lfm2kit.building.placement import Placed
from lfm2kit.building.predicting import SEQUENCE
from lfm2kit.building.rank_rates import BlockKey, BlockRates
from lfm2kit.measuring.together import Stopwatch
from lfm2kit.memory import HOST, own_stream
from lfm2kit.transport import Transport

ROWS = (1, 4, 16, 32, 64, 128, 256, 512, 1024)  # the next size is guessed from the last one
BLOCK_SECONDS = 3.0  # for a block: what would take longer is not measured
# Of equal blocks, as many are measured alternately as have these bytes: no cache holds them all.
UNCACHED_BYTES, MOST_EQUAL = 256 * 2**20, 8
WARM_AND_TIMED = 2  # calls that a measurement makes at least
SEED = 0


def blocks(setup: Setup) -> dict[BlockKey, list[Placed]]:
    """Return the different blocks that are measured, each where the plan builds it first.

    There are several equal ones if a cache could hold the weights of one.  A block that computes
    experts among other things is taken apart.
    """
    found: dict[BlockKey, list[Placed]] = {}
    for placed in _apart(setup, setup.placed):
        equal = found.setdefault(key_of(setup, placed), [])
        nbytes = setup.stored_bytes(placed) * len(equal)
        if not equal or (nbytes < UNCACHED_BYTES and len(equal) < MOST_EQUAL):
            equal.append(placed)
    return found


def key_of(setup: Setup, placed: Placed) -> BlockKey:
    """Return the key of a block's rates, in the precision that it has in the plan."""
    assert placed.backend is not None  # a leaf's always is
    precision = setup.plugins.precision(placed.backend, setup.context.precision).name
    weights = setup.checkpoint.weights.scope(placed.scope)
    return BlockKey.of(placed.spec, weights, placed.backend, precision)


def block_rates(
    setup: Setup, transport: Transport, done: Callable[[], None] = lambda: None
) -> Iterator[BlockRates]:
    """Measure the model's blocks on all ranks at once, and yield the rates; call `done` for each.

    Ranks make the same calls, so their `setup` is that of one job.
    """
    for key, equal in blocks(setup).items():
        placed = equal[0]
        watch = Stopwatch(placed.memory, transport)
        with own_stream(placed.memory):
            built = [setup.build_block(one, tokens=ROWS[-1]) for one in equal]
            seconds = partial(seconds_of, recorder(setup, placed), watch, built)
            yield BlockRates(key, setup.sizes.kept(placed) or 0, _call(placed, seconds, watch))
        del built, seconds
        done()


def recorder(setup: Setup, placed: Placed) -> Captures | None:
    """Return who records calls of a block; None if they are made one by one in a forward too."""
    assert placed.backend is not None  # a leaf's always is
    backend = setup.create(placed.backend)
    if placed.memory.name == HOST.name or placed.why_not_captured is not None:
        return None
    return backend if isinstance(backend, Captures) else None


def seconds_of(
    captures: Captures | None, watch: Stopwatch, built: list[Block], inputs: Sequence[Any]
) -> float:
    """Return the seconds of a call of one of some equal blocks, as it is in a forward."""
    calls = [partial(block, *inputs) for block in built]
    return watch.seconds_recorded(captures, *calls) if captures else watch.seconds(*calls)


def _call(placed: Placed, taken: Callable[[Sequence[Any]], float], watch: Stopwatch) -> Curve:
    """Return the seconds of a block's call, up to as many rows as there is time for."""
    begin, rows, seconds = 0.0, list[int](), list[float]()
    for count in ROWS:
        ahead = WARM_AND_TIMED * seconds[-1] * count / rows[-1] if rows else 0.0
        if rows and watch.largest(time.perf_counter() - begin + ahead) > BLOCK_SECONDS:
            break
        inputs = [_there(placed, one) for one in _inputs(placed, count)]
        seconds.append(taken(inputs))
        rows.append(count)
        begin = begin or time.perf_counter()  # kernels may have been compiled before
    return Curve(tuple(rows), tuple(seconds))


def _inputs(placed: Placed, rows: int) -> tuple[Any, ...]:
    from lfm2kit.testing.random_inputs import random_inputs  # no other command loads the suite

    full, rest = divmod(rows, SEQUENCE)
    lengths = [SEQUENCE] * full + [rest] * (rest > 0)
    return random_inputs(placed.spec, np.random.default_rng(SEED), rows, lengths=lengths)


def _there(placed: Placed, value: Any) -> Any:
    """Return an argument in the block's memory."""
    if isinstance(value, Batch):
        return value.on(placed.memory)
    return None if value is None else placed.memory.from_host(value)


def _apart(setup: Setup, placed: Placed) -> Iterator[Placed]:
    """Yield the blocks that compute no experts, also those that a larger one could be built of."""
    if placed.backend is None:
        for _, part in placed.parts:
            yield from _apart(setup, part)
    elif not _has_experts(placed.spec):
        yield replace(placed, outer=placed.memory, parts=())
    else:
        backend = setup.create(placed.backend)
        for role, scope, spec, _ in placed.spec.parts():
            name = f"{placed.name}.{role}"
            inner = ".".join(filter(None, (placed.scope, scope)))
            asked = Answers(backend, placed.backend, name)
            if _has_experts(spec) or asked.why_unsupported(spec) is None:
                memory = placed.memory if _has_experts(spec) else asked.memory(spec)
                part = Placed(name, inner, spec, memory, memory, placed.backend)
                yield from _apart(setup, part)


def _has_experts(spec: specs.Spec) -> bool:
    return any(leaf.kind == specs.Experts.kind for leaf in specs.leaves(spec))
