"""The host's exchange counts what it sends, sends a token to a rank once, and keeps its memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from lfm2kit.exchange_round import Buffers
from lfm2kit.formats import BF16, F16, F32, PLAIN, Format
from lfm2kit.host_exchange import PIECES, ExchangeInPieces, HostExchange, scratch_bytes
from lfm2kit.routes import divided
from lfm2kit.testing import ThreadTransport, run_ranks
from lfm2kit.transport import Traffic, evenly, held_by, held_once

TOKENS, EXPERTS, K = 128, 32, 4


def uniform(rank: int, tokens: int = TOKENS) -> Any:
    """Return ids [tokens, K] of a router that prefers no expert."""
    return np.random.default_rng(rank).random((tokens, EXPERTS)).argsort(axis=1)[:, :K]


def of_one_expert(rank: int) -> Any:
    return np.full((TOKENS, 1), 5)


def of_rank_0_alone(rank: int) -> Any:
    return uniform(rank, 0 if rank else TOKENS)


def with_nobodys(rank: int) -> Any:
    ids = uniform(rank)
    ids[::3, 1:], ids[1::3] = -1, -1
    return ids


def held_evenly(size: int) -> Any:
    return held_once(evenly(size, EXPERTS), size)


def in_pieces(transport: ThreadTransport, traffic: Traffic, buffers: Buffers) -> ExchangeInPieces:
    return ExchangeInPieces(transport, traffic, transport.aside("exchange"), buffers)


def called(
    transport: ThreadTransport,
    ids: Any,
    hidden_size: int = 1024,
    is_in_pieces: bool = False,
    row_format: Format = F32,
) -> Any:
    """Exchange tokens whose experts change nothing, and return what was counted."""
    owners = held_evenly(transport.world.size)
    traffic = Traffic(hidden_size, ids.shape[1], owners, row_format)
    exchange = in_pieces(transport, traffic, Buffers())
    x = np.full((len(ids), hidden_size), transport.world.rank, np.float32)
    tokens = x, ids.astype(np.int32), np.ones(ids.shape, np.float32)
    if is_in_pieces:
        exchange.in_pieces(lambda x, ids, weights: row_format.unpack(x).copy(), *tokens)
    else:
        exchange.combine(row_format.unpack(exchange.dispatch(*tokens).x))
    return exchange.counted()


@pytest.mark.parametrize("ids_of", [uniform, of_one_expert, of_rank_0_alone, with_nobodys])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_what_is_counted_follows_from_the_routing(size: int, ids_of: Any) -> None:
    owners = [*evenly(size, EXPERTS), size]  # of the id -1: nobody
    pairs = np.zeros((size, size), int)  # (token, expert) pairs of a rank, by the expert's rank
    rows = np.zeros((size, size), int)
    for rank in range(size):
        for ids in ids_of(rank):
            to = [owners[e] for e in ids if e >= 0]
            np.add.at(pairs[rank], to, 1)
            np.add.at(rows[rank], list(set(to)), 1)
    asked = np.concatenate([ids_of(rank).ravel() for rank in range(size)])
    everyones = run_ranks(size, lambda t: called(t, ids_of(t.world.rank), 16))
    for rank, counted in enumerate(everyones):
        sent, back = (np.delete(a, rank) for a in (rows[rank], pairs[:, rank]))
        header = 2 * 4 * ids_of(rank).shape[1]
        assert counted.dispatch.messages == np.count_nonzero(sent)
        assert counted.dispatch.rows == sent.sum()
        assert counted.dispatch.bytes == sent.sum() * (64 + header)
        assert counted.dispatch.header_bytes == sent.sum() * header
        assert counted.combine.messages == np.count_nonzero(back)
        assert (counted.combine.rows, counted.combine.bytes) == (back.sum(), 64 * back.sum())
        assert counted.combine.header_bytes == 0
        assert (counted.counts.messages, counted.counts.bytes) == (size - 1, 4 * (size - 1))
        assert counted.copied_rows == sent.sum() + pairs[:, rank].sum() + pairs[rank].sum()
        assert counted.expert_rows.sum() == pairs[:, rank].sum()
    by_expert = sum(counted.expert_rows for counted in everyones)
    assert np.array_equal(by_expert, np.bincount(asked[asked >= 0], minlength=EXPERTS))


def pieces_of(size: int, everyones: Sequence[Any]) -> dict[int, int]:
    """Return the piece of its rank that each expert is in, if the tokens have these experts."""
    asked = [int((np.concatenate(everyones) == expert).sum()) for expert in range(EXPERTS)]
    found = {}
    for rank in range(size):
        filled = [0] * PIECES
        held = held_by(rank, held_evenly(size))
        for expert in sorted(held, key=lambda expert: (-asked[expert], expert)):
            found[expert] = min(range(PIECES), key=lambda piece: (filled[piece], piece))
            filled[found[expert]] += asked[expert]
    return found


@pytest.mark.parametrize("ids_of", [uniform, of_one_expert, of_rank_0_alone, with_nobodys])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_in_pieces_the_same_rows_travel_in_messages_that_follow_from_the_routing(
    size: int, ids_of: Any
) -> None:
    owners, ids = evenly(size, EXPERTS), [ids_of(rank) for rank in range(size)]
    pieces = pieces_of(size, ids)
    sent, returned = np.zeros((2, size, size, PIECES), int)
    for rank in range(size):
        for token in ids[rank]:
            for to in {owners[e] for e in token if e >= 0} - {rank}:
                first = min(pieces[e] for e in token if e >= 0 and owners[e] == to)
                sent[rank, to, first] += 1
            for e in token[token >= 0]:
                returned[owners[e], rank, pieces[e]] += owners[e] != rank
    whole = run_ranks(size, lambda t: called(t, ids[t.world.rank], 16))
    there = run_ranks(size, lambda t: called(t, ids[t.world.rank], 16, is_in_pieces=True))
    for rank, (one, other) in enumerate(zip(whole, there, strict=True)):
        assert other.dispatch.messages == np.count_nonzero(sent[rank])
        assert other.combine.messages == np.count_nonzero(returned[rank])
        assert other.counts.messages == 2 * (size - 1)
        assert (
            other.counts.bytes == other.counts.header_bytes == 4 * (EXPERTS + PIECES) * (size - 1)
        )
        assert (other.dispatch.rows, other.combine.rows) == (sent[rank].sum(), returned[rank].sum())
        for operation in "dispatch", "combine":
            mine, its = getattr(one, operation), getattr(other, operation)
            assert (mine.rows, mine.bytes) == (its.rows, its.bytes)
            assert mine.header_bytes == its.header_bytes
        assert other.copied_rows == one.copied_rows
        assert np.array_equal(other.expert_rows, one.expert_rows)


def test_pieces_have_about_equally_many_rows() -> None:
    """No piece has more than the emptiest one and an expert together."""
    skewed = np.random.default_rng(3).integers(0, 50, (1, EXPERTS)) ** 2
    chosen = np.repeat(skewed, 2, axis=0).astype(np.int32)
    for rank in range(2):
        own = divided(Traffic(8, K, held_evenly(2)), rank, chosen, PIECES).own[:-1]
        rows = np.bincount(own, 2 * skewed[0], PIECES + 1)[:PIECES]
        assert rows.min() > 0
        assert rows.max() <= rows.min() + 2 * skewed[0][own < PIECES].max()


def test_layers_in_pieces_share_memory_that_is_allocated_once() -> None:
    def rank(transport: ThreadTransport) -> Any:
        buffers, places = Buffers(), []
        traffic = Traffic(64, K, held_evenly(2))
        layers = [in_pieces(transport, traffic, buffers) for _ in range(2)]

        def experts(x: Any, ids: Any, weights: Any) -> Any:
            places.append(x.ctypes.data)
            return x.copy()

        for tokens in (TOKENS, 1, TOKENS):
            ids = uniform(transport.world.rank, tokens).astype(np.int32)
            for layer in layers:
                x = np.ones((tokens, 64), np.float32)
                delta = layer.in_pieces(experts, x, ids, np.ones(ids.shape, np.float32))
                assert (delta == K).all()
        return places[PIECES:]  # the first call grows with each piece

    for places in run_ranks(2, rank):
        assert len(set(places)) == 1


def test_a_token_goes_to_a_rank_once_and_headers_are_small() -> None:
    """Of 4 ranks, a token of uniform routing concerns 2.11 others, and 3.0 of its experts."""
    everyones = run_ranks(4, lambda t: called(t, uniform(t.world.rank)))
    rows = sum(counted.dispatch.rows for counted in everyones)
    assert rows <= 2.2 * 4 * TOKENS < sum(counted.combine.rows for counted in everyones)
    legs = [leg for c in everyones for leg in (c.counts, c.dispatch, c.combine)]
    assert sum(leg.header_bytes for leg in legs) <= 0.02 * sum(leg.bytes for leg in legs)


def test_the_layers_of_a_model_share_memory_that_is_allocated_once() -> None:
    def rank(transport: ThreadTransport) -> Any:
        buffers, places = Buffers(), []
        traffic = Traffic(64, K, held_evenly(2))
        layers = [HostExchange(transport, traffic, buffers) for _ in range(2)]
        for tokens in (TOKENS, 1, TOKENS):
            ids = uniform(transport.world.rank, tokens).astype(np.int32)
            for layer in layers:
                x = np.ones((tokens, 64), np.float32)
                rows = layer.dispatch(x, ids, np.ones(ids.shape, np.float32))
                places.append(rows.x.ctypes.data)
                assert not np.shares_memory(layer.combine(rows.x), rows.x)
        return places

    for places in run_ranks(2, rank):
        assert len(set(places)) == 1


@pytest.mark.parametrize("is_in_pieces", [False, True])
@pytest.mark.parametrize("row_format", [BF16, F16], ids=str)
def test_rows_of_16_bits_take_half_of_the_bytes_and_products_as_many(
    row_format: Format, is_in_pieces: bool
) -> None:
    """Of an odd number of elements: what follows x in a message then begins anywhere."""

    def everyones(row_format: Format) -> Any:
        def rank(transport: ThreadTransport) -> Any:
            ids = with_nobodys(transport.world.rank)
            return called(transport, ids, 17, is_in_pieces, row_format)

        return run_ranks(3, rank)

    for wide, narrow in zip(everyones(F32), everyones(row_format), strict=True):
        assert narrow.dispatch.rows == wide.dispatch.rows > 0
        assert narrow.dispatch.header_bytes == wide.dispatch.header_bytes
        halves = wide.dispatch.bytes - narrow.dispatch.bytes
        assert halves == 2 * 17 * wide.dispatch.rows
        for field in "messages", "rows", "bytes", "header_bytes":
            assert getattr(narrow.combine, field) == getattr(wide.combine, field)
        assert (narrow.counts.bytes, narrow.copied_rows) == (wide.counts.bytes, wide.copied_rows)


OWNERS = {
    "evenly": held_once(evenly(2, 6), 2),
    "unevenly": held_once([0, 1, 1, 1, 2, 1], 3),
    "one on both ranks": ((0, 0, 1, 1, 1, 0), (0, 0, 1, 1, 1, 1)),
    "none on one rank": held_once([1] * 6, 2),
    "all on all ranks": ((0,) * 6, (1,) * 6),
}


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("owners", OWNERS.values(), ids=list(OWNERS))
@pytest.mark.parametrize("row_format", PLAIN, ids=str)
def test_an_exchange_takes_the_bytes_that_are_said_before_it_is_made(
    row_format: Format, owners: Any, k: int
) -> None:
    """Tokens with every combination of k experts choose them evenly, and not only on average."""
    ids = np.array([*combinations(range(6), k)] * 8, np.int32)
    traffic = Traffic(256, k, owners, row_format)

    def rank(transport: ThreadTransport) -> tuple[int, int]:
        buffers = Buffers()
        for _ in range(2):  # layers, which share the buffers
            exchange = HostExchange(transport, traffic, buffers)
            x = np.zeros((len(ids), 256), np.float32)
            rows = exchange.dispatch(x, ids, np.ones(ids.shape, np.float32))
            exchange.combine(products := np.zeros(rows.x.shape, np.float32))
        taken = sum(array.nbytes for array in buffers._arrays.values()) + products.nbytes
        return taken, scratch_bytes(transport.world.rank, traffic, len(ids))

    row = 4 * (256 + 2 * k)
    for taken, said in run_ranks(len(owners), rank):
        assert said <= taken <= said + 2 * row  # the row of nobody's product, and roundings


def test_what_is_counted_is_told_once() -> None:
    def rank(transport: ThreadTransport) -> Any:
        traffic = Traffic(8, 1, held_evenly(2))
        exchange = HostExchange(transport, traffic, Buffers())
        ids, weights = np.full((3, 1), 31, np.int32), np.ones((3, 1), np.float32)
        for _ in range(2):
            exchange.combine(exchange.dispatch(np.ones((3, 8), np.float32), ids, weights).x)
        first, again = exchange.counted(), exchange.counted()
        return first.dispatch.rows, first.expert_rows.sum(), again.dispatch.rows, again.copied_rows

    assert run_ranks(2, rank) == [(6, 0, 0, 0), (0, 12, 0, 0)]
