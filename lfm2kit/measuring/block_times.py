"""Measures how long the blocks of a model take that compute no experts, by rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from lfm2kit import specs
from lfm2kit.batch import Batch
from lfm2kit.building.answers import Answers
from lfm2kit.building.curves import Curve
from lfm2kit.building.loading import Setup
from lfm2kit.building.placement import Placed
from lfm2kit.building.predicting import SEQUENCE
from lfm2kit.building.rank_rates import BlockKey, BlockRates
from lfm2kit.measuring.together import Stopwatch
from lfm2kit.memory import own_stream
from lfm2kit.transport import Transport

ROWS = (1, 4, 16, 32, 64, 128, 256, 512, 1024)  # the next size is guessed from the last one
BLOCK_SECONDS = 3.0  # for a block: what would take longer is not measured
WARM_AND_TIMED = 2  # calls that a measurement makes at least
SEED = 0


def blocks(setup: Setup) -> dict[BlockKey, Placed]:
    """Return the different blocks that are measured, each where the plan builds it first.

    A block that computes experts among other things is taken apart.
    """
    found: dict[BlockKey, Placed] = {}
    for placed in _apart(setup, setup.placed):
        found.setdefault(key_of(setup, placed), placed)
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
    for key, placed in blocks(setup).items():
        watch = Stopwatch(placed.memory, transport)
        with own_stream(placed.memory):
            block = setup.build_block(placed, tokens=ROWS[-1])
            yield BlockRates(key, setup.sizes.kept(placed) or 0, _call(placed, block, watch))
        del block
        done()


def _call(placed: Placed, block: Any, watch: Stopwatch) -> Curve:
    """Return the seconds of a block's call, up to as many rows as there is time for."""
    begin, rows, seconds = time.perf_counter(), list[int](), list[float]()
    for count in ROWS:
        ahead = WARM_AND_TIMED * seconds[-1] * count / rows[-1] if rows else 0.0
        if watch.largest(time.perf_counter() - begin + ahead) > BLOCK_SECONDS:
            break
        inputs = [_there(placed, one) for one in _inputs(placed, count)]
        seconds.append(watch.seconds(partial(block, *inputs)))
        rows.append(count)
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
            asked = Answers(backend, placed.backend, name)
            if not _has_experts(spec) and asked.why_unsupported(spec) is None:
                memory = asked.memory(spec)
                inner = ".".join(filter(None, (placed.scope, scope)))
                yield Placed(name, inner, spec, memory, memory, placed.backend)


def _has_experts(spec: specs.Spec) -> bool:
    return any(leaf.kind == specs.Experts.kind for leaf in specs.leaves(spec))
