"""Measures how fast this machine computes a model's experts, and moves bytes between its memories.

Each backend that could compute experts gets a few of the model's, more than caches hold, and the
same number of rows for each of them.  The way to a device is measured with the same experts,
streamed as a model streams them: a plain copy from memory that is not pinned takes several times as
long.  The ranks of a job measure at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import Captures, Measures
from lfm2kit.building import rates
from lfm2kit.building.answers import Answers
from lfm2kit.building.curves import Curve
from lfm2kit.building.loading import Setup, in_host_memory
from lfm2kit.building.placement import Placed
from lfm2kit.building.rank_rates import ExchangeRates
from lfm2kit.building.rates import Calibration, Call, Link, Side
from lfm2kit.building.records import LEAST
from lfm2kit.errors import Lfm2kitError
from lfm2kit.measuring.block_times import block_rates, blocks, recorder, seconds_of
from lfm2kit.measuring.exchange_times import (
    copied_per_second,
    exchange_rates,
    groups_of,
    measured_groups,
)
from lfm2kit.measuring.past_host import past_host_rates
from lfm2kit.measuring.together import Stopwatch
from lfm2kit.memory import HOST, own_stream
from lfm2kit.ranks.joining import Alone
from lfm2kit.records.machine import described, hardware_of, now
from lfm2kit.rewrites import StreamedExperts
from lfm2kit.rewrites.experts_split import EXPERTS_PER_SLOT, SLOTS
from lfm2kit.specs import Spec
from lfm2kit.transport import Transport

ROWS = (1, 4, 16, 32, 64, 128, 256, 512, 1024)  # of each expert
EXPERTS_BYTES = 512 * 2**20  # of those that are measured, as float32: more than caches hold
LINK_BYTES = 256 * 2**20  # of a plain copy
PRODUCT_SECONDS = 12.0  # for the products of one backend: what would take longer is not measured
WARM_AND_TIMED = 2  # calls that a measurement makes at least


class Measurable(NamedTuple):
    """A few experts of the model, and a backend that can compute them."""

    experts: rates.Experts
    placed: Placed


def measurable(setup: Setup) -> list[Measurable]:
    """Return what `calibrated` measures: each size of experts on each backend that builds them.

    The backends are those of the plan, and the one that would compute experts in the host's memory.
    Raise `Lfm2kitError` if there is nothing to measure.
    """
    found: dict[rates.Experts, Placed] = {}
    for name, scope, spec in _experts(setup.checkpoint.spec, "", ""):
        for item in sorted(_items(setup, spec)):
            asked = Answers(setup.create(item), item, name)
            if asked.why_unsupported(spec) is None:
                memory, weights = asked.memory(spec), setup.checkpoint.weights.scope(scope)
                precision = setup.plugins.precision(item, setup.context.precision).name
                placed = Placed(name, scope, _few(spec), memory, memory, item)
                found.setdefault(rates.Experts.of(spec, weights, item, precision), placed)
    if not found:
        raise Lfm2kitError(
            f"{setup.checkpoint.path}: the model has no experts that a backend of the plan "
            f"{setup.plan} builds; there is nothing to measure"
        )
    return [Measurable(*one) for one in found.items()]


def calibrated(
    setup: Setup, there: list[Measurable], done: Callable[[], None] = lambda: None
) -> tuple[Calibration, float]:
    """Measure all of `there`, the model's other blocks, and what ranks exchange.

    Call `done` as often as `steps` says.  All ranks of a job call this, and measure at once.
    Return the rates, and the largest share of a call for which a thread waited for a core.
    """
    transport: Transport = setup.transport or Alone()
    sides, waited = [], 0.0
    for one in there:
        watch = Stopwatch(one.placed.memory, transport)
        with own_stream(one.placed.memory):
            sides.append(_side(setup, one, watch, done))
        waited = max(waited, watch.waited)
    hidden_size = setup.checkpoint.spec.embed_tokens.hidden_size
    calibration = Calibration(
        now(),
        described(setup.context),
        setup.checkpoint.path.name,
        tuple(sides),
        tuple(block_rates(setup, transport, done)),
        (*exchange_rates(transport, done), *_past_host(setup, transport, done)),
        copied_per_second(transport, hidden_size),
    )
    return calibration, waited


def steps(setup: Setup, there: list[Measurable]) -> int:
    """Return in how many steps `calibrated` measures."""
    exchanges = [] if setup.transport is None else measured_groups(setup.transport)
    return len(there) * (len(ROWS) + 1) + len(blocks(setup)) + 2 * len(exchanges)


def _past_host(
    setup: Setup, transport: Transport, done: Callable[[], None]
) -> Iterator[ExchangeRates]:
    for among in groups_of(transport, done):
        yield from past_host_rates(setup, among)


def _experts(spec: Spec, name: str, scope: str) -> Iterator[tuple[str, str, specs.Experts]]:
    """Yield the experts within `spec`, with their names and scopes."""
    if isinstance(spec, specs.Experts):
        yield name, scope, spec
    for part in spec.parts():
        yield from _experts(part.spec, _dotted(name, part.role), _dotted(scope, part.scope))


def _items(setup: Setup, spec: specs.Experts) -> set[str]:
    """Return the plan's items, and those that would build the experts in the host's memory."""
    items = setup.plan.backends()
    on_host = (
        in_host_memory(item, spec, setup.options, setup.plugins, setup.create) for item in items
    )
    return items | set(filter(None, on_host))


def _dotted(*names: str) -> str:
    return ".".join(filter(None, names))


def _few(spec: specs.Experts) -> specs.Experts:
    """Return as many of the experts as are to be measured, a multiple of those of a token."""
    per_token = spec.num_experts_per_tok
    enough = -(-EXPERTS_BYTES // (4 * spec.expert.weight_elements()))
    count = max(per_token, min(enough, spec.num_experts) // per_token * per_token)
    return replace(spec, local_experts=tuple(range(count)))


def _side(setup: Setup, one: Measurable, watch: Stopwatch, done: Callable[[], None]) -> Side:
    placed = one.placed
    assert isinstance(placed.spec, specs.Experts)
    assert placed.backend is not None
    asked = Answers(setup.create(placed.backend), placed.backend, placed.name)
    kept = setup.sizes.kept(placed) or setup.stored_bytes(placed)
    expert_bytes = kept // len(placed.spec.local_experts)
    block = setup.build_block(placed, tokens=_tokens(placed.spec, ROWS[-1]))
    captures = recorder(setup, placed)
    product = _product(placed.spec, partial(seconds_of, captures, watch, [block]), watch, done)
    del block
    fixed = None if captures is None else _fixed(setup, placed, product, captures, watch)
    link = None if placed.memory.name == HOST.name else _link(watch)
    if link is not None and (seconds := _streaming(setup, placed, asked, watch)) is not None:
        link = link._replace(from_host=expert_bytes / seconds)
    ceilings = asked.ceilings() if isinstance(asked.backend, Measures) else None
    done()
    return Side(
        one.experts,
        placed.memory.name,
        expert_bytes,
        product,
        link,
        ceilings,
        hardware_of(asked, placed.memory),
        asked.row_format(placed.spec),
        Call(len(placed.spec.local_experts), fixed),
    )


def _product(
    spec: specs.Experts,
    taken: Callable[[Sequence[Any]], float],
    watch: Stopwatch,
    done: Callable[[], None],
) -> Curve:
    """Return the seconds of one expert's product, up to as many rows as there is time for."""
    begin, rows, seconds = 0.0, list[int](), list[float]()
    for count in ROWS:
        ahead = WARM_AND_TIMED * seconds[-1] * count / rows[-1] if rows else 0.0
        if not rows or watch.largest(time.perf_counter() - begin + ahead) < PRODUCT_SECONDS:
            inputs = [watch.memory.from_host(array) for array in _inputs(spec, count)]
            seconds.append(taken(inputs))
            rows.append(count)
            begin = begin or time.perf_counter()  # kernels may have been compiled before
        done()
    return Curve(tuple(rows), tuple(one / len(spec.local_experts) for one in seconds))


def _fixed(
    setup: Setup, placed: Placed, product: Curve, captures: Captures, watch: Stopwatch
) -> float | None:
    """Return the seconds that the number of experts does not change: by a call of fewer ones."""
    experts = placed.spec
    assert isinstance(experts, specs.Experts)
    few = replace(experts, local_experts=experts.local_experts[: experts.num_experts_per_tok])
    some, all_of_them = len(few.local_experts), len(experts.local_experts)
    if some == all_of_them:
        return None
    block = setup.build_block(replace(placed, spec=few), tokens=_tokens(few, ROWS[0]))
    inputs = [watch.memory.from_host(array) for array in _inputs(few, ROWS[0])]
    of_some, of_all = seconds_of(captures, watch, [block], inputs), product.seconds[0] * all_of_them
    fixed = (all_of_them * of_some - some * of_all) / (all_of_them - some)
    return min(max(LEAST, fixed), of_all)


def _inputs(spec: specs.Experts, rows: int) -> tuple[Any, Any, Any]:
    """Return x, ids and weights that give `rows` rows to each of the experts of `spec`."""
    local, per_token = spec.local_experts, spec.num_experts_per_tok
    tokens = _tokens(spec, rows)
    x = np.random.default_rng(0).standard_normal((tokens, spec.hidden_size), dtype=np.float32)
    ids = np.resize(np.array(local, np.int32), (tokens, per_token))
    return x, ids, np.full(ids.shape, 1 / per_token, np.float32)


def _tokens(spec: specs.Experts, rows: int) -> int:
    return rows * len(spec.local_experts) // spec.num_experts_per_tok


def _streaming(setup: Setup, placed: Placed, asked: Answers, watch: Stopwatch) -> float | None:
    """Return the seconds in which one expert is streamed; None if the backend does not stream.

    Each has one row: its product takes less time than the copy of the next ones.
    """
    experts = placed.spec
    assert isinstance(experts, specs.Experts)
    spec = StreamedExperts(experts, 0, SLOTS, EXPERTS_PER_SLOT)
    if asked.why_unsupported(spec) is not None:
        return None
    block = setup.build_block(replace(placed, spec=spec), tokens=_tokens(experts, 1))
    inputs = [watch.memory.from_host(array) for array in _inputs(experts, 1)]
    return watch.seconds(partial(block, *inputs)) / len(experts.local_experts)


def _link(watch: Stopwatch) -> Link:
    """Return the rates of large copies, as the memory makes them."""
    memory, here = watch.memory, np.zeros(LINK_BYTES, np.uint8)
    there = memory.from_host(here)
    sent = watch.seconds(lambda: memory.from_host(here))
    came = watch.seconds(lambda: memory.to_host(there))
    return Link(LINK_BYTES / sent, LINK_BYTES / came)
