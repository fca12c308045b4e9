"""One exchange of a layer in the host's memory: rows are packed, sent, put in order, and added."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit.formats import F32, Format, rounded
from lfm2kit.routes import Division, Int32, Places
from lfm2kit.transport import ExchangeCounts, Rows, Sent, Transport

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# What stands for the product of an id of -1: added to any number, even to -0.0, it changes nothing.
NOTHING = np.float32(-0.0)
BAND = 64  # tokens whose products are added at once: their sums stay in a core's cache
SPARE = 1 / 8  # of a buffer, so that calls of a few more rows need no other
WORD = 4  # bytes of a number, whether it is of a product, an id, a weight or a count


class Buffers:
    """Memory that the exchanges of all layers share, and that grows to the largest call."""

    def __init__(self) -> None:
        self._arrays: dict[str, Bytes] = {}

    def array(
        self, name: str, rows: int, columns: int, dtype: npt.DTypeLike = np.float32
    ) -> npt.NDArray[Any]:
        """Return an array [rows, columns], valid until the same name is asked for again."""
        nbytes = rows * columns * np.dtype(dtype).itemsize
        if name not in self._arrays or self._arrays[name].size < nbytes:
            self._arrays.pop(name, None)  # before the larger one is allocated
            self._arrays[name] = np.empty(int(nbytes * (1 + SPARE)), np.uint8)
        return self._arrays[name][:nbytes].view(dtype).reshape(rows, columns)


class Message(NamedTuple):
    """The tokens that one rank sends to another: n rows of x, and then their ids and weights.

    To a transport it is n rows of `nbytes` bytes.
    """

    x: npt.NDArray[Any]  # [n, hidden_size], in the format in which experts read rows
    expert_ids: Int32  # [n, k]; -1 for experts of other ranks
    expert_weights: Floats  # [n, k]

    @staticmethod
    def header_bytes(k: int) -> int:
        """Return the bytes that go with each row of x: k ids, and k weights."""
        return 2 * WORD * k

    @staticmethod
    def nbytes(hidden_size: int, k: int, row_format: Format) -> int:
        """Return the bytes of a row of x and of what goes with it."""
        return row_format.nbytes((hidden_size,)) + Message.header_bytes(k)


class Round:
    """One exchange of a layer: a rank's tokens go to their experts, and the products come back.

    Every rank calls what sends in the same order: `swap_chosen` if this divides the experts,
    `swap_counts`, `send_tokens` for each piece, and `send_products` for each piece.
    """

    def __init__(
        self,
        transport: Transport,
        tokens: Message,
        buffers: Buffers,
        counts: ExchangeCounts,
        row_format: Format = F32,
        told: Callable[[bool], None] | None = None,
    ) -> None:
        self._transport = transport
        self._told = told  # of waits
        self._buffers = buffers
        self._counts = counts
        self._format = row_format
        self._tokens = tokens._replace(x=self._rounded(tokens.x))
        self._came: list[list[Message]] = []  # by piece and rank
        self._received: list[list[int]] = []  # pairs that came, by piece and rank
        (_, self._hidden_size), (_, self._k) = tokens.x.shape, tokens.expert_ids.shape
        self._row = Message.nbytes(self._hidden_size, self._k, row_format)  # of a token

    def _rounded(self, x: Floats) -> npt.NDArray[Any]:
        """Return all rows in the format in which experts read them, each rounded once."""
        if self._format == F32:
            return x
        tokens, hidden_size = x.shape
        rows = self._buffers.array("rounded", tokens, hidden_size, self._format.block)
        for start in range(0, len(x), BAND):
            rows[start : start + BAND] = rounded(x[start : start + BAND], self._format)
        return rows

    def swap_chosen(self) -> Int32:
        """Return how often the tokens of each rank chose each expert, [ranks, num_experts]."""
        ids, experts = self._tokens.expert_ids, len(self._counts.expert_rows)
        mine = np.bincount(ids[ids >= 0], minlength=experts)
        return self._swap([mine] * self._transport.world.size)

    def divide(self, division: Division) -> None:
        """Take the division of experts into pieces, by which the tokens are sent."""
        self._division, self._routes = division, division.routes(self._tokens.expert_ids)

    def swap_counts(self) -> None:
        """Send each rank the numbers of rows that it will get, and make room for those to come."""
        came = self._swap(np.transpose(self._routes.rows))
        self._coming: list[list[int]] = came.T.tolist()  # rows, by piece and rank
        self._room = self._buffers.array("received", int(came.sum()), self._row, np.uint8)

    def _swap(self, numbers: npt.ArrayLike) -> Int32:
        """Send each rank its numbers, of [ranks, n], and return those that came, [ranks, n]."""
        rows = np.ascontiguousarray(numbers, np.int32)
        each = [1] * len(rows)
        return self._send(self._counts.counts, rows, each, each, header_bytes=WORD * rows.shape[1])

    def send_tokens(self, piece: int) -> None:
        """Send the tokens that need `piece` and none before it to the other ranks."""
        counts, coming = self._routes.rows[piece], self._coming[piece]
        packed = self._packed(_parts(map(sum, self._routes.rows))[piece], counts)
        into = self._room[_parts(map(sum, self._coming))[piece]]
        headers = Message.header_bytes(self._k)
        self._send(self._counts.dispatch, packed, counts, coming, into, headers)
        messages = list(self._messages(into, coming))
        if piece == 0:
            messages[self._division.rank] = self._own()
        self._came.append(messages)

    def _own(self) -> Message:
        """Return what is not sent: all tokens, with this rank's experts."""
        ids, rank = self._tokens.expert_ids, self._division.rank
        return self._tokens._replace(
            expert_ids=np.where(self._division.owners[ids] == rank, ids, -1)
        )

    def _packed(self, part: slice, counts: Sequence[int]) -> Bytes:
        """Return the messages to all ranks that consist of a `part` of all rows to be sent."""
        ranks, rows = self._routes.ranks[part], self._routes.tokens[part]
        all_ids = self._tokens.expert_ids[rows]
        ids = np.where(self._division.owners[all_ids] == ranks[:, None], all_ids, -1)
        packed = self._buffers.array("own", len(rows), self._row, np.uint8)
        for message, one in zip(self._messages(packed, counts), _parts(counts), strict=True):
            np.take(self._tokens.x, rows[one], axis=0, out=message.x, mode="clip")
            message.expert_ids[:] = ids[one]
            message.expert_weights[:] = self._tokens.expert_weights[rows[one]]
        return packed

    def _messages(self, packed: Bytes, counts: Sequence[int]) -> Iterator[Message]:
        """Yield each rank's message in `packed`; writing into it writes there."""
        row_bytes = self._format.nbytes((self._hidden_size,))
        for count, part in zip(counts, _parts(counts), strict=True):
            ends = [count * row_bytes, count * (row_bytes + WORD * self._k)]
            x, ids, weights = np.split(packed[part].reshape(-1), ends)
            yield Message(
                x.view(self._format.block).reshape(count, self._hidden_size),
                ids.view(np.int32).reshape(count, self._k),
                weights.view(np.float32).reshape(count, self._k),
            )

    def rows(self, piece: int) -> Rows:
        """Return a row for each token and expert of `piece`, once its tokens have come.

        They are in the order of ranks, pieces that the tokens came with, tokens and k.
        """
        messages = [
            one for of_rank in zip(*self._came[: piece + 1], strict=True) for one in of_rank
        ]
        pairs = [np.nonzero(self._division.own[one.expert_ids] == piece) for one in messages]
        counts = [len(rows) for rows, _ in pairs]
        self._received.append(np.reshape(counts, (-1, piece + 1)).sum(axis=1).tolist())
        ids = np.concatenate([m.expert_ids[p] for m, p in zip(messages, pairs, strict=True)])
        weights = [m.expert_weights[p] for m, p in zip(messages, pairs, strict=True)]
        x = self._buffers.array("rows", len(ids), self._hidden_size, self._format.block)
        for message, (rows, _), part in zip(messages, pairs, _parts(counts), strict=True):
            np.take(message.x, rows, axis=0, out=x[part], mode="clip")
        self._counts.expert_rows += np.bincount(ids, minlength=len(self._counts.expert_rows))
        return Rows(x, ids[:, None], np.concatenate(weights)[:, None])

    def send_products(self, piece: int, products: Floats) -> None:
        """Send the products of `piece`, in the order of its rows, to the ranks of their tokens."""
        coming = self._routes.pairs
        if piece == 0:  # all tokens have been sent, from memory that is now free
            rows = sum(map(sum, coming)) + 1
            self._returned = self._buffers.array("own", rows, self._hidden_size)
        into = self._returned[_parts(map(sum, coming))[piece]]
        counts, products = self._received[piece], np.ascontiguousarray(products)
        self._send(self._counts.combine, products, counts, coming[piece], into)

    def delta(self) -> Floats:
        """Return the sum of each token's products, in the order of k, once all have come back."""
        places, last = self._routes.places, len(self._returned) - 1
        self._returned[last] = NOTHING
        delta = _added(self._returned, places)
        delta[(places == last).all(axis=1)] = 0
        self._counts.copied_rows += len(self._routes.tokens) + int(np.sum(self._received)) + last
        return delta

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
        with self._waiting(sent):
            received, _ = self._transport.all_to_all(rows, send_counts, receive_counts, into)
        to_others = [n for rank, n in enumerate(send_counts) if rank != self._transport.world.rank]
        sent.add(to_others, rows.itemsize * int(np.prod(rows.shape[1:])), header_bytes)
        return received

    def _waiting(self, sent: Sent) -> AbstractContextManager[None]:
        return sent.waiting(self._told)


class RoundBeside(Round):
    """One exchange of a layer beside the computation, which waits somewhere else, or not at all."""

    def _waiting(self, sent: Sent) -> AbstractContextManager[None]:
        return nullcontext()


def _parts(counts: Iterable[int]) -> list[slice]:
    """Return where the rows of each rank, or piece, are if they follow one another."""
    counts = list(counts)
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
