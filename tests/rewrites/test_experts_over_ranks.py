"""Expert parallelism in one process: the bits of one rank, in any memory, wherever experts are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.backend import HOST, Batch, Block, Memory, Spec
from lfm2kit.errors import Lfm2kitError
from lfm2kit.exchange_round import Buffers
from lfm2kit.formats import BF16, F16, F32, PLAIN, Format
from lfm2kit.host_exchange import HostExchange, scratch_bytes
from lfm2kit.memory import Array
from lfm2kit.model import LFM2, Forward, RoutedExperts
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.rewrites import built_in
from lfm2kit.rewrites.experts_over_ranks import (
    ExpertParallelMoe,
    OwnersOf,
    experts_over_ranks,
    parallel_moe,
)
from lfm2kit.rewrites.trim import TRIM, TrimmedLayer
from lfm2kit.testing import ThreadTransport, check_exchange, run_ranks
from lfm2kit.transport import ExchangeOffer, Owners, Rows, Traffic, World, held_once, share
from tests.core.rounding import RoundingBackend, Silent
from tests.core.small import build, random_weights, small_spec
from tests.core.test_model import Box, DeviceBackend, FusingBackend, Recorded

SEQUENCES = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7], [9, 3], [2]]


def share_of(rank: int, size: int) -> Batch:
    """Return a rank's sequences; with three ranks or more, the last rank has none."""
    givers = max(1, size - (size > 2))
    return Batch.of_sequences(SEQUENCES[rank::givers] if rank < givers else [])


def alone(spec: specs.Model, size: int) -> list[Any]:
    """Return the logits of each rank's sequences, from one process."""
    model = build(spec)
    return [model.logits(share_of(rank, size)).copy() for rank in range(size)]


def over_ranks(transport: ThreadTransport, owners_of: OwnersOf | None = None) -> Any:
    return experts_over_ranks(transport.world, transport, owners_of)


def assert_same_bits(spec: specs.Model, size: int, owners_of: OwnersOf | None = None) -> None:
    def rank(transport: ThreadTransport) -> Any:
        model = build(spec, rewrites=[over_ranks(transport, owners_of)])
        return model.logits(share_of(transport.world.rank, size)).copy()

    for there, expected in zip(run_ranks(size, rank), alone(spec, size), strict=True):
        assert np.array_equal(there, expected)


@pytest.mark.parametrize(("size", "experts"), [(1, 5), (2, 5), (3, 33), (4, 12), (8, 12)])
def test_every_rank_gets_the_bits_that_one_process_gives(size: int, experts: int) -> None:
    assert_same_bits(small_spec(num_experts=experts), size)


def test_more_ranks_than_experts_leave_one_without_any() -> None:
    assert [len(e) for e in shares(3, 4)] == [0, 1, 1, 1]
    assert_same_bits(small_spec(num_experts=3, num_experts_per_tok=2), 4)


OWNERS: dict[str, Owners] = {
    "scattered": held_once([1, 0, 2, 1, 0], 3),
    "all on one rank": held_once([2] * 5, 3),
    "none on one rank": held_once([2, 0, 0, 0, 0], 3),
    "one on all ranks": ((0, 0, 1, 2, 2), (0, 1, 1, 2, 2), (0, 2, 1, 2, 2)),
    "two on two of three ranks": ((0, 2, 1, 0, 0), (0, 1, 1, 0, 0), (0, 2, 2, 0, 0)),
    "all on all ranks": ((0,) * 5, (1,) * 5, (2,) * 5),
    "each rank asks the next": ((1,) * 5, (2,) * 5, (0,) * 5),
}


@pytest.mark.parametrize("name", OWNERS)
def test_experts_may_be_on_any_rank_and_on_several(name: str) -> None:
    assert_same_bits(small_spec(), 3, lambda layer, num_experts: OWNERS[name])


def test_each_layer_may_have_owners_of_its_own() -> None:
    owners = {2: OWNERS["scattered"], 3: OWNERS["one on all ranks"]}
    assert_same_bits(small_spec(), 3, lambda layer, num_experts: owners[layer])


def test_a_rank_holds_what_it_computes_for_any_rank() -> None:
    moe = small_spec().layers[3]
    assert isinstance(moe, specs.Layer)
    assert isinstance(moe.feed_forward, specs.SparseMoe)
    owners = OWNERS["two on two of three ranks"]
    held = [parallel_moe(moe.feed_forward, r, owners).experts.local_experts for r in range(3)]
    assert held == [(0, 3, 4), (1, 2), (1, 2)]


def shares(num_experts: int, size: int) -> list[list[int]]:
    """Return the experts that each rank holds if they are shared out evenly."""
    spec = small_spec(num_experts=num_experts, num_experts_per_tok=2)
    moes = [parallel(spec, World(rank, size)) for rank in range(size)]
    return [list(moe.experts.local_experts) for moe in moes]


def parallel(spec: specs.Model, world: World) -> ExpertParallelMoe:
    layer = experts_over_ranks(world, None).apply(spec).layers[3]
    assert isinstance(layer, specs.Layer)
    assert isinstance(layer.feed_forward, ExpertParallelMoe)
    return layer.feed_forward


def test_every_expert_is_held_once_and_shares_differ_by_one_at_most() -> None:
    assert shares(5, 2) == [[0, 1], [2, 3, 4]]
    for size in (1, 2, 3, 7):
        held = shares(12, size)
        assert sorted(e for mine in held for e in mine) == list(range(12))
        assert max(map(len, held)) - min(map(len, held)) <= 1
        assert held == [list(share(12, size, rank)) for rank in range(size)]


def test_a_rank_reads_its_own_experts_and_all_other_weights() -> None:
    spec = small_spec()
    names = [set(experts_over_ranks(World(r, 2), None).apply(spec).parameters()) for r in (0, 1)]
    assert names[0] | names[1] == set(spec.parameters())
    both = names[0] & names[1]
    assert not any(".experts." in name for name in both)
    assert both == {name for name in spec.parameters() if ".experts." not in name}


def test_a_rank_says_which_experts_it_holds() -> None:
    def note(*owners: int, rank: int) -> str | None:
        held = held_once(owners, 3)
        rewrite = experts_over_ranks(World(rank, 3), None, lambda layer, num_experts: held)
        layer = rewrite.apply(small_spec()).layers[3]
        assert isinstance(layer, specs.Layer)
        return layer.feed_forward.note()

    assert note(0, 0, 0, 1, 0, rank=0) == "this rank holds experts 0-2, 4 of 5"
    assert note(0, 0, 0, 1, 0, rank=1) == "this rank holds expert 3 of 5"
    assert note(0, 0, 0, 1, 0, rank=2) == "this rank holds no experts of 5"


@pytest.mark.parametrize("order", [1, -1], ids=["trim first", "trim last"])
def test_trimmed_layers_have_their_experts_over_ranks_too(order: int) -> None:
    spec = small_spec()

    def rank(transport: ThreadTransport) -> Any:
        rewrites = [TRIM, over_ranks(transport)][::order]
        model = build(spec, rewrites=rewrites)
        last = model.spec.layers[-1]
        assert isinstance(last, TrimmedLayer)
        assert isinstance(last.layer.feed_forward, ExpertParallelMoe)
        return model.logits(share_of(transport.world.rank, 3)).copy()

    for there, expected in zip(run_ranks(3, rank), alone(spec, 3), strict=True):
        assert np.array_equal(there, expected)


def test_ids_of_nobody_are_not_sent_and_add_nothing() -> None:
    """They come from a router in rows that pad a batch; the weight beside them may be anything."""
    moe = small_spec().layers[3]
    assert isinstance(moe, specs.Layer)
    assert isinstance(moe.feed_forward, specs.SparseMoe)
    moe, weights, backend = moe.feed_forward, random_weights(moe.feed_forward), ReferenceBackend()
    router = backend.build(moe.router, weights)

    def masked(x: Any) -> Any:
        ids, weights = router(x)
        ids[1::3, 1:], weights[1::3, 1:] = -1, np.nan
        ids[2::3], weights[2::3] = -1, np.nan
        return ids, weights

    def rank(transport: ThreadTransport) -> None:
        spec = parallel(small_spec(), transport.world)
        join = over_ranks(transport).joins[ExpertParallelMoe](HOST)
        experts = backend.build(spec.experts, weights)
        block = join.make(spec, router=masked, experts=experts)
        x = np.random.default_rng(transport.world.rank).normal(size=(7, 24)).astype(np.float32)
        delta, whole = block(x), RoutedExperts(moe, router, backend.build(moe.experts, weights))(x)
        assert np.array_equal(delta[::3], whole[::3])
        ids, first = router(x)
        one = backend.build(moe.experts, weights)(x, ids[:, :1], first[:, :1])
        assert np.array_equal(delta[1::3], one[1::3])
        assert delta[2::3].tobytes() == bytes(delta[2::3].nbytes), "+0 where nobody is asked"

    run_ranks(2, rank)


class DeviceExchange:
    """An exchange of boxed arrays, which are not unboxed for the host, with padding.

    Every rank gets all pairs of all ranks, and those that are not for it have the id -1.
    """

    def __init__(self, transport: ThreadTransport, traffic: Traffic) -> None:
        self.transport = transport
        self.owners = np.array([[*owners, -1] for owners in traffic.owners])  # of the id -1: nobody
        self.expert_ids: Any = None

    def dispatch(self, x: Array, expert_ids: Array, expert_weights: Array) -> Rows:
        ids, rank = expert_ids.values, self.transport.world.rank
        self.expert_ids = ids
        repeated = np.repeat(x.values, ids.shape[1], axis=0)
        owners = self.owners[rank, ids].ravel()
        pairs = repeated, ids.ravel(), expert_weights.values.ravel(), owners
        everyones = zip(*self.transport.everyones(pairs), strict=True)
        x, ids, weights, owners = map(np.concatenate, everyones)
        ids = np.where(owners == rank, ids, -1).astype(np.int32)
        return Rows(Box(x), Box(ids[:, None]), Box(weights[:, None]))

    def combine(self, products: Array) -> Array:
        rank, tokens, k = self.transport.world.rank, *self.expert_ids.shape
        everyones = self.transport.everyones((products.values, tokens * k))
        start = sum(pairs for _, pairs in everyones[:rank])
        by_owner = np.stack([p[start : start + tokens * k] for p, _ in everyones])
        owner = self.owners[rank, self.expert_ids.ravel()]
        mine = by_owner[owner, np.arange(tokens * k)]
        mine[owner < 0] = -0.0  # changes no number that it is added to
        mine = mine.reshape(tokens, k, mine.shape[1])
        delta = mine[:, 0].copy()
        for column in range(1, k):
            delta += mine[:, column]
        delta[(self.expert_ids < 0).all(axis=1)] = 0
        self.transport.barrier()  # until all have read it, a rank's products stay
        return Box(delta)


class DeviceTransport(ThreadTransport):
    """A transport whose tokens go from device to device."""

    is_capturable = False

    def exchange_in(self, memory: Memory) -> ExchangeOffer | None:
        if memory.name != "elsewhere":
            return None
        return ExchangeOffer(memory, partial(DeviceExchange, self), self.is_capturable)


class CapturableTransport(DeviceTransport):
    is_capturable = True


class Padded(DeviceBackend):
    """A backend whose experts leave NaN in the rows of padding, which may hold anything."""

    def build(self, spec: Spec, weights: Any) -> Block:
        block = super().build(spec, weights)
        return partial(_skipping_padding, block) if isinstance(spec, specs.Experts) else block


def _skipping_padding(block: Block, x: Any, ids: Any, weights: Any) -> Any:
    taken = ids.values[:, 0] >= 0
    products = np.full(x.values.shape, np.nan, np.float32)
    products[taken] = block(*(Box(a.values[taken]) for a in (x, ids, weights))).values
    return Box(products)


def test_the_exchange_of_the_device_keeps_the_contract() -> None:
    def rank(transport: ThreadTransport) -> None:
        check_exchange(transport, DeviceBackend().there)

    run_ranks(3, rank, make=DeviceTransport)


@pytest.mark.parametrize("size", [2, 3])
def test_with_an_exchange_of_the_device_nothing_crosses_to_the_host(size: int) -> None:
    spec = small_spec()

    def rank(transport: ThreadTransport) -> Any:
        backend = Padded()
        rewrites = [over_ranks(transport)]
        model = build(spec, "device", {"device": backend}, rewrites=rewrites)
        assert model.placed.copies() == 0
        built = backend.there.crossings
        logits = model.logits(share_of(transport.world.rank, size)).copy()
        arrays_of_a_batch = 5
        assert backend.there.crossings - built == arrays_of_a_batch + 1
        return logits

    there = run_ranks(size, rank, make=DeviceTransport)
    for mine, expected in zip(there, alone(spec, size), strict=True):
        assert np.array_equal(mine, expected)


def test_without_one_tokens_are_exchanged_in_the_hosts_memory() -> None:
    spec = small_spec()

    def rank(transport: ThreadTransport) -> Any:
        rewrites = [over_ranks(transport)]
        model = build(spec, "device", {"device": DeviceBackend()}, rewrites=rewrites)
        assert model.placed.copies() == 6  # two layers: around each, and their routers and experts
        return model.logits(share_of(transport.world.rank, 2)).copy()

    for mine, expected in zip(run_ranks(2, rank), alone(spec, 2), strict=True):
        assert np.array_equal(mine, expected)


@pytest.mark.parametrize(
    ("transport", "captures"), [(DeviceTransport, 0), (CapturableTransport, 1)]
)
def test_a_forward_is_captured_only_with_an_exchange_that_can_be(
    transport: Any, captures: int
) -> None:
    class Capturing(Padded):
        captures = 0

        def capture(self, step: Callable[[Batch], Any], batch: Batch) -> Recorded:
            self.captures += 1
            return Recorded(lambda batch: step(batch.on(self.there)), 1, [0])

    def rank(transport: ThreadTransport) -> int:
        backend, rewrites = Capturing(), [over_ranks(transport)]
        model = build(small_spec(), "device", {"device": backend}, rewrites=rewrites)
        for _ in range(3):
            model.logits(share_of(transport.world.rank, 2))
        return backend.captures

    assert run_ranks(2, rank, make=transport) == [captures, captures]


@pytest.mark.parametrize(("fused", "count"), [(specs.Layer, 2), (specs.Model, 0)])
def test_a_backend_that_builds_layers_whole_gets_none_with_experts_elsewhere(
    fused: type[Spec], count: int
) -> None:
    """It may not have looked at what is inside, and would compute with its own experts alone."""
    spec = small_spec()

    def rank(transport: ThreadTransport) -> Any:
        backend = FusingBackend(fused, Forward)
        model = build(spec, "fusing", {"fusing": backend}, rewrites=[over_ranks(transport)])
        assert backend.made == count
        return model.logits(share_of(transport.world.rank, 2)).copy()

    for mine, expected in zip(run_ranks(2, rank), alone(spec, 2), strict=True):
        assert np.array_equal(mine, expected)


def test_a_failing_block_on_one_rank_ends_all_of_them() -> None:
    def rank(transport: ThreadTransport) -> Any:
        def wrap(name: str, spec: Spec, block: Block) -> Block:
            def fails(*inputs: Any) -> Any:
                raise RuntimeError("no more memory")

            is_here = transport.world.rank == 2 and name == "layers.3.feed_forward.experts"
            return fails if is_here else block

        model = build(small_spec(), rewrites=[over_ranks(transport)], wrap=wrap)
        return model.logits(share_of(transport.world.rank, 3))

    with pytest.raises(RuntimeError, match="no more memory") as raised:
        run_ranks(3, rank)
    assert raised.value.__notes__ == ["on rank 2 of 3"]


def test_a_rank_that_is_only_planned_cannot_be_built() -> None:
    rewrite = experts_over_ranks(World(1, 4), None)
    with pytest.raises(Lfm2kitError, match="a plan of one rank's share of the model"):
        build(small_spec(), rewrites=[rewrite])


def test_a_process_alone_has_nothing_to_share() -> None:
    assert [r.name for r in built_in(World(), None)] == ["trim"]
    assert [r.name for r in built_in(World(1, 2), None)] == ["trim", "experts-over-ranks"]


def rounding(backend: RoundingBackend, **more: Any) -> LFM2:
    """Return a small model whose experts round what they read."""
    return build(small_spec(), "rounding", {"rounding": backend}, **more)


def logits_over_ranks(backends: Sequence[RoundingBackend], make: Any = ThreadTransport) -> Any:
    """Return the logits of each rank's sequences, with a backend for each rank."""

    def rank(transport: ThreadTransport) -> Any:
        number, size = transport.world.rank, transport.world.size
        model = rounding(backends[number], rewrites=[over_ranks(transport)])
        return model.logits(share_of(number, size)).copy()

    return run_ranks(len(backends), rank, make=make)


def assert_alone_has_these(everyones: Any, row_format: Format) -> None:
    model = rounding(RoundingBackend(row_format))
    for number, mine in enumerate(everyones):
        assert np.array_equal(mine, model.logits(share_of(number, len(everyones))))


@pytest.mark.parametrize("row_format", [BF16, F16], ids=str)
def test_experts_that_read_16_bits_get_them_and_give_the_bits_of_one_process(
    row_format: Format,
) -> None:
    backends = [RoundingBackend(row_format) for _ in range(3)]
    assert_alone_has_these(logits_over_ranks(backends), row_format)
    assert [backend.types for backend in backends] == [{row_format.block}] * 3


@pytest.mark.parametrize("size", [2, 3])
def test_an_exchange_that_knows_nothing_of_16_bits_gives_their_experts_float32(size: int) -> None:
    class Rounding(ThreadTransport):
        def exchange_in(self, memory: Memory) -> ExchangeOffer | None:
            buffers = Buffers()
            return ExchangeOffer(
                memory,
                lambda traffic: HostExchange(self, traffic._replace(row_format=F32), buffers),
            )

    backends = [RoundingBackend(BF16) for _ in range(size)]
    assert_alone_has_these(logits_over_ranks(backends, Rounding), BF16)
    assert [backend.types for backend in backends] == [{F32.block}] * size


def test_experts_that_say_nothing_get_float32() -> None:
    backends = [Silent(F16) for _ in range(2)]
    assert_alone_has_these(logits_over_ranks(backends), F16)
    assert [backend.types for backend in backends] == [{F32.block}] * 2


def test_ranks_whose_experts_read_rows_in_different_formats_send_float32() -> None:
    """As where one of them splits its experts between memories."""
    backends = [RoundingBackend(BF16), Silent(BF16), RoundingBackend(BF16)]
    assert_alone_has_these(logits_over_ranks(backends), BF16)
    assert [backend.types for backend in backends] == [{F32.block}] * 3


@pytest.mark.parametrize("number", [0, 1])
def test_what_a_planned_exchange_takes_follows_from_the_format(number: int) -> None:
    spec = experts_over_ranks(World(number, 2), None).apply(small_spec())
    layer = spec.layers[3]
    assert isinstance(layer, specs.Layer)
    moe = layer.feed_forward
    assert isinstance(moe, ExpertParallelMoe)

    def planned(row_format: Format) -> int:
        rewrite = experts_over_ranks(World(number, 2), None)
        join = rewrite.joins[ExpertParallelMoe](HOST)
        assert join.reading is not None
        there = join.reading({"router": F32, "experts": row_format})
        return there.exchange_bytes(moe, 100)

    for row_format in PLAIN:
        assert planned(row_format) == scratch_bytes(number, moe.traffic(row_format), 100)
    assert planned(BF16) == planned(F16) < planned(F32)


def test_a_format_that_no_rows_have_is_named_with_its_backend() -> None:
    said = r"row_format of backend 'rounding' returned Format\(.* return F32, BF16 or F16"
    odd = Format("Q4_0", 32, np.dtype("V18"), lambda data: data)
    with pytest.raises(Lfm2kitError, match=said):
        rounding(RoundingBackend(odd), rewrites=[experts_over_ranks(World(0, 2), None)])


def test_models_without_experts_stay_as_they_are() -> None:
    dense = small_spec(num_dense_layers=4)
    assert experts_over_ranks(World(0, 2), None).apply(dense) is dense
