"""The exchange that every transport has: NumPy over its host collectives.

It is the slow and clear twin of every other exchange: they give the same bits.

A token goes to a rank once, with all of its experts there, and the product of each expert comes
back.  Rows are copied once before they are sent, and once after they are received.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from math import comb
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit.memory import HOST, Memory
from lfm2kit.transport import (
    ExchangeCounts,
    ExchangeOffer,
    Exchanges,
    ExchangesOver,
    Rows,
    Sent,
    Traffic,
    Transport,
)

Floats = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Places = npt.NDArray[np.intp]

# Where tokens travel: past the host where that is possible, past it or not at all, through it.
AUTO, PAST_HOST, THROUGH_HOST = "auto", "device", "host"
EXCHANGE = (AUTO, PAST_HOST, THROUGH_HOST)

# What stands for the product of an id of -1: added to any number, even to -0.0, it changes nothing.
NOTHING = np.float32(-0.0)
BAND = 64  # tokens whose products are added at once: their sums stay in a core's cache
SPARE = 1 / 8  # of a buffer, so that calls of a few more rows need no other
WORD = 4  # bytes of a number, whether it is of x, an id, a weight or a count


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
        partial(HostExchange, transport, buffers=Buffers()),
        scratch_bytes=partial(scratch_bytes, transport.world.rank),
    )


def scratch_bytes(rank: int, traffic: Traffic, tokens: int) -> int:
    """Return the bytes that exchanges of this traffic share on `rank`, and those of the products.

    Each rank has `tokens` tokens, and the experts of a token are any k with the same probability.
    """
    hidden_size, k, owners = traffic
    num_experts = len(owners[rank])
    others = [other for other in range(len(owners)) if other != rank]

    def going(of_rank: int, to: int) -> float:
        """Return how many tokens of one rank have experts on the other."""
        elsewhere = num_experts - owners[of_rank].count(to)
        return tokens * (1 - comb(elsewhere, k) / comb(num_experts, k))

    sent = sum(going(rank, other) for other in others)
    received = sum(going(other, rank) for other in others)
    rows = tokens * k * sum(of.count(rank) for of in owners) / num_experts
    row, message = hidden_size, hidden_size + 2 * k
    buffers = max(sent * message, tokens * k * row) + received * message + rows * row
    return round(WORD * (buffers * (1 + SPARE) + rows * row))


class Buffers:
    """Memory that the exchanges of all layers share, and that grows to the largest call."""

    def __init__(self) -> None:
        self._arrays: dict[str, Floats] = {}

    def array(self, name: str, rows: int, columns: int) -> Floats:
        """Return float32 [rows, columns], valid until the same name is asked for again."""
        size = rows * columns
        if name not in self._arrays or self._arrays[name].size < size:
            self._arrays.pop(name, None)  # before the larger one is allocated
            self._arrays[name] = np.empty(int(size * (1 + SPARE)), np.float32)
        return self._arrays[name][:size].reshape(rows, columns)


class Message(NamedTuple):
    """The tokens that one rank sends to another: n rows of x, and then their ids and weights.

    To a transport it is n rows of hidden_size + `headers(k)` numbers.
    """

    x: Floats  # [n, hidden_size]
    expert_ids: Int32  # [n, k]; -1 for experts of other ranks
    expert_weights: Floats  # [n, k]

    @staticmethod
    def headers(k: int) -> int:
        """Return how many numbers go with each row of x."""
        return 2 * k


class Home(NamedTuple):
    """Where the products of this rank's tokens are when they have come back."""

    places: Places  # of each (token, expert) pair among the products, [tokens, k]; the last if -1
    counts: list[int]  # pairs of the experts of each rank


class HostExchange:
    """An exchange over a transport's `all_to_all`, in the host's memory."""

    def __init__(self, transport: Transport, traffic: Traffic, buffers: Buffers) -> None:
        self._transport = transport
        self._rank, self._size = transport.world.rank, transport.world.size
        self._buffers = buffers
        owners = traffic.owners[self._rank]
        self._owners = np.array([*owners, self._size], np.intp)  # of the id -1: nobody
        self._home = Home(np.empty((0, 1), np.intp), [0] * self._size)
        self._received: list[int] = []  # pairs that came from each rank
        self._counts = self._no_counts()

    def dispatch(self, x: Floats, expert_ids: Int32, expert_weights: Floats) -> Rows:
        owners = self._owners[expert_ids]  # [tokens, k]
        self._home = _home(owners, self._size)
        own_ids = np.where(owners == self._rank, expert_ids, -1)
        messages = self._swapped(Message(x, expert_ids, expert_weights), owners)
        messages[self._rank] = Message(x, own_ids, expert_weights)
        return self._expanded(messages, x.shape[1])

    def combine(self, products: Floats) -> Floats:
        places, counts = self._home
        products = np.ascontiguousarray(products)
        returned = self._buffers.array("own", sum(counts) + 1, products.shape[1])
        self._send(self._counts.combine, products, self._received, counts, returned[:-1])
        returned[-1] = NOTHING
        self._counts.copied_rows += sum(counts)
        delta = _added(returned, places)
        delta[(places == sum(counts)).all(axis=1)] = 0
        return delta

    def counted(self) -> ExchangeCounts:
        counts, self._counts = self._counts, self._no_counts()
        return counts

    def _no_counts(self) -> ExchangeCounts:
        experts = np.zeros(len(self._owners) - 1, np.int64)
        return ExchangeCounts(Sent(), Sent(), Sent(), 0, experts)

    def _swapped(self, tokens: Message, owners: Places) -> list[Message]:
        """Send the tokens to the other ranks, and return what each of these has sent."""
        ranks, rows = self._rows_for_others(owners)
        counts = np.bincount(ranks, minlength=self._size).tolist()
        came = self._swapped_counts(counts)
        ids = np.where(owners[rows] == ranks[:, None], tokens.expert_ids[rows], -1)
        sent = self._packed(tokens, rows, ids, counts)
        received = self._buffers.array("received", sum(came), sent.shape[1])
        headers = WORD * Message.headers(owners.shape[1])
        self._send(self._counts.dispatch, sent, counts, came, received, headers)
        return list(_messages(received, came, tokens.x.shape[1], owners.shape[1]))

    def _packed(self, tokens: Message, rows: Places, ids: Int32, counts: Sequence[int]) -> Floats:
        """Return the messages for all ranks: the tokens in `rows`, with `ids` [rows, k]."""
        hidden_size, k = tokens.x.shape[1], ids.shape[1]
        words = self._buffers.array("own", len(rows), hidden_size + Message.headers(k))
        messages = _messages(words, counts, hidden_size, k)
        for message, part in zip(messages, _parts(counts), strict=True):
            np.take(tokens.x, rows[part], axis=0, out=message.x, mode="clip")
            message.expert_ids[:] = ids[part]
            message.expert_weights[:] = tokens.expert_weights[rows[part]]
        self._counts.copied_rows += len(rows)
        return words

    def _swapped_counts(self, counts: Sequence[int]) -> list[int]:
        """Send each rank its number, and return those that came."""
        each = [1] * self._size
        numbers = np.array(counts, np.int32)
        came = self._send(self._counts.counts, numbers, each, each, header_bytes=WORD)
        return [int(count) for count in came]

    def _rows_for_others(self, owners: Places) -> tuple[Places, Places]:
        """Return the ranks that tokens go to, in ascending order, and each one's tokens."""
        is_for = np.zeros((self._size + 1, len(owners)), bool)
        is_for[owners.T, np.arange(len(owners))] = True
        is_for[[self._rank, self._size]] = False  # this rank, and nobody
        ranks, rows = np.nonzero(is_for)
        return ranks, rows

    def _expanded(self, messages: Sequence[Message], hidden_size: int) -> Rows:
        """Return a row for each token and expert, in the order of ranks, tokens and k."""
        pairs = [np.nonzero(message.expert_ids >= 0) for message in messages]
        self._received = [len(rows) for rows, _ in pairs]
        ids = np.concatenate([m.expert_ids[p] for m, p in zip(messages, pairs, strict=True)])
        weights = [m.expert_weights[p] for m, p in zip(messages, pairs, strict=True)]
        x = self._buffers.array("rows", len(ids), hidden_size)
        parts = _parts(self._received)
        for message, (rows, _), part in zip(messages, pairs, parts, strict=True):
            np.take(message.x, rows, axis=0, out=x[part], mode="clip")
        self._counts.copied_rows += len(ids)
        self._counts.expert_rows += np.bincount(ids, minlength=len(self._owners) - 1)
        return Rows(x, ids[:, None], np.concatenate(weights)[:, None])

    def _send(
        self,
        sent: Sent,
        rows: npt.NDArray[Any],
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        into: npt.NDArray[Any] | None = None,
        header_bytes: int = 0,
    ) -> npt.NDArray[Any]:
        """Exchange rows of which each rank knows how many come, and count them in `sent`."""
        start = time.perf_counter()
        received, _ = self._transport.all_to_all(rows, send_counts, receive_counts, into)
        sent.seconds += time.perf_counter() - start
        to_others = [n for rank, n in enumerate(send_counts) if rank != self._rank]
        sent.add(to_others, WORD * int(np.prod(rows.shape[1:])), header_bytes)
        return received


def _home(owners: Places, size: int) -> Home:
    """Return where products come back to; those of rank 0's experts come first."""
    counts = np.bincount(owners.reshape(-1), minlength=size + 1)[:size]
    pairs = np.argsort(owners, axis=None, kind="stable")[: counts.sum()]
    places = np.full(owners.shape, counts.sum(), np.intp)
    places.reshape(-1)[pairs] = np.arange(len(pairs))
    return Home(places, counts.tolist())


def _messages(words: Floats, counts: Sequence[int], hidden_size: int, k: int) -> Iterator[Message]:
    """Yield each rank's message in `words`; writing into it writes there."""
    for count, part in zip(counts, _parts(counts), strict=True):
        ends = [count * hidden_size, count * (hidden_size + k)]
        x, words_of_ids, weights = np.split(words[part].reshape(-1), ends)
        ids, weights = words_of_ids.view(np.int32).reshape(count, k), weights.reshape(count, k)
        yield Message(x.reshape(count, hidden_size), ids, weights)


def _parts(counts: Sequence[int]) -> list[slice]:
    """Return where each rank's rows are, if those of rank 0 come first."""
    ends = list(accumulate(counts))
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _added(products: Floats, places: Places) -> Floats:
    """Return the sum over k, in order, of the products at `places` [tokens, k]."""
    delta = np.empty((len(places), products.shape[1]), np.float32)
    term = np.empty((BAND, products.shape[1]), np.float32)
    for start in range(0, len(places), BAND):
        sums, first, *others = delta[start : start + BAND], *places[start : start + BAND].T
        np.take(products, first, axis=0, out=sums, mode="clip")
        for place in others:
            sums += np.take(products, place, axis=0, out=term[: len(sums)], mode="clip")
    return delta
