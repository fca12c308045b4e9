"""Expert parallelism: every rank holds a share of each layer's experts; tokens travel to them.

An `ExpertParallelMoe` takes the place of every `SparseMoe`.  The core joins it of a router and
experts, which know nothing of other ranks, and of an exchange, which moves tokens between ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NoReturn

from lfm2kit.backend import Array, Block
from lfm2kit.building.joins import Join
from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import F32, PLAIN, Format
from lfm2kit.host_exchange import AUTO, offered, scratch_bytes
from lfm2kit.memory import HOST, Memory
from lfm2kit.overlapped import OFF, Overlap
from lfm2kit.rewrites import ids_in_words
from lfm2kit.rewrites.rewrite import Rewrite, replaced
from lfm2kit.specs import Experts, Model, Part, Router, SparseMoe, Spec, leaves
from lfm2kit.transport import (
    Exchange,
    ExchangeOffer,
    Owners,
    Traffic,
    Transport,
    World,
    evenly,
    everyones,
    held_by,
    held_once,
)

OwnersOf = Callable[[int, int], Owners]  # of a layer's number, and how many experts it has


@dataclass(frozen=True, slots=True)
class ExpertParallelMoe(Spec):
    """(x) -> delta, as `SparseMoe`, with `experts.local_experts` on this rank, the rest on others.

    x and delta [tokens, hidden_size] are this rank's own tokens, in the exchange's memory.  Every
    rank calls its block the same number of times, with no tokens if need be.
    """

    router: Router
    experts: Experts
    owners: Owners  # [ranks][num_experts], see `lfm2kit.transport`
    kind: ClassVar[str] = "moe"

    def parts(self) -> tuple[Part, ...]:
        return Part("router", "", self.router), Part("experts", "", self.experts)

    def traffic(self, row_format: Format) -> Traffic:
        """Return what travels if the experts read rows in this format."""
        experts = self.experts
        return Traffic(experts.hidden_size, experts.num_experts_per_tok, self.owners, row_format)

    def note(self) -> str:
        held = ids_in_words.experts(self.experts.local_experts)
        return f"this rank holds {held} of {self.experts.num_experts}"


def experts_over_ranks(
    world: World,
    transport: Transport | None,
    owners_of: OwnersOf | None = None,
    exchange: str = AUTO,
) -> Rewrite:
    """Return the rewrite for rank `world.rank`: all of the model, but only its own experts.

    In a job of several groups, world and transport are those of the rank's group.
    Without `owners_of`, consecutive experts are shared out evenly.  Without a transport the model
    can be planned, but not built.  `exchange` says where tokens may travel.
    """

    def parallel(number: int, spec: Spec) -> Spec:
        if not isinstance(spec, SparseMoe):
            return spec
        owners = _shared_out(spec.experts.num_experts, world.size, number, owners_of)
        return parallel_moe(spec, world.rank, owners)

    def apply(model: Model) -> Model:
        layers = tuple(replaced(one, partial(parallel, i)) for i, one in enumerate(model.layers))
        return model if layers == model.layers else replace(model, layers=layers)

    return Rewrite(
        name="experts-over-ranks",
        summary="Share out each layer's experts over the ranks of a job.",
        apply=apply,
        joins={ExpertParallelMoe: partial(_join, _Offers(transport, world.rank, exchange))},
        is_automatic=True,
    )


def parallel_moe(moe: SparseMoe, rank: int, owners: Owners) -> ExpertParallelMoe:
    """Return the share of `rank`: the router, and the experts that it computes for any rank."""
    experts = replace(moe.experts, local_experts=held_by(rank, owners))
    return ExpertParallelMoe(moe.router, experts, owners)


def owners_among(model: Model, size: int, owners_of: OwnersOf | None = None) -> dict[int, Owners]:
    """Return the owners of each layer's experts among `size` ranks, as the rewrite shares them out.

    `model` is the one before any rewrite.
    """
    found: dict[int, Owners] = {}
    for i, layer in enumerate(model.layers):
        for leaf in leaves(layer):
            if isinstance(leaf, Experts):
                found[i] = _shared_out(leaf.num_experts, size, i, owners_of)
    return found


def _shared_out(experts: int, size: int, layer: int, owners_of: OwnersOf | None) -> Owners:
    if owners_of is not None:
        return owners_of(layer, experts)
    return held_once(evenly(size, experts), size)


def owners_by_layer(model: Model) -> dict[int, Owners]:
    """Return the owners of the experts of each layer that has some on several ranks."""
    found = ((i, owners) for i, layer in enumerate(model.layers) for owners in _owners(layer))
    return dict(found)


def _owners(spec: Spec) -> Iterator[Owners]:
    if isinstance(spec, ExpertParallelMoe):
        yield spec.owners
        return
    for part in spec.parts():
        yield from _owners(part.spec)


def _join(offers: _Offers, outer: Memory, row_format: Format = F32) -> Join:
    """Return how an `ExpertParallelMoe` is made of its parts within the memory `outer`."""
    there = offers.within(outer)

    def make(spec: ExpertParallelMoe, router: Block, experts: Block) -> Block:
        agreed = offers.agreed(row_format)
        return ExpertParallel(router, experts, there.create(spec.traffic(agreed)))

    def exchange_bytes(spec: ExpertParallelMoe, tokens: int) -> int:
        return there.scratch_bytes(spec.traffic(row_format), tokens)

    def reading(formats: Mapping[str, Format]) -> Join:
        return _join(offers, outer, formats["experts"])

    return Join(make, there.memory, there.is_capturable, exchange_bytes, there, reading)


class _Offers:
    """The exchange that all layers of a model get, and which shares memory between layers."""

    def __init__(self, transport: Transport | None, rank: int, exchange: str) -> None:
        self._transport = transport
        self._rank = rank
        self._exchange = exchange
        self._by_memory: dict[str, ExchangeOffer] = {}

    def within(self, outer: Memory) -> ExchangeOffer:
        if outer.name not in self._by_memory:
            self._by_memory[outer.name] = self._offer(outer)
        return self._by_memory[outer.name]

    def agreed(self, row_format: Format) -> Format:
        """Return the format in which all ranks read rows, F32 if they differ; every rank calls it.

        They differ if experts are split between memories on some of the ranks.
        """
        if self._transport is None:
            return row_format
        everyones_formats = everyones(self._transport, PLAIN.index(row_format))
        return row_format if len(set(everyones_formats.tolist())) == 1 else F32

    def _offer(self, outer: Memory) -> ExchangeOffer:
        if self._transport is None:
            return _in_no_job(self._rank)
        return offered(self._transport, outer, self._exchange)


def _in_no_job(rank: int) -> ExchangeOffer:
    """Return what stands for an exchange in a plan: the one that every transport has."""

    def create(traffic: Traffic) -> NoReturn:
        raise Lfm2kitError("this is a plan of one rank's share of the model; it cannot be built")

    return ExchangeOffer(HOST, create, scratch_bytes=partial(scratch_bytes, rank))


class ExpertParallel:
    """The block of `ExpertParallelMoe`: route -> dispatch -> experts -> combine.

    The experts get a row for each token and expert, and every row's weighted output comes back:
    the sum over a token's experts is then made here in the order of k, and has the same bits as
    without expert parallelism.
    """

    def __init__(self, router: Block, experts: Block, exchange: Exchange) -> None:
        self.router = router
        self.experts = experts
        self.exchange = exchange
        self.overlap = Overlap(OFF)

    def __call__(self, x: Array) -> Array:
        tokens = (x, *self.router(x))
        if self.overlap.is_on is None:
            return self._timed(*tokens)
        if self.overlap.is_on:
            return self.exchange.in_pieces(self.experts, *tokens)  # type: ignore[attr-defined]
        rows = self.exchange.dispatch(*tokens)
        return self.exchange.combine(self.experts(*rows))

    def _timed(self, *tokens: Array) -> Array:
        """Return what the call returns, and note the times of its parts."""
        start = time.perf_counter()
        rows = self.exchange.dispatch(*tokens)
        dispatched = time.perf_counter()
        products = self.experts(*rows)
        computed = time.perf_counter()
        delta = self.exchange.combine(products)
        end = time.perf_counter()
        self.overlap.note(computed - dispatched, dispatched - start + end - computed)
        return delta
