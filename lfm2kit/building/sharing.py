"""Chooses where every expert is computed, so that the predicted time of a forward is least.

A layer's experts are resident in the device's memory, streamed into slots there ahead of their
layer, or computed on the host.  In each layer the least used experts go to the host and the most
used ones are resident, because the host's time depends on the rows, and the link's does not.  So a
choice is two numbers for each layer.  It is made before a model is built, from numbers alone, and
stays: the bits of a sample must not depend on what else is in its batch.
"""

from __future__ import annotations

import enum
import heapq
import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from lfm2kit.building.curves import Float64
from lfm2kit.building.overlap import NO_SLOTS, LayerTime, Limit, Slots, Work, layer_times
from lfm2kit.building.rates import Rates

SLOTS = (2, 3, 4, 6, 8)  # that are tried: with more the link waits less, but fewer are resident
GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, are far apart
GRID = 64  # numbers that are tried at once in a search

Shares = Sequence[Sequence[float]]  # [layers][experts]: of a layer's tokens, those that choose each


class Place(enum.StrEnum):
    """Where the weights of an expert are, and what computes it."""

    RESIDENT = "resident"  # in the device's memory
    STREAMED = "streamed"  # copied over the link into a slot in every forward
    HOST = "host"


@dataclass(frozen=True, slots=True)
class Budget:
    """The memory that experts may take, in bytes."""

    device: int  # for resident experts and slots; other weights, state and scratch are not in it
    pinned: int | None = None  # of the host's, for streamed experts; None: no limit
    slots: tuple[int, ...] = SLOTS  # numbers of them to choose from; (): nothing is streamed
    portion: int | None = 1  # experts in a slot, sent at once; None: all that a layer streams


class Trip(NamedTuple):
    """The seconds in which a token's row comes to the host, and its result back."""

    to_host: float = 0.0
    back: float = 0.0
    is_of_all: bool = False  # also of tokens that no expert of the host needs

    def seconds(self, rows: Any, *, beside_link: bool) -> Float64:
        """Return how long these rows travel; what comes back shares the link with experts."""
        back = 2 * self.back if beside_link else self.back
        return np.asarray(rows, np.float64) * (self.to_host + back)


NO_TRIP = Trip()


@dataclass(frozen=True, slots=True)
class Sharing:
    """The place of every expert, and what is predicted for a forward with these places."""

    places: tuple[tuple[Place, ...], ...]  # [layers][experts]
    slots: Slots  # that the streamed experts of all layers share
    layers: tuple[LayerTime, ...]

    def at(self, layer: int, place: Place) -> tuple[int, ...]:
        """Return the ids of a layer's experts in one place, in ascending order."""
        return tuple(e for e, there in enumerate(self.places[layer]) if there is place)

    @property
    def seconds(self) -> float:
        """Return the predicted time of the forward."""
        return sum(layer.seconds for layer in self.layers)

    @property
    def limit(self) -> Limit:
        """Return the limit of the layers that take the most time together."""
        seconds: dict[Limit, float] = defaultdict(float)
        for layer in self.layers:
            seconds[layer.limit] += layer.seconds
        return max(seconds, key=seconds.__getitem__)


def shared_out(
    rates: Rates,
    shares: Shares,
    tokens: int,
    budget: Budget,
    rest: Sequence[float] | None = None,
    trip: Trip = NO_TRIP,
) -> Sharing:
    """Return the sharing with the least predicted time for a forward of `tokens` tokens.

    `rest` has the device's seconds, by layer, for everything but its experts; the time of layers
    without experts belongs to the next one.  Without it there is nothing else.
    """
    layers = list(_layers(rates, shares, tokens, trip))
    rest = rest or [0.0] * len(layers)
    transfer = rates.expert_bytes / rates.link

    def times(choice: _Choice) -> list[LayerTime]:
        with_link = bool(choice.slots.count)
        works = [
            one.work(one.where(h, s), with_link)
            for one, h, s in zip(layers, *choice[:2], strict=True)
        ]
        return layer_times(works, rest, transfer, choice.slots)

    def seconds(choice: _Choice) -> float:
        return sum(time.seconds for time in times(choice))

    best = min(_choices(layers, rates.expert_bytes, budget, seconds), key=seconds)
    places = (one.places(h, s) for one, h, s in zip(layers, *best[:2], strict=True))
    return Sharing(tuple(places), best.slots, tuple(times(best)))


def predicted(
    rates: Rates,
    shares: Shares,
    tokens: int,
    places: Sequence[Sequence[Place]],
    slots: Slots = NO_SLOTS,
    rest: Sequence[float] | None = None,
    trip: Trip = NO_TRIP,
) -> Sharing:
    """Return what is predicted for a forward with given places; see `shared_out`."""
    works = []
    for layer, there in zip(_layers(rates, shares, tokens, trip), places, strict=True):
        at = {place: np.array([there[e] is place for e in layer.order], bool) for place in Place}
        works.append(layer.work(at, bool(slots.count)))
    rest = rest or [0.0] * len(works)
    times = layer_times(works, rest, rates.expert_bytes / rates.link, slots)
    return Sharing(tuple(map(tuple, places)), slots, tuple(times))


class _Choice(NamedTuple):
    """How many of each layer's experts are on the host, and how many are streamed."""

    host: Sequence[int]
    streamed: Sequence[int]
    slots: Slots


@dataclass(frozen=True, slots=True)
class _Layer:
    """The expected seconds of each of a layer's experts, [experts], the least used one first."""

    order: tuple[int, ...]
    host: Float64
    host_beside_link: Float64  # while the link reads the host's memory
    host_reading: Float64
    device: Float64
    unneeded: Float64  # of all rows, those that do not travel to this expert on the host
    trips: tuple[float, float]  # seconds in which all rows travel; also beside the link

    def __len__(self) -> int:
        return len(self.order)

    def added(self, on_host: int) -> float:
        """Return how much longer the layer takes with one more expert on the host."""
        before, after = (
            max(float(self.host[:i].sum()), float(self.device[i:].sum()))
            for i in (on_host, on_host + 1)
        )
        return round(after - before, 12)  # rounding must not make equal layers differ

    def hosts_total(self, on_host: int) -> float:
        """Return the host's time with one more expert there, while the link carries others."""
        return round(float(self.host_beside_link[: on_host + 1].sum()), 12)

    def host_time(self, beside_link: bool) -> Float64:
        return self.host_beside_link if beside_link else self.host

    def work(self, at: Mapping[Place, Any], beside_link: bool) -> Work:
        """Return the work of experts at these places, each a choice of them in this order."""
        host = at[Place.HOST]
        needed = 1.0 - float(self.unneeded[host].prod())
        return Work(
            float(self.host_time(beside_link)[host].sum()),
            float(self.host_reading[host].sum()),
            float(self.device[at[Place.RESIDENT]].sum()),
            self.device[at[Place.STREAMED]].tolist(),
            needed * self.trips[beside_link],
        )

    def where(self, on_host: int, streamed: int) -> Mapping[Place, slice]:
        """Return which experts are where; the least used ones are on the host."""
        resident = on_host + streamed
        return {
            Place.HOST: slice(on_host),
            Place.STREAMED: slice(on_host, resident),
            Place.RESIDENT: slice(resident, None),
        }

    def places(self, on_host: int, streamed: int) -> tuple[Place, ...]:
        counts = {Place.HOST: on_host, Place.STREAMED: streamed}
        counts[Place.RESIDENT] = len(self) - on_host - streamed
        kinds = (place for place, count in counts.items() for _ in range(count))
        there = dict(zip(self.order, kinds, strict=True))
        return tuple(there[expert] for expert in range(len(self)))


def _layers(rates: Rates, shares: Shares, tokens: int, trip: Trip) -> Iterator[_Layer]:
    alone, beside_link = (float(trip.seconds(tokens, beside_link=is_so)) for is_so in (False, True))
    for given in shares:
        share = np.asarray(given, np.float64)
        order = np.lexsort((-np.arange(len(share)), share))  # of equals the highest id first
        used, rows = _expected(share[order], tokens)
        yield _Layer(
            order=tuple(order.tolist()),
            host=used * rates.host_seconds(rows, beside_link=False),
            host_beside_link=used * rates.host_seconds(rows, beside_link=True),
            host_reading=used * rates.host.at(1.0),
            device=used * rates.device.at(rows),
            unneeded=np.zeros_like(share) if trip.is_of_all else 1.0 - share[order],
            trips=(alone, beside_link),
        )


def _expected(shares: Float64, tokens: int) -> tuple[Float64, Float64]:
    """Return how likely each expert is used in a forward, and how many rows it has if it is."""
    with np.errstate(divide="ignore"):  # every token chooses the expert
        used = -np.expm1(tokens * np.log1p(-shares))
    return used, np.divide(tokens * shares, used, out=np.ones_like(shares), where=used > 0)


def _choices(
    layers: Sequence[_Layer],
    expert_bytes: int,
    budget: Budget,
    seconds: Callable[[_Choice], float],
) -> Iterator[_Choice]:
    """Yield the best choice with nothing streamed, and the best ones with each number of slots.

    Where nothing is streamed, what counts is the sum of all layers' times.  A link that is only a
    few experts ahead would wait in a layer that takes much longer than others.
    """
    room, count = budget.device // expert_bytes, sum(map(len, layers))
    absent = max(0, count - room)
    least_added, even = (
        list(_to_the_host(layers, cost)) for cost in (_Layer.added, _Layer.hosts_total)
    )
    yield _choice(layers, least_added[:absent], 0, NO_SLOTS)
    most = count if budget.pinned is None else budget.pinned // expert_bytes
    streamable, portion = range(1, 1 + min(most, count)), budget.portion
    for moves, slots in product((least_added, even), budget.slots if absent else ()):
        yield from _streaming(layers, moves, room, streamable, slots, portion, seconds)


def _streaming(
    layers: Sequence[_Layer],
    moves: Sequence[int],
    room: int,
    streamable: range,
    count: int,
    portion: int | None,
    seconds: Callable[[_Choice], float],
) -> Iterator[_Choice]:
    """Yield the best choice with experts streamed through `count` slots, if any fit into them."""

    def slots_for(streamed: int) -> Slots:
        return Slots(count, portion or -(-streamed // len(layers)))

    def choice(streamed: int) -> _Choice:
        slots = slots_for(streamed)  # they take room as well
        absent = max(streamed, len(moves) - room + slots.size)
        return _choice(layers, moves[: absent - streamed], streamed, slots)

    def time(streamed: int) -> float:
        one = choice(streamed)
        has_room = portion is not None or max(one.streamed) <= one.slots.experts
        return seconds(one) if has_room else math.inf

    fitting = bisect_right(streamable, room, key=lambda streamed: slots_for(streamed).size)
    if fitting:
        yield choice(_least(time, 1, fitting))


def _choice(
    layers: Sequence[_Layer], on_host: Sequence[int], streamed: int, slots: Slots
) -> _Choice:
    """Return the choice with these experts on the host, and the streamed ones spread evenly.

    `on_host` has a layer for each expert there.
    """
    counts = Counter(on_host)
    host = [counts[i] for i in range(len(layers))]
    left = [len(layer) - count for layer, count in zip(layers, host, strict=True)]
    return _Choice(host, _spread(streamed, left), slots)


def _to_the_host(layers: Sequence[_Layer], cost: Callable[[_Layer, int], float]) -> Iterator[int]:
    """Yield a layer for each expert of all: one after the other, the next one goes to the host.

    It is of the layer whose `cost` is least, given how many it has there.  Where layers are alike,
    it is one that has the fewest, far from the one before: the link would wait wherever neighbours
    have many.
    """
    apart = _apart(len(layers))

    def key(layer: int, taken: int) -> tuple[float, int, float, int]:
        return cost(layers[layer], taken), taken, apart[layer], layer

    heap = [key(i, 0) for i, layer in enumerate(layers) if len(layer)]
    heapq.heapify(heap)
    while heap:
        _, taken, _, layer = heapq.heappop(heap)
        yield layer
        if taken + 1 < len(layers[layer]):
            heapq.heappush(heap, key(layer, taken + 1))


def _spread(count: int, room: Sequence[int]) -> list[int]:
    """Return how many of `count` each layer takes: the same number wherever there is room."""
    taken, apart = [0] * len(room), _apart(len(room))
    for done, layer in enumerate(sorted(range(len(room)), key=lambda i: (room[i], apart[i]))):
        taken[layer] = min(room[layer], count // (len(room) - done))
        count -= taken[layer]
    return taken


def _apart(layers: int) -> list[float]:
    """Return a number for each layer: in their order, the first few layers are far apart."""
    return [i * GOLDEN % 1.0 for i in range(layers)]


def _least(seconds: Callable[[int], float], first: int, last: int) -> int:
    """Return the number in [first, last] with the least seconds, which fall and then rise."""
    while True:
        step = -(-(last - first + 1) // GRID)
        best = min(range(first, last + 1, step), key=seconds)
        if step == 1:
            return best
        first, last = max(first, best - step), min(last, best + step)
