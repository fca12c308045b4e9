"""Measures how long a layer's tokens take to other ranks and back if they travel past the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from lfm2kit.backend import Captures
from lfm2kit.building.answers import Answers
from lfm2kit.building.curves import Curve
from lfm2kit.building.loading import Setup
from lfm2kit.building.rank_rates import ExchangeKey, ExchangeRates
from lfm2kit.host_exchange import offered
from lfm2kit.measuring.together import Stopwatch, largest, recorded
from lfm2kit.memory import HOST, own_stream
from lfm2kit.simulating.sendings import Sendings
from lfm2kit.specs import Experts, leaves
from lfm2kit.transport import Exchange, ExchangeOffer, Traffic, Transport, evenly, held_once

TOKENS = (1, 8, 32, 128, 512, 2048)  # of each rank
LAYERS = 8  # whose exchanges follow each other in a recording
REPETITIONS = 7


class _There(NamedTuple):
    """An exchange that can be measured, and what records it."""

    offer: ExchangeOffer
    traffic: Traffic
    captures: Captures


def past_host_rates(setup: Setup, among: Transport) -> Iterator[ExchangeRates]:
    """Yield the seconds of a layer's dispatch and combine together, by the bytes of both.

    All ranks of `among` call this.  Nothing is yielded if tokens cannot travel past the host there.
    """
    there = _there(setup, among)
    if there is not None:
        world = among.world
        key = ExchangeKey(world.size, len(set(world.nodes)), there.offer.memory.name)
        with own_stream(there.offer.memory):
            yield ExchangeRates(key, _curve(there, among))


def _there(setup: Setup, among: Transport) -> _There | None:
    """Return the exchange among some ranks, if all of them can use and record it."""
    memory, backend = setup.placed.memory, setup.create(setup.plan.default)
    experts = (one for one in leaves(setup.checkpoint.spec) if isinstance(one, Experts))
    spec = next(experts, None)
    offer = offered(among, memory)
    is_there = memory.name != HOST.name and offer.memory.name == memory.name
    if spec is None or not is_there or not isinstance(backend, Captures):
        return None
    cannot = offer.why_not() is not None or not offer.is_capturable
    if largest(among, float(cannot)):
        return None
    owners = held_once(evenly(among.world.size, spec.num_experts), among.world.size)
    row_format = Answers(backend, setup.plan.default, "").row_format(spec)
    traffic = Traffic(spec.hidden_size, spec.num_experts_per_tok, owners, row_format)
    return _There(offer, traffic, backend)


def _curve(there: _There, among: Transport) -> Curve:
    layers = [there.offer.create(there.traffic) for _ in range(LAYERS)]
    sizes, seconds = list[int](), list[float]()
    for tokens in TOKENS:
        ids = [_ids(there.traffic, rank, tokens) for rank in range(among.world.size)]
        sizes.append(_bytes_to_each(ids, there.traffic))
        with there.offer.around(tokens):
            seconds.append(_seconds(there, layers, ids[among.world.rank], among))
    return Curve(tuple(sizes), tuple(seconds))


def _ids(traffic: Traffic, rank: int, tokens: int) -> Any:
    """Return random experts of a rank's tokens, int32 [tokens, k]."""
    experts = len(traffic.owners[0])
    order = np.random.default_rng(rank).random((tokens, experts)).argsort(axis=1)
    return order[:, : traffic.num_experts_per_tok].astype(np.int32)


def _bytes_to_each(ids: Sequence[Any], traffic: Traffic) -> int:
    """Return the bytes of both messages to another rank, on average over those of the busiest."""
    dispatched, back = Sendings.of(ids, traffic, [len(ids) - 1] * len(ids)).bytes()
    return max(1, int((dispatched + back).sum(axis=1).max()) // (len(ids) - 1))


def _seconds(there: _There, layers: Sequence[Exchange], ids: Any, among: Transport) -> float:
    """Return the median seconds of a layer's dispatch and combine, on the slowest rank.

    Every rank replays as often as the others.
    """
    memory, hidden_size = there.offer.memory, there.traffic.hidden_size
    x = np.random.default_rng(0).standard_normal((len(ids), hidden_size), np.float32)
    weights = np.ones(ids.shape, np.float32)
    arguments = [memory.from_host(array) for array in (x, ids, weights)]
    rows = layers[0].dispatch(*arguments).x.shape[0]
    products = memory.from_host(np.zeros((rows, hidden_size), np.float32))
    layers[0].combine(products)

    def exchange(layer: Exchange) -> None:
        layer.dispatch(*arguments)
        layer.combine(products)

    watch = Stopwatch(memory, among)
    with recorded(there.captures, [partial(exchange, layer) for layer in layers]) as replay:
        taken = [watch.once_together(replay) for _ in range(REPETITIONS)]
    return median(taken) / len(layers)
