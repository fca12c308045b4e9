"""The exchange that every transport has: NumPy over its host collectives.

It is the slow and clear twin of every other exchange: they give the same bits.

A token goes to a rank once, with all of its experts there, and the product of each expert comes
back.  Rows are copied once before they are sent, and once after they are received.  Those that are
read in 16 bits are rounded before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import comb

import numpy as np

from lfm2kit.backend import Block
from lfm2kit.exchange_round import (
    SPARE,
    WORD,
    Buffers,
    Floats,
    Message,
    Round,
    RoundBeside,
)
from lfm2kit.formats import F32
from lfm2kit.memory import HOST, Memory
from lfm2kit.routes import Int32, divided, undivided
from lfm2kit.transport import (
    Aside,
    ExchangeCounts,
    ExchangeOffer,
    Exchanges,
    ExchangesOver,
    Rows,
    Sent,
    Traffic,
    Transport,
    WorksAside,
)

# Where tokens travel: past the host where that is possible, past it or not at all, through it.
AUTO, PAST_HOST, THROUGH_HOST = "auto", "device", "host"
EXCHANGE = (AUTO, PAST_HOST, THROUGH_HOST)

PIECES = 4  # of a rank's experts, whose tokens and products travel one after the other


def offered(transport: Transport, outer: Memory, exchange: str = AUTO) -> ExchangeOffer:
    """Return an exchange for blocks in `outer`: the transport's own, the memory's, or the host's.

    The host's alone if `exchange` is "host".
    """
    offer = None
    if exchange != THROUGH_HOST:
        offer = transport.exchange_in(outer) if isinstance(transport, Exchanges) else None
        if offer is None and isinstance(outer, ExchangesOver):
            offer = outer.exchange_over(transport)
    return offer or ExchangeOffer(
        HOST,
        _of_host(transport),
        scratch_bytes=partial(scratch_bytes, transport.world.rank),
    )


def _of_host(transport: Transport) -> Callable[[Traffic], HostExchange]:
    aside = transport.aside("exchange") if isinstance(transport, WorksAside) else None
    if aside is None:
        return partial(HostExchange, transport, buffers=Buffers())
    return partial(ExchangeInPieces, transport, aside=aside, buffers=Buffers())


def scratch_bytes(rank: int, traffic: Traffic, tokens: int) -> int:
    """Return the bytes that exchanges of this traffic share on `rank`, and those of the products.

    Each rank has `tokens` tokens, and the experts of a token are any k with the same probability.
    """
    hidden_size, k, owners, row_format = traffic
    num_experts = len(owners[rank])
    others = [other for other in range(len(owners)) if other != rank]

    def going(of_rank: int, to: int) -> float:
        """Return how many tokens of one rank have experts on the other."""
        elsewhere = num_experts - owners[of_rank].count(to)
        return tokens * (1 - comb(elsewhere, k) / comb(num_experts, k))

    sent = sum(going(rank, other) for other in others)
    received = sum(going(other, rank) for other in others)
    rows = tokens * k * sum(of.count(rank) for of in owners) / num_experts
    row, message = row_format.nbytes((hidden_size,)), Message.nbytes(hidden_size, k, row_format)
    product, own = WORD * hidden_size, 0 if row_format == F32 else tokens * row
    buffers = max(sent * message, tokens * k * product) + received * message + rows * row + own
    return round(buffers * (1 + SPARE) + rows * product)


class HostExchange:
    """An exchange over a transport's `all_to_all`, in the host's memory."""

    def __init__(self, transport: Transport, traffic: Traffic, buffers: Buffers) -> None:
        self._transport = transport
        self._traffic = traffic
        self._buffers = buffers
        self._undivided = undivided(traffic, transport.world.rank)
        self._counts = self._no_counts()
        self._round: Round | None = None  # that `dispatch` has begun
        self._told: Callable[[bool], None] | None = None  # of waits

    def dispatch(self, x: Floats, expert_ids: Int32, expert_weights: Floats) -> Rows:
        tokens = Message(x, expert_ids, expert_weights)
        counts, row_format = self._counts, self._traffic.row_format
        here = Round(self._transport, tokens, self._buffers, counts, row_format, self._told)
        self._round = here
        here.divide(self._undivided)
        here.swap_counts()
        here.send_tokens(0)
        return here.rows(0)

    def combine(self, products: Floats) -> Floats:
        here, self._round = self._round, None
        assert here is not None, "dispatch comes first"
        here.send_products(0, products)
        return here.delta()

    def tell_waits(self, told: Callable[[bool], None] | None) -> None:
        self._told = told

    def counted(self) -> ExchangeCounts:
        counts, self._counts = self._counts, self._no_counts()
        return counts

    def _no_counts(self) -> ExchangeCounts:
        experts = np.zeros(len(self._traffic.owners[0]), np.int64)
        return ExchangeCounts(Sent(), Sent(), Sent(), 0, experts)


class ExchangeInPieces(HostExchange):
    """The same, and one that sends beside the computation, piece by piece of the experts."""

    def __init__(
        self, transport: Transport, traffic: Traffic, aside: Aside, buffers: Buffers
    ) -> None:
        super().__init__(transport, traffic, buffers)
        self._aside = aside

    def in_pieces(
        self, experts: Block, x: Floats, expert_ids: Int32, expert_weights: Floats
    ) -> Floats:
        tokens = Message(x, expert_ids, expert_weights)
        begin, counts, row_format = self._aside.begin, self._counts, self._traffic.row_format
        here = RoundBeside(self._aside, tokens, self._buffers, counts, row_format)
        begin(partial(self._divide, here))
        begin(here.swap_counts)
        coming = [begin(partial(here.send_tokens, piece)) for piece in range(PIECES)]
        returning = []
        for piece, tokens_of_piece in enumerate(coming):
            with counts.dispatch.waiting(self._told):
                tokens_of_piece.end()
            products = experts(*here.rows(piece))
            returning.append(begin(partial(here.send_products, piece, products)))
        with counts.combine.waiting(self._told):
            for products_of_piece in returning:
                products_of_piece.end()
        return here.delta()

    def _divide(self, here: Round) -> None:
        """Divide the experts by how often the tokens of all ranks chose each."""
        rank, chosen = self._transport.world.rank, here.swap_chosen()
        here.divide(divided(self._traffic, rank, chosen, PIECES))
