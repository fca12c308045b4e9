"""The checks of transports and exchanges catch what breaks their contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from lfm2kit.exchange_round import Buffers
from lfm2kit.formats import BF16, F16, rounded
from lfm2kit.host_exchange import ExchangeInPieces, HostExchange
from lfm2kit.memory import Memory
from lfm2kit.testing import (
    CheckFailed,
    ThreadTransport,
    check_exchange,
    check_transport,
    run_ranks,
)
from lfm2kit.testing.threads import Meeting
from lfm2kit.transport import ExchangeOffer, JobError, Rows, Traffic, World, held_once


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_exchange_of_every_transport_keeps_the_contract(size: int) -> None:
    run_ranks(size, check_exchange)


class Reversing(ThreadTransport):
    """Delivers the rows of the last rank first."""

    def all_to_all(self, rows: Any, send_counts: Sequence[int], *known: Any) -> Any:
        received, counts = super().all_to_all(rows, send_counts, *known)
        parts = np.split(received, np.cumsum(counts)[:-1])
        return np.concatenate(parts[::-1]), counts


class Miscounting(ThreadTransport):
    """Says that every rank has sent what rank 0 has."""

    def all_to_all(self, rows: Any, send_counts: Sequence[int], *known: Any) -> Any:
        received, counts = super().all_to_all(rows, send_counts, *known)
        return received, [counts[0]] * len(counts)


class Elsewhere(ThreadTransport):
    """Returns the rows, but not in the array that was given for them."""

    def all_to_all(
        self, rows: Any, send_counts: Any, receive_counts: Any = None, into: Any = None
    ) -> Any:
        return super().all_to_all(rows, send_counts, receive_counts)


class Scattering(ThreadTransport):
    """Gathers on every rank."""

    def gather(self, rows: Any, counts: Any = None) -> Any:
        return np.concatenate(self.everyones(rows.copy()))


class Losing(ThreadTransport):
    """Loses what calls beside the caller's work return."""

    def aside(self, purpose: str) -> Any:
        aside: Any = super().aside(purpose)
        begin = aside.begin

        def losing(call: Callable[[], Any]) -> Any:
            begun = begin(call)
            return begin(lambda: [begun.end()].clear())

        aside.begin = losing  # type: ignore[method-assign]
        return aside


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (Losing, r"end\(\) did not return what the call returned"),
        (Reversing, "came in another order"),
        (Miscounting, "counts .* came"),
        (Elsewhere, "rows did not come into the given array"),
        (Scattering, "gather returned rows on another rank than 0"),
    ],
)
def test_a_broken_transport_is_caught(broken: Any, says: str) -> None:
    with pytest.raises(CheckFailed, match=says):
        run_ranks(3, check_transport, make=broken)


class WithoutGroups(ThreadTransport):
    """Forms no groups, whose checks take longest."""

    group = None  # type: ignore[assignment]


class Apart(WithoutGroups):
    """Gives each rank memory of its own."""

    def shared(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.empty(shape, dtype)


class Again(WithoutGroups):
    """Gives the same memory each time."""

    def shared(self, shape: tuple[int, ...], dtype: Any) -> Any:
        self.kept = getattr(self, "kept", None) or [super().shared(shape, dtype)]
        return self.kept[0]


class ToSome(WithoutGroups):
    """Gives the last rank nothing."""

    def shared(self, shape: tuple[int, ...], dtype: Any) -> Any:
        array = super().shared(shape, dtype)
        return None if self.world.rank + 1 == self.world.size else array


class Flat(WithoutGroups):
    """Gives memory of another form."""

    def shared(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return super().shared((shape[0], shape[1] + 1), dtype)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (Apart, "ranks do not read what others have written"),
        (Again, "ranks do not read what others have written"),
        (ToSome, "some ranks have memory in common, and others none"),
        (Flat, r"the array is int32 \[2, 4\]"),
    ],
)
def test_memory_that_ranks_do_not_have_in_common_is_caught(broken: Any, says: str) -> None:
    with pytest.raises(CheckFailed, match=says):
        run_ranks(2, check_transport, make=broken)


def test_a_transport_need_not_share_memory() -> None:
    class Plain(WithoutGroups):
        shared = None  # type: ignore[assignment]

    run_ranks(2, check_transport, make=Plain)


class Whole(ThreadTransport):
    """Gives all ranks where some are asked for."""

    def group(self, ranks: Sequence[int]) -> ThreadTransport:
        return self


class Sorting(ThreadTransport):
    """Numbers a group's ranks as the job does, in whatever order they are asked for."""

    def group(self, ranks: Sequence[int]) -> ThreadTransport:
        return super().group(sorted(ranks))


class Gathering(ThreadTransport):
    """Lets a group's ranks wait for all others."""

    def group(self, ranks: Sequence[int]) -> ThreadTransport:
        group = super().group(ranks)
        group.barrier = self.barrier  # type: ignore[method-assign]
        return group


class OnAnyNode(ThreadTransport):
    """Does not say which ranks share a machine."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__(rank, meeting)
        self.world = self.world._replace(nodes=())


class OnOtherNodes(ThreadTransport):
    """Says something else on each rank."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__(rank, meeting)
        self.world = World.of(rank, [0 if rank == 0 else 3, 0, 0])


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (Whole, r"the world of the group \[.*\] is World"),
        (Sorting, r"the world of the group \[2, 0\] is World"),
        (OnAnyNode, r"3 ranks, but nodes \(\)"),
        (OnOtherNodes, "the ranks do not see the same nodes"),
    ],
)
def test_broken_groups_are_caught(broken: Any, says: str) -> None:
    with pytest.raises(CheckFailed, match=says):
        run_ranks(3, check_transport, make=broken)


def test_a_group_that_waits_for_other_ranks_is_caught() -> None:
    with pytest.raises(JobError, match="no word within 1 s"):
        run_ranks(3, check_transport, make=Gathering, patience=1)


FEWER = [[0, 0, 1, 1], [0, 1, 2, 3]]  # what [7, 5, 7, 5] and [0, 1, 1, 1] are much like


@pytest.mark.parametrize(
    "nodes",
    [[7, 5, 7, 5], [0, 1, 1, 1], *(pytest.param(nodes, marks=pytest.mark.long) for nodes in FEWER)],
)
def test_groups_keep_the_contract_wherever_ranks_are(nodes: list[int]) -> None:
    run_ranks(4, check_transport, nodes=nodes)


def test_a_transport_need_not_form_groups() -> None:
    class Plain(ThreadTransport):
        group = None  # type: ignore[assignment]

    run_ranks(2, check_transport, make=Plain)


def returned_to(exchange: HostExchange, products: Any) -> tuple[Any, Any]:
    """Return the products that came back, and the place of each pair among them."""
    here = exchange._round
    assert here is not None
    returned, _ = exchange._transport.all_to_all(products, here._received[0])
    return returned, here._routes.places


class ByRank(HostExchange):
    """Adds a token's products in the order of their experts' ranks, not of k."""

    def combine(self, products: Any) -> Any:
        returned, places = returned_to(self, products)
        tokens = np.argsort(places, axis=None)[: len(returned)] // places.shape[1]
        delta = np.zeros((len(places), products.shape[1]), np.float32)
        np.add.at(delta, tokens, returned)
        return delta


class SendingNobodys(HostExchange):
    """Sends the pairs with an id of -1 as well, to expert 0."""

    def dispatch(self, x: Any, expert_ids: Any, expert_weights: Any) -> Rows:
        return super().dispatch(x, np.maximum(expert_ids, 0), expert_weights)


class Misrouting(HostExchange):
    """Sends each token to the next rank."""

    def __init__(self, transport: Any, traffic: Traffic, buffers: Buffers) -> None:
        size = transport.world.size
        owners = [tuple((owner + 1) % size for owner in some) for some in traffic.owners]
        super().__init__(transport, traffic._replace(owners=tuple(owners)), buffers)


class SharingAlike(HostExchange):
    """Sends tokens to the owners of rank 0's, where other holders should compute them."""

    def __init__(self, transport: Any, traffic: Traffic, buffers: Buffers) -> None:
        alike = held_once(traffic.owners[0], transport.world.size)
        super().__init__(transport, traffic._replace(owners=alike), buffers)


class CountingOn(HostExchange):
    """Does not begin again at 0 after it was asked for its counts."""

    def counted(self) -> Any:
        return self._counts


class NotClearing(HostExchange):
    """Keeps the buffer of products from call to call, and what lay there for ids of -1."""

    buffer: Any = None

    def combine(self, products: Any) -> Any:
        returned, places = returned_to(self, products)
        tokens, k = places.shape
        if self.buffer is None or len(self.buffer) < tokens * k:
            self.buffer = np.full((tokens * k, products.shape[1]), np.float32(-0.0))
        pairs = np.argsort(places, axis=None, kind="stable")[: len(returned)]
        self.buffer[pairs] = returned
        by_k = self.buffer[: tokens * k].reshape(tokens, k, products.shape[1])
        delta = by_k[:, 0].copy()
        for column in range(1, k):
            delta += by_k[:, column]
        return delta


class LeavingPadding(HostExchange):
    """Fills up with rows of padding, and adds their products to the first token."""

    def dispatch(self, x: Any, expert_ids: Any, expert_weights: Any) -> Rows:
        rows = super().dispatch(x, expert_ids, expert_weights)
        last = [np.r_[a, np.zeros((1, a.shape[1]), a.dtype)] for a in rows]
        last[1][-1] = -1
        return Rows(*last)

    def combine(self, products: Any) -> Any:
        delta = super().combine(products[:-1])
        delta[:1] += products[-1]
        return delta


class Truncating(HostExchange):
    """Cuts off the lower bits of rows instead of rounding them."""

    def dispatch(self, x: Any, *experts: Any) -> Rows:
        bits = {BF16: 16, F16: 13}.get(self._traffic.row_format, 0)
        cut = np.ascontiguousarray(x).view(np.uint32) >> np.uint32(bits) << np.uint32(bits)
        return super().dispatch(cut.view(np.float32), *experts)


class Overflowing(HostExchange):
    """Lets too large a number become infinite in F16, as NumPy does."""

    def dispatch(self, x: Any, *experts: Any) -> Rows:
        if self._traffic.row_format == F16:
            x = np.where(np.abs(x) > 65519, np.copysign(np.float32(np.inf), x), x)
        return super().dispatch(x, *experts)


class RoundingTwice(HostExchange):
    """Rounds to BF16 what experts read in F16."""

    def dispatch(self, x: Any, *experts: Any) -> Rows:
        if self._traffic.row_format == F16:
            x = BF16.unpack(rounded(x, BF16))
        return super().dispatch(x, *experts)


class Reinterpreting(HostExchange):
    """Says of bits in 16 that they are whole numbers, whatever the format is."""

    def dispatch(self, *tokens: Any) -> Rows:
        rows = super().dispatch(*tokens)
        return rows._replace(x=rows.x.view(np.int16) if rows.x.itemsize == 2 else rows.x)


class Widening(HostExchange):
    """Gives rounded rows in float32, which experts take for what was not rounded."""

    def dispatch(self, *tokens: Any) -> Rows:
        rows = super().dispatch(*tokens)
        return rows._replace(x=self._traffic.row_format.unpack(rows.x))


class Splitting(ExchangeInPieces):
    """Gives each expert its rows in two calls."""

    def in_pieces(self, experts: Any, *tokens: Any) -> Any:
        def twice(*rows: Any) -> Any:
            cuts = len(rows[0]) // 2
            parts = [a[:cuts] for a in rows], [a[cuts:] for a in rows]
            return np.concatenate([experts(*part) for part in parts])

        return super().in_pieces(twice, *tokens)


class Dropping(ExchangeInPieces):
    """Leaves out the last token."""

    def in_pieces(self, experts: Any, *tokens: Any) -> Any:
        delta = super().in_pieces(experts, *(a[:-1] for a in tokens))
        return np.r_[delta, delta[-1:]]


class TellingOneMore(HostExchange):
    """Tells a wait that the other ranks do not have."""

    def tell_waits(self, told: Any) -> None:
        super().tell_waits(told)
        if told is not None and self._transport.world.rank == 1:
            told(False)
            told(True)


class TellingNothing(HostExchange):
    def tell_waits(self, told: Any) -> None:
        pass


class TellingForEver(HostExchange):
    def tell_waits(self, told: Any) -> None:
        super().tell_waits(told or self._told)


class TellingNoEnd(HostExchange):
    def tell_waits(self, told: Any) -> None:
        super().tell_waits(told and (lambda is_over: told(False)))


def offering(create: type[HostExchange]) -> type[ThreadTransport]:
    class Offering(ThreadTransport):
        def exchange_in(self, memory: Memory) -> ExchangeOffer | None:
            more = {"aside": self.aside("exchange")} if issubclass(create, ExchangeInPieces) else {}
            return ExchangeOffer(
                memory, lambda traffic: create(self, traffic, buffers=Buffers(), **more)
            )

    return Offering


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (ByRank, "the products added in the order of k"),
        (SendingNobodys, "which are this rank's to compute"),
        (Misrouting, "which other ranks hold"),
        (SharingAlike, "which are this rank's to compute"),
        (CountingOn, "rows .* came by expert, counted"),
        (NotClearing, "the products added in the order of k"),
        (LeavingPadding, "the products added in the order of k"),
        (Truncating, "rows came with other bits than those of their tokens in BF16"),
        (Overflowing, "rows came with other bits than those of their tokens in F16"),
        (RoundingTwice, "rows came with other bits than those of their tokens in F16"),
        (Reinterpreting, "rows of int16 came, and not of uint16 or float32"),
        (Widening, "rows came with other bits than those of their tokens in BF16"),
        (Splitting, r"the experts \[.*\] were called several times"),
        (Dropping, "which are this rank's to compute"),
        (TellingOneMore, r"the ranks told \[\d+, \d+, \d+\] waits"),
        (TellingNothing, "no wait was told"),
        (TellingForEver, r"waits were told after tell_waits\(None\)"),
        (TellingNoEnd, "a wait was told that began or ended twice"),
    ],
)
def test_a_broken_exchange_is_caught(broken: Any, says: str) -> None:
    with pytest.raises(CheckFailed, match=says):
        run_ranks(3, check_exchange, make=offering(broken))
