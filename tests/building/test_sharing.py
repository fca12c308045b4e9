"""Where experts go: predictions by hand, a search of all placements, any load and budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2kit.building.curves import Curve
from lfm2kit.building.overlap import Limit, Slots
from lfm2kit.building.rates import Rates
from lfm2kit.building.sharing import Budget, Place, Sharing, Trip, predicted, shared_out

EXPERT = 3 * 2048 * 1792 * 4  # bytes in fp32
FLOPS = 6 * 2048 * 1792  # of a row
UNIFORM = [[4 / 32] * 32] * 22  # an 8B model, whose router chooses 4 of 32 experts
RESIDENT = 20 * 22  # of them fit


def curve(flops: float, read: float) -> Curve:
    """Return the times with `read` bytes and `flops` operations per second."""
    knee = int(EXPERT / read * flops / FLOPS)
    rows = sorted({1, 16, 64, 128, 256, 1024, knee, knee + 1})
    return Curve(tuple(rows), tuple(max(EXPERT / read, n * FLOPS / flops) for n in rows))


def rates(flops: float = 1.8e12, read: float = 100e9, link: float = 46e9) -> Rates:
    return Rates(EXPERT, curve(flops, read), curve(54e12, 4.3e12), link)


def count(sharing: Sharing) -> Counter[Place]:
    return Counter(place for layer in sharing.places for place in layer)


def per_second(samples: int, rates: Rates, slots: tuple[int, ...]) -> float:
    room = Budget((RESIDENT + max(slots, default=0)) * EXPERT, slots=slots)
    return samples / shared_out(rates, UNIFORM, 16 * samples, room).seconds


# Samples per second that were predicted by hand, for 24 GB.
@pytest.mark.parametrize(
    ("samples", "both", "streamed", "on_host", "slower_host"),
    [(16, 200, 67, 137, 148), (64, 410, 267, 155, 362), (128, 660, 533, 156, 620)],
)
def test_the_model_gives_what_was_predicted_by_hand(
    samples: int, both: float, streamed: float, on_host: float, slower_host: float
) -> None:
    assert per_second(samples, rates(), (6,)) == pytest.approx(both, rel=0.02)
    assert per_second(samples, rates(flops=1e6), (6,)) == pytest.approx(streamed, rel=0.06)
    assert per_second(samples, rates(), ()) == pytest.approx(on_host, rel=0.02)
    assert per_second(samples, rates(1.2e12, 60e9), (6,)) == pytest.approx(slower_host, rel=0.03)


def test_more_than_two_slots_are_taken_where_they_gain_more_than_residents() -> None:
    room = Budget(RESIDENT * EXPERT)
    chosen = shared_out(rates(), UNIFORM, 2048, room)
    assert chosen.slots.count > 2
    two = shared_out(rates(), UNIFORM, 2048, Budget(RESIDENT * EXPERT, slots=(2,)))
    assert chosen.seconds < two.seconds


@pytest.mark.parametrize(
    ("tokens", "room", "limit"),
    [
        (256, Budget(RESIDENT * EXPERT, slots=()), Limit.HOST_MEMORY),
        (2048, Budget(RESIDENT * EXPERT, slots=()), Limit.HOST_COMPUTE),
        (2048, Budget(RESIDENT * EXPERT, pinned=10 * EXPERT), Limit.HOST_COMPUTE),
        (2048, Budget(32 * 22 * EXPERT), Limit.DEVICE),
    ],
)
def test_it_says_what_limits(tokens: int, room: Budget, limit: Limit) -> None:
    assert shared_out(rates(), UNIFORM, tokens, room).limit is limit


def test_a_slow_host_leaves_the_link_as_the_limit() -> None:
    room = Budget(RESIDENT * EXPERT)
    assert shared_out(rates(flops=1e6), UNIFORM, 2048, room).limit is Limit.LINK


def test_where_all_fit_nothing_is_streamed_and_no_slot_is_taken() -> None:
    sharing = shared_out(rates(), UNIFORM, 2048, Budget(32 * 22 * EXPERT))
    assert (count(sharing), sharing.slots) == ({Place.RESIDENT: 704}, Slots(0, 0))


def test_without_any_room_all_are_on_the_host() -> None:
    assert count(shared_out(rates(), UNIFORM, 256, Budget(EXPERT - 1))) == {Place.HOST: 704}


def test_the_ids_in_one_place_are_given_layer_by_layer() -> None:
    places = [[Place.HOST, Place.RESIDENT, Place.HOST], [Place.STREAMED]]
    sharing = predicted(rates(), [[0.5] * 3, [1.0]], 16, places, Slots(2, 1))
    assert sharing.at(0, Place.HOST) == (0, 2)
    assert sharing.at(0, Place.STREAMED) == ()
    assert sharing.at(1, Place.STREAMED) == (0,)


def test_a_token_at_a_time_is_computed_where_it_is_read_fastest() -> None:
    """A streamed expert is copied in every forward, one on the host is read only if it is used."""
    sharing = shared_out(rates(), UNIFORM, 1, Budget(RESIDENT * EXPERT))
    assert count(sharing)[Place.STREAMED] <= 22
    used = 12 * 4 / 32 * EXPERT / 100e9  # of 12 absent experts of a layer
    assert sharing.seconds == pytest.approx(22 * used, rel=0.15)


def test_a_slot_may_have_room_for_all_that_a_layer_streams() -> None:
    """Then two are enough for a link that never waits, but they take more memory."""
    room = Budget(RESIDENT * EXPERT, slots=(2,), portion=None)
    layerwise = shared_out(rates(), UNIFORM, 1024, room)
    most = max(layer.count(Place.STREAMED) for layer in layerwise.places)
    assert layerwise.slots == Slots(2, most)
    assert count(layerwise)[Place.RESIDENT] == RESIDENT - 2 * most
    one_by_one = shared_out(rates(), UNIFORM, 1024, Budget(RESIDENT * EXPERT))
    assert layerwise.seconds == pytest.approx(one_by_one.seconds, rel=0.05)


def test_what_the_rest_of_a_layer_takes_is_time_for_the_link() -> None:
    room, rest = Budget(RESIDENT * EXPERT), [2e-3] * 22
    alone = shared_out(rates(), UNIFORM, 2048, room)
    beside = shared_out(rates(), UNIFORM, 2048, room, rest)
    assert alone.seconds < beside.seconds < alone.seconds + sum(rest)
    assert count(beside)[Place.STREAMED] > count(alone)[Place.STREAMED]


PLACES = [[Place.HOST, Place.RESIDENT], [Place.RESIDENT] * 2, [Place.HOST] * 2]
LOADS = [[0.5] * 2] * 3


def test_only_rows_that_an_expert_of_the_host_needs_take_time_to_travel() -> None:
    """One half of the tokens choose the one expert of the first layer, 3/4 one of two."""
    plain = predicted(rates(), LOADS, 1024, PLACES)
    with_trips = predicted(rates(), LOADS, 1024, PLACES, trip=Trip(1e-6, 3e-6))
    assert with_trips.seconds == pytest.approx(plain.seconds + 1024 * 4e-6 * (1 / 2 + 3 / 4))


def test_all_rows_travel_from_a_memory_that_cannot_pick_some() -> None:
    plain = predicted(rates(), LOADS, 1024, PLACES)
    with_trips = predicted(rates(), LOADS, 1024, PLACES, trip=Trip(1e-6, 3e-6, is_of_all=True))
    assert with_trips.seconds == pytest.approx(plain.seconds + 1024 * 4e-6 * 2)


def test_what_comes_back_shares_the_link_with_streamed_experts() -> None:
    slots = Slots(2, 1)
    plain = predicted(rates(), LOADS, 1024, PLACES, slots)
    with_trips = predicted(rates(), LOADS, 1024, PLACES, slots, trip=Trip(1e-6, 3e-6))
    assert with_trips.seconds == pytest.approx(plain.seconds + 1024 * 7e-6 * (1 / 2 + 3 / 4))


def test_trips_leave_the_host_fewer_experts() -> None:
    room = Budget(RESIDENT * EXPERT)
    trips = Trip(), Trip(1e-6, 1e-6)
    plain, far = (shared_out(rates(), UNIFORM, 1024, room, trip=trip) for trip in trips)
    assert count(far)[Place.HOST] < count(plain)[Place.HOST]


def test_the_link_takes_its_part_of_the_hosts_memory() -> None:
    """A host that reads 100 GB/s is left 50 while the link carries 60, and all of it otherwise."""
    slow = replace(rates(link=60e9), host_expert_bytes=EXPERT, host_memory=100e9)
    assert slow.host_seconds(1.0, beside_link=True) == pytest.approx(EXPERT / 50e9)
    assert slow.host_seconds(1.0, beside_link=False) == pytest.approx(EXPERT / 100e9)
    assert slow.host_seconds(1e3, beside_link=True) == slow.host_seconds(1e3, beside_link=False)
    places = [[Place.HOST, Place.STREAMED]]
    both = predicted(slow, [[1.0, 1.0]], 1, places, Slots(1, 1))
    alone = predicted(slow, [[1.0, 1.0]], 1, [[Place.HOST, Place.RESIDENT]])
    assert both.seconds == pytest.approx(2 * alone.seconds)


def test_layers_take_about_as_long_where_the_link_is_only_a_few_experts_ahead() -> None:
    """Half of the layers have experts that hardly anyone uses; the others' go to the host, too."""
    cold = [0.001] * 8 + [3.992 / 24] * 24
    loads = [cold if i % 2 else UNIFORM[0] for i in range(22)]
    room = Budget((RESIDENT - 8) * EXPERT, slots=(4,))
    sharing = shared_out(rates(), loads, 1024, room)
    seconds = [layer.seconds for layer in sharing.layers[1:]]  # before the first, the link is ahead
    assert max(seconds) < 1.6 * min(seconds)


def test_the_most_used_experts_are_resident_and_the_least_used_on_the_host() -> None:
    rng = np.random.default_rng(0)
    load = rng.dirichlet(np.full(32, 0.5), 22) * 4
    load = np.minimum(load, 1.0)
    sharing = shared_out(rates(), load.tolist(), 1024, Budget(RESIDENT * EXPERT))
    for shares, places in zip(load, sharing.places, strict=True):
        ranks = {Place.HOST: 0, Place.STREAMED: 1, Place.RESIDENT: 2}
        by_share = [ranks[places[e]] for e in np.argsort(shares, kind="stable")]
        assert by_share == sorted(by_share)
    assert sharing.seconds < shared_out(rates(), UNIFORM, 1024, Budget(RESIDENT * EXPERT)).seconds


LAYERS, EXPERTS = 2, 3


def best_of_all(
    rates: Rates, load: Sequence[Sequence[float]], tokens: int, room: int, slots: int
) -> float:
    """Return the least predicted time of all placements that fit."""
    found = []
    for places in product(Place, repeat=LAYERS * EXPERTS):
        streamed = Place.STREAMED in places
        if places.count(Place.RESIDENT) + streamed * slots <= room:
            rows = [places[:EXPERTS], places[EXPERTS:]]
            found.append(predicted(rates, load, tokens, rows, Slots(slots, 1)).seconds)
    return min(found)


def test_hardly_any_placement_of_a_small_model_is_better() -> None:
    """Two layers are the hardest: the link can be ahead only once."""
    rng = np.random.default_rng(1)
    ratios = []
    for _ in range(40):
        load = rng.choice([0.0, 1.0, 0.5, 0.1, 0.01, 0.001], (LAYERS, EXPERTS)).tolist()
        tokens, room = int(2 ** rng.uniform(0, 12)), int(rng.integers(0, 7))
        machine = rates(link=10 ** rng.uniform(9, 11))
        chosen = shared_out(machine, load, tokens, Budget(room * EXPERT, slots=(2,))).seconds
        best = best_of_all(machine, load, tokens, room, 2)
        ratios.append(chosen / best if best else 1.0)
    assert min(ratios) > 1 - 1e-9
    assert np.median(ratios) < 1.001
    assert max(ratios) < 1.2


@pytest.mark.parametrize("spread", [0.5, 1, 4, 100])
@pytest.mark.parametrize("tokens", [16, 256, 1024])
def test_the_time_is_near_what_link_and_host_need_at_least(tokens: int, spread: float) -> None:
    """As if neither ever waited for the other: absent experts are sent, or computed at least."""
    load = np.random.default_rng(0).dirichlet(np.full(32, spread), 22) * 4
    load = np.minimum(load, 1.0)
    used = 1 - (1 - load) ** tokens
    on_host = np.sort((used * rates().host.at(tokens * load / used)).ravel())
    absent = 22 * 32 - RESIDENT
    least = min(
        max((absent - count) * EXPERT / 46e9, on_host[:count].sum()) for count in range(absent)
    )
    sharing = shared_out(rates(), load.tolist(), tokens, Budget(RESIDENT * EXPERT))
    assert least < sharing.seconds < 1.12 * least


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(0.0, 1.0), max_size=8), min_size=1, max_size=6),
    st.integers(1, 4096),
    st.integers(0, 50),
    st.none() | st.integers(0, 10),
    st.none() | st.integers(1, 3),
)
def test_any_load_is_shared_out_within_the_budget(
    load: list[list[float]], tokens: int, room: int, pinned: int | None, portion: int | None
) -> None:
    pinned_bytes = None if pinned is None else pinned * EXPERT
    budget = Budget(room * EXPERT, pinned_bytes, portion=portion)
    sharing = shared_out(rates(), load, tokens, budget)
    counts = count(sharing)
    assert [len(layer) for layer in sharing.places] == [len(layer) for layer in load]
    assert counts[Place.RESIDENT] + sharing.slots.count * sharing.slots.experts <= room
    largest = max(layer.count(Place.STREAMED) for layer in sharing.places)
    assert portion is not None or largest <= sharing.slots.experts
    assert counts[Place.STREAMED] <= (1000 if pinned is None else pinned)
    again = predicted(rates(), load, tokens, sharing.places, sharing.slots)
    assert again.seconds == pytest.approx(sharing.seconds)
